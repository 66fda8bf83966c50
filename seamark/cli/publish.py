"""`seamark publish`: one event, stored before the command ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from engine.errors import InvalidEvent
from seamark.cli.output import out, print_json
from seamark.cli.target import DATA_FOLDER, Folder, Json, Tenant, nats_settings


def publish(
    to: Annotated[list[str], typer.Option("--to", help="User; repeat for several.")],
    type: Annotated[str, typer.Option("--type", help="Dot-separated words, such as order.shipped.")] = "demo.hello",
    data: Annotated[str, typer.Option("--data", help="JSON shown to the user, or @file.")] = "{}",
    id: Annotated[str | None, typer.Option("--id", help="Event id; publishing it again adds nothing.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Ordering key; the user by default.")] = None,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Publish an event and wait until it is stored."""
    import uvloop

    from seamark import Publisher

    body = _data(data)
    settings = nats_settings(folder, "seamark-publish")

    async def run() -> Any:
        async with Publisher(
            nats_url=settings.url,
            user=settings.user,
            password=settings.password,
            credentials_file=settings.credentials_file,
            inbox_prefix=settings.inbox_prefix,
            tenant=tenant or "default",
        ) as publisher:
            return await publisher.publish(to=to, type=type, data=body, id=id, key=key)

    published = uvloop.run(run())
    if as_json:
        print_json({"event_id": published.event_id, "seq": published.seq, "duplicate": published.duplicate})
    elif published.duplicate:
        out.print(f"[yellow]already stored[/] as event {published.event_id}")
    else:
        out.print(f"[green]stored[/] event {published.event_id} at {published.seq}")


def _data(text: str) -> Any:
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidEvent("data", f"--data: {error}") from error
    try:
        return msgspec.json.decode(text.encode())
    except msgspec.DecodeError as error:
        raise InvalidEvent("data", f"""--data is not JSON ({error}); try --data '{{"text":"hi"}}'""") from error
