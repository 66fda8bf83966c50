"""`seamark broadcast`: one message to all who are connected now."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ops.cli.event_fields import event_of_options
from ops.cli.output import out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, nats_settings


def broadcast(
    type: Annotated[str, typer.Option("--type", help="Dot-separated words, such as system.maintenance.")],
    data: Annotated[str | None, typer.Option("--data", help="JSON shown to users, or @file; {}.")] = None,
    id: Annotated[str | None, typer.Option("--id", help="Id that devices see; random by default.")] = None,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show a message to all of a tenant's users who are connected now. It is stored nowhere: who comes later never sees it."""
    import uvloop

    given = event_of_options({"to": ["everybody"], "type": type, "data": data, "id": id, "tenant": tenant})
    said = uvloop.run(_broadcast(nats_settings(folder, "seamark-broadcast"), tenant or "default", given))
    if as_json:
        print_json({"id": said})
    else:
        out.print(f"[green]sent[/] broadcast {said}")


async def _broadcast(settings: Any, tenant: str, given: dict[str, Any]) -> str:
    from seamark import Publisher

    async with Publisher(
        nats_url=settings.url,
        user=settings.user,
        password=settings.password,
        credentials_file=settings.credentials_file,
        inbox_prefix=settings.inbox_prefix,
        tenant=tenant,
    ) as publisher:
        return await publisher.broadcast(type=given["type"], data=given.get("data"), id=given.get("id"))
