"""`seamark explain`: what would be decided about an event for a user, and why. Nothing is published."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.output import out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant

if TYPE_CHECKING:
    from engine.profiles.explanation import Explanation
    from seamark.protocol.events import Accepted


def explain(
    event: Annotated[str, typer.Option("--event", help="File with one event, as `seamark publish --file` takes it.")],
    user: Annotated[str, typer.Option("--user", help="Whose notification it would be.")],
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show by which channels an event would go to a user, when, why, and from what that was decided. Publishes nothing."""
    import uvloop

    from engine.cancels import is_cancelled
    from engine.controls.store import ControlStore
    from engine.controls.view import Controls
    from engine.directory.rules import read_rules
    from engine.plan.decisions import Facts
    from engine.plan.gathering import gathered
    from engine.profiles import explanation
    from engine.profiles.reader import read_profile
    from ops.cli.stores import stores

    accepted = _accepted(event, user, tenant)
    at = accepted.at.tenant

    async def run() -> Explanation:
        async with stores(folder, "seamark-explain") as found:
            rules = await read_rules(found.pool, at)
            profile = await read_profile(found.pool, at, user)
            kills = Controls((await ControlStore(found.broker).read()).document).drops(at, user)
            transaction, now = accepted.event.transaction_id, datetime.now(UTC)
            cancelled = transaction is not None and await is_cancelled(found.broker, at, transaction)
            notification, facts = explanation.notification_of(accepted, user), Facts(stored_at=now, cancelled=cancelled)
            return explanation.explain(gathered(notification, facts, rules, profile, kills, now))

    explained = uvloop.run(run())
    if as_json:
        print_json(explained)
    else:
        _print(explained)


def _accepted(file: str, user: str, tenant: str | None) -> Accepted:
    """The event, as if it were published for this user only."""
    from ops.cli.event_fields import read_event
    from seamark.protocol.events import accept, encode

    fields = read_event(file, {"to": [user], "tenant": tenant})
    known = {name: fields.pop(name, None) for name in ("to", "type", "data", "id")}
    key = fields.pop("ordering_key", None)
    event = encode(**known, tenant=fields.pop("tenant", None) or "default", key=key, unknown=fields)
    return accept(f"ev.0.{event.subject.partition('.')[2]}", event.payload)  # `bulk.` is another way to the same record


def _print(explained: Explanation) -> None:
    from rich.markup import escape
    from rich.table import Table

    inputs = explained.inputs
    about, profile = inputs.notification, inputs.profile
    table = Table("channel", "when", "why", "decided again", box=None, pad_edge=False)
    for channel, decision in explained.plan.items():
        again = f"{decision.again_at:%Y-%m-%d %H:%M:%S}Z as {decision.again_as}" if decision.again_at else ""
        table.add_row(f"[bold]{escape(channel)}[/]", escape(decision.when), escape(decision.why), again)
    out.print(f"[bold]{escape(about.type)}[/] for {escape(about.user)} of {escape(about.tenant)}")
    out.print(table)
    rule = f"{inputs.rule.pattern} (version {inputs.rule.version})" if inputs.rule is not None else "none"
    known = (
        f"version {profile.version}, reached by {', '.join(profile.reach) or 'nothing'}" if profile.version else "none"
    )
    for name, value in (
        ("rule", rule),
        ("category", inputs.category or "none"),
        ("priority", "critical" if inputs.critical else about.priority),
        ("profile", "deleted" if profile.deleted else known),
        ("time zone", str(inputs.zone)),
        ("tenant defaults", f"version {inputs.defaults.version}"),
        ("kill switches", ", ".join(kill.switch for kill in inputs.kills) or "none"),
    ):
        out.print(f"  [dim]{name}[/]  {escape(value)}")
