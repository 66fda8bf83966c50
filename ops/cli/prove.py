"""`seamark prove`: what became of a notification, from stored facts alone."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.output import err, out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant

if TYPE_CHECKING:
    from engine.broker.jetstream import Broker
    from projections.proof import FindEvent, Proof

EXIT_UNKNOWN = 2


def prove(
    notification: Annotated[str, typer.Argument(help="Id of the notification: that of its event.")],
    user: Annotated[str | None, typer.Option("--user", help="Only this user; else the first 20 it went to.")] = None,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show what is stored about a notification, in order, and say plainly what is not proven; exit code 2: nothing is."""
    import uvloop

    from engine.traces.contexts import url_of
    from ops.cli.stores import stores, trace_url
    from projections.proof import Proofs
    from projections.tries import receipts_in

    async def run() -> list[Proof]:
        async with stores(folder, "seamark-prove") as found:
            proofs = Proofs(found.pool)
            told = receipts_in(found.broker, found.partitions)
            event = _find_event(found.broker)
            return await proofs.of(tenant or "default", notification, user, find_event=event, find_told=told)

    proofs, template = uvloop.run(run()), trace_url(folder)
    for proof in proofs:
        proof.trace_url = url_of(template, proof.trace)
        if as_json:
            print_json(proof)
        else:
            _print(proof)
    if not proofs:
        err.print("nothing is known of this notification: never dispatched, a dead letter, or not folded yet")
        sys.exit(EXIT_UNKNOWN)


def _find_event(broker: Broker) -> FindEvent:
    """Where an event is and since when, asked from the streams of events themselves."""
    from engine.dispatch.source import SOURCES
    from engine.errors import BrokerError
    from projections.proof import StoredEvent

    async def ask(epoch: str, seq: int) -> StoredEvent | None:
        try:
            for source in SOURCES:
                if (await broker.stream(source.stream)).epoch == epoch:
                    answer = await broker.api(f"STREAM.MSG.GET.{source.stream}", {"seq": seq})
                    return StoredEvent(source.stream, datetime.fromisoformat(answer["message"]["time"]))
        except BrokerError:
            pass  # trimmed, or this user of the broker may not look
        return None

    return ask


def _print(proof: Proof) -> None:
    from rich.markup import escape

    about = ", ".join(word for word in (proof.type, f"trace {proof.trace}" if proof.trace else None) if word)
    out.print(f"[bold]{escape(proof.id)}[/] for {escape(proof.user)} of {escape(proof.tenant)} ({escape(about)})")
    for fact in proof.facts:
        at = fact.at.isoformat(timespec="milliseconds").replace("+00:00", "Z") if fact.at else "time not known"
        words = [word for word in (fact.channel, fact.device, fact.where, fact.detail) if word]
        out.print(f"  {at:<24}  [bold]{fact.fact:<12}[/]  {escape(' · '.join(words))}")
    if proof.trace_url is not None:
        out.print(f"  trace: {escape(proof.trace_url)}", soft_wrap=True)
    for gap in proof.not_proven:
        out.print(f"  [yellow]not proven[/]: {escape(gap)}")
    for line in proof.as_of:
        out.print(f"  [dim]as of {escape(line)}[/]")
