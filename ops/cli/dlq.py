"""`seamark dlq`: shows what could not be delivered, and why; has it tried again, or drops it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from engine.errors import InvalidSetting
from ops.cli.moments import time_of
from ops.cli.output import err, out, print_json, stages
from ops.cli.target import DATA_FOLDER, Folder, Json, nats_settings

if TYPE_CHECKING:
    from engine.broker.jetstream import Broker
    from engine.letters.letter import Letter
    from engine.letters.reading import Filter, Found
    from engine.letters.replaying import Fate
    from ops.cli.stores import Stores

T = TypeVar("T")

EXIT_NONE: Final = 2


app = typer.Typer(
    help="Dead letters: events that could not be dispatched, jobs that ended without success.", no_args_is_help=True
)

SEQ_MAX: Final = 2**63 - 1
"""As `engine.letters.reading` has it, which is imported when a command runs."""

Seqs = Annotated[
    list[int] | None,
    typer.Argument(help="Numbers of letters, as `ls` shows them; none: all that match.", min=1, max=SEQ_MAX),
]
OneTenant = Annotated[str | None, typer.Option("--tenant", help="Of this tenant.")]
Kind = Annotated[str | None, typer.Option("--kind", help="event or job.")]
Channel = Annotated[str | None, typer.Option("--channel", help="push, email, sms or webhook: jobs of this channel.")]
Class = Annotated[str | None, typer.Option("--class", help="Of this class, as `triage` shows it.")]
Code = Annotated[str | None, typer.Option("--code", help="With this code of the provider.")]
Since = Annotated[
    str | None, typer.Option("--since", help="Written since then: 90m, 2h, 3d, or a time as 2026-01-31T12:00:00Z.")
]
Until = Annotated[str | None, typer.Option("--until", help="Written before; as --since.")]
Limit = Annotated[int, typer.Option("--limit", help="So many letters at most.", min=1, max=1_000_000)]
All = Annotated[bool, typer.Option("--all", help="All letters: needed where nothing else says which.")]


def _filter(
    tenant: OneTenant = None,
    kind: Kind = None,
    channel: Channel = None,
    cls: Class = None,
    code: Code = None,
    since: Since = None,
    until: Until = None,
) -> Filter:
    """Which letters are meant.

    Raises:
        InvalidSetting: an option says what there is not.
    """
    from engine.letters.letter import EVENT_CLASSES, JOB_CLASSES
    from engine.letters.reading import Filter
    from engine.plan.rules import CHANNELS
    from seamark.protocol.errors import InvalidToken
    from seamark.protocol.subjects import encode_token

    if kind not in (None, "event", "job"):
        raise InvalidSetting(f"--kind: there are letters of events and of jobs, not of {kind!r}")
    if channel is not None and channel not in CHANNELS:
        raise InvalidSetting(f"--channel: there is no {channel!r}: choose one of {', '.join(sorted(CHANNELS))}")
    classes = {"event": EVENT_CLASSES, "job": JOB_CLASSES}.get(kind or "", (*JOB_CLASSES, *EVENT_CLASSES))
    if cls is not None and cls not in classes:
        raise InvalidSetting(f"--class: there is no {cls!r}: choose one of {', '.join(classes)}")
    if kind == "event" and channel is not None:
        raise InvalidSetting("--channel: events have none; leave it out, or say --kind job")
    try:
        if tenant is not None:
            encode_token(tenant)
    except InvalidToken as error:
        raise InvalidSetting(f"--tenant: {error}") from error
    return Filter(
        tenant=tenant,
        kind=kind,  # type: ignore[arg-type]  # it was looked at
        channel=channel,
        cls=cls,
        code=code,
        since=None if since is None else time_of("--since", since),
        until=None if until is None else time_of("--until", until),
    )


def _of_letters(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `_filter` in place of its `wanted`, which is what they mean."""
    names = {"Filter": Any}  # it is imported when a command runs
    options = inspect.signature(_filter, locals=names, eval_str=True).parameters
    taken = inspect.signature(command, locals=names, eval_str=True).parameters

    @functools.wraps(command)
    def run(**said: Any) -> None:
        command(_filter(**{name: said.pop(name) for name in options}), **said)

    own = [one for name, one in taken.items() if name != "wanted"]
    run.__signature__ = inspect.Signature([*options.values(), *own])  # type: ignore[attr-defined]  # Typer reads it
    run.__annotations__ = {one.name: one.annotation for one in (*options.values(), *own)}
    return run


@app.command("ls")
@_of_letters
def list_(
    wanted: Filter,
    limit: Limit = 100,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """List letters, the oldest first."""

    async def run(broker: Broker) -> int:
        from engine.letters.reading import letters

        count = 0
        async with contextlib.aclosing(letters(broker, wanted)) as found:
            async for letter, _ in found:
                print_json(letter) if as_json else out.print(_line(letter), markup=False)
                count += 1
                if count >= limit:
                    return count
        return count

    if not _run(folder, run):
        err.print("there is no such dead letter")


@app.command()
def show(
    seq: Annotated[int, typer.Argument(help="The letter's number, as `ls` shows it.", min=1, max=SEQ_MAX)],
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show a letter whole, with the event or job that it holds, texts included; exit code 2: there is none."""

    async def run(broker: Broker) -> Found | None:
        from engine.letters.reading import letter_at

        return await letter_at(broker, seq)

    found = _run(folder, run)
    if found is None:
        err.print("there is no dead letter of this number")
        sys.exit(EXIT_NONE)
    payload = found.stored.payload.decode(errors="replace")
    if as_json:
        print_json({"letter": found.letter, "payload": payload})
        return
    out.print(_line(found.letter), markup=False)
    for name in ("detail", "subject", "original", "trace"):
        if said := getattr(found.letter, name):
            out.print(f"  {name}: {said}", markup=False)
    out.print(payload, markup=False)


@app.command()
@_of_letters
def triage(
    wanted: Filter,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Count letters by class and provider code; codes that no table names come first: somebody has to look at them."""

    async def run(broker: Broker) -> list[Any]:
        from engine.letters.reading import letters
        from engine.letters.triage import grouped

        return grouped([letter async for letter, _ in letters(broker, wanted)])

    groups = _run(folder, run)
    for group in groups:
        if as_json:
            print_json(group)
            continue
        words = [group.channel or group.kind, group.cls, group.provider, group.code]
        about = " · ".join(word for word in words if word)
        flag = "" if group.known else "  [unknown code: look at it]"
        times = f"{group.first_at:%Y-%m-%d %H:%M} to {group.last_at:%Y-%m-%d %H:%M}"
        out.print(
            f"{group.count:>7}  {about}{flag}  {times}  tenants: {group.tenants}  e.g. {group.example}", markup=False
        )
    if not groups:
        err.print("there is no such dead letter")


@app.command()
@_of_letters
def replay(
    wanted: Filter,
    seqs: Seqs = None,
    everything: All = False,
    in_doubt: Annotated[
        bool, typer.Option("--in-doubt", help="Also what may have been sent: people may get it twice.")
    ] = False,
    per_second: Annotated[
        float, typer.Option("--per-second", help="So many letters a second at most.", min=0.1, max=1000)
    ] = 50.0,
    limit: Limit = 1_000_000,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Have the jobs and events of letters tried again, by what holds now; each once, however often this is called."""
    _check_named(seqs, wanted, everything=everything)

    async def run(stores: Stores) -> Counter[Fate]:
        from functools import partial

        from engine.dispatch.claims import release
        from engine.jobs.redisclaims import RedisClaims
        from engine.letters.replaying import Replays
        from projections.deliveries.ends import JobEnds

        ends = JobEnds(stores.pool, stores.broker, stores.partitions)
        claims = RedisClaims(stores.redis)
        replays = Replays(stores.broker, ends, claims, partial(release, stores.redis))
        try:
            return await _each(
                stores.broker, seqs, wanted, limit, per_second, lambda found: replays.replay(found, in_doubt=in_doubt)
            )
        finally:
            await claims.close()

    _report(_run_with_stores(folder, run), as_json=as_json)


@app.command()
@_of_letters
def drop(
    wanted: Filter,
    seqs: Seqs = None,
    everything: All = False,
    limit: Limit = 1_000_000,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Remove letters for good: what they hold is never delivered."""
    _check_named(seqs, wanted, everything=everything)

    async def run(broker: Broker) -> Counter[Fate]:
        from engine.letters.replaying import PER_SECOND_MAX, dropped

        return await _each(broker, seqs, wanted, limit, PER_SECOND_MAX, lambda found: dropped(broker, found.letter.seq))

    _report(_run(folder, run), as_json=as_json)


async def _each(
    broker: Broker,
    seqs: list[int] | None,
    wanted: Filter,
    limit: int,
    per_second: float,
    act: Callable[[Found], Awaitable[Fate]],
) -> Counter[Fate]:
    """Do it with each letter that is there now, at a rate; what became of how many."""
    from engine.letters.replaying import paced

    fates: Counter[Fate] = Counter()
    with stages() as progress:
        chosen = [seq async for seq in _numbers(broker, seqs, wanted, limit)]
        async with contextlib.aclosing(paced(_letters(broker, chosen), per_second)) as found:
            async for one in found:
                fates[await act(one)] += 1
                progress("letters", fates.total(), len(chosen))
    if missing := len(chosen) - fates.total():
        fates["gone"] += missing
    return fates


async def _numbers(broker: Broker, seqs: list[int] | None, wanted: Filter, limit: int) -> AsyncIterator[int]:
    """Which letters: those that are there now, so that one which is written because it died again is left for the next time."""
    from engine.letters.reading import letters

    if seqs:
        for seq in seqs[:limit]:
            yield seq
        return
    async with contextlib.aclosing(letters(broker, wanted)) as found:
        async for letter, _ in found:
            yield letter.seq
            limit -= 1
            if limit <= 0:
                return


async def _letters(broker: Broker, chosen: list[int]) -> AsyncIterator[Found]:
    from engine.letters.reading import letter_at

    for seq in chosen:
        if (found := await letter_at(broker, seq)) is not None:
            yield found


def _check_named(seqs: list[int] | None, wanted: Filter, *, everything: bool) -> None:
    """Pass a command that says which letters it means. Raises InvalidSetting."""
    filtered = wanted != type(wanted)()
    if seqs and (filtered or everything):
        raise InvalidSetting("name letters by their numbers, or by what they have in common: not both")
    if not seqs and not filtered and not everything:
        raise InvalidSetting("say which letters: by number, --tenant, --channel, --class, --code, --since …, or --all")


def _line(letter: Letter) -> str:
    words = [letter.channel or letter.kind, letter.tenant, letter.user, letter.id or letter.type, letter.cls]
    words += [letter.provider, letter.code if letter.code != letter.cls else ""]
    words += ["in doubt" if letter.in_doubt else "", "" if letter.known else "unknown code"]
    return f"{letter.seq:>7}  {letter.at:%Y-%m-%d %H:%M:%S}  " + " · ".join(filter(None, words))


def _report(fates: Counter[Fate], *, as_json: bool) -> None:
    if as_json:
        print_json(dict(fates))
        return
    said = {
        "replayed": "replayed",
        "dropped": "dropped",
        "sent": "removed: sent since the letter was written",
        "before": "removed: tried, replayed or ended otherwise since",
        "in_doubt": "left: may have been sent, say --in-doubt to send them all the same",
        "gone": "gone before",
        "unreadable": "left: nobody can tell where they belong",
        "refused": "left: the broker never takes them, as they are too large",
    }
    for fate, count in sorted(fates.items()):
        out.print(f"{count:>7}  {said[fate]}", markup=False)
    if not fates:
        err.print("there is no such dead letter")


def _run(folder: Path, ask: Callable[[Broker], Awaitable[T]]) -> T:
    import uvloop

    from engine.broker.jetstream import connect

    async def run() -> T:
        broker = await connect(nats_settings(folder, "seamark-dlq"))
        try:
            return await ask(broker)
        finally:
            await broker.close()

    return uvloop.run(run())


def _run_with_stores(folder: Path, ask: Callable[[Stores], Awaitable[T]]) -> T:
    import uvloop

    from ops.cli.stores import stores

    async def run() -> T:
        async with stores(folder, "seamark-dlq") as found:
            return await ask(found)

    return uvloop.run(run())
