"""`seamark publish`: one event, stored before the command ends."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ops.cli.event_fields import event_of_options, read_event
from ops.cli.output import out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, nats_settings

TYPE = "demo.hello"
"""The type of an event that is given by options alone, without `--type`."""

KNOWN = (
    "to", "type", "data", "id", "source", "subject", "transaction_id", "time", "priority", "category",
    "semantics", "collapse_key", "expires_at", "send_at", "channels",
)  # fmt: skip
"""Fields that are arguments of `Publisher.publish` by the same name."""

Text = str | None


def publish(
    to: Annotated[list[str] | None, typer.Option("--to", help="User; repeat for several.")] = None,
    type: Annotated[Text, typer.Option("--type", help=f"Dot-separated words, such as order.shipped; {TYPE}.")] = None,
    data: Annotated[Text, typer.Option("--data", help="JSON shown to the user, or @file; {}.")] = None,
    file: Annotated[
        Text, typer.Option("--file", help="JSON object with the fields of an event, - for standard input; options win.")
    ] = None,
    id: Annotated[Text, typer.Option("--id", help="Event id; publishing it again adds nothing.")] = None,
    key: Annotated[Text, typer.Option("--key", help="Ordering key; the user by default.")] = None,
    tenant: Tenant = None,
    source: Annotated[Text, typer.Option("--source", help="Service it comes from; kept with the event.")] = None,
    subject: Annotated[Text, typer.Option("--subject", help="What it is about; kept with the event.")] = None,
    transaction_id: Annotated[
        Text, typer.Option("--transaction-id", help="What it belongs to; kept with the event.")
    ] = None,
    time: Annotated[Text, typer.Option("--time", help="When it happened, RFC 3339 with an offset.")] = None,
    priority: Annotated[Text, typer.Option("--priority", help="critical, high, normal or low.")] = None,
    category: Annotated[Text, typer.Option("--category", help="What users filter by.")] = None,
    semantics: Annotated[
        Text, typer.Option("--semantics", help="at_least_once, effectively_once, or at_most_once: never stored.")
    ] = None,
    collapse_key: Annotated[
        Text, typer.Option("--collapse-key", help="Only the newest record of a key is shown and counts as unread.")
    ] = None,
    expires_at: Annotated[
        Text, typer.Option("--expires-at", help="After it, it does not count. RFC 3339 with an offset.")
    ] = None,
    send_at: Annotated[
        Text, typer.Option("--send-at", help="When it is sent, at most 30 days ahead. RFC 3339 with an offset.")
    ] = None,
    channel: Annotated[
        list[str] | None, typer.Option("--channel", help="Only this channel, such as inapp; repeat for several.")
    ] = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Publish an event and wait until it is stored, or (`--semantics at_most_once`) sent."""
    import uvloop

    options = {
        "to": to or None,
        "type": type,
        "data": data,
        "id": id,
        "ordering_key": key,
        "tenant": tenant,
        "source": source,
        "subject": subject,
        "transaction_id": transaction_id,
        "time": time,
        "priority": priority,
        "category": category,
        "semantics": semantics,
        "collapse_key": collapse_key,
        "expires_at": expires_at,
        "send_at": send_at,
        "channels": channel or None,
    }
    event = read_event(file, options) if file is not None else event_of_options({**options, "type": type or TYPE})
    published = uvloop.run(_publish(nats_settings(folder, "seamark-publish"), event))
    if as_json:
        print_json({"event_id": published.event_id, "seq": published.seq, "duplicate": published.duplicate})
    elif published.seq is None:
        out.print(f"[green]sent[/] message {published.event_id} to who is connected; it is stored nowhere")
    elif published.duplicate:
        out.print(f"[yellow]already stored[/] as event {published.event_id}")
    else:
        out.print(f"[green]stored[/] event {published.event_id} at {published.seq}")


async def _publish(settings: Any, event: dict[str, Any]) -> Any:
    from seamark import Publisher

    known = {name: event.pop(name) for name in KNOWN if name in event}
    async with Publisher(
        nats_url=settings.url,
        user=settings.user,
        password=settings.password,
        credentials_file=settings.credentials_file,
        inbox_prefix=settings.inbox_prefix,
        tenant=event.pop("tenant", None) or "default",
    ) as publisher:
        return await publisher.publish(key=event.pop("ordering_key", None), **known, extra=event)
