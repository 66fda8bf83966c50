"""`seamark log`: what a user's log holds, straight from the stream."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ops.cli.output import err, out, print_json, readable
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, nats_settings


def log(
    user: Annotated[str, typer.Argument(help="Whose log.")],
    limit: Annotated[int, typer.Option("--limit", help="Newest records to show; 0: all.", min=0)] = 50,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Print a user's records, newest last, as the stream keeps them."""
    import uvloop

    async def run() -> None:
        from engine.broker.jetstream import connect
        from engine.log.incarnations import read_partitions
        from seamark.protocol.subjects import encode_token, log_stream, partition_of, user_subjects

        name = tenant or "default"
        broker = await connect(nats_settings(folder, "seamark-log"))
        try:
            partition = partition_of(encode_token(name), encode_token(user), await read_partitions(broker))
            stream, subject = log_stream(partition), user_subjects(partition, name, user).log
            epoch = (await broker.stream(stream)).epoch
            found = await _read(broker, stream, subject, limit)
        finally:
            await broker.close()
        _print(found, subject, f"{stream}, epoch {epoch}", as_json=as_json)

    uvloop.run(run())


async def _read(broker: Any, stream: str, subject: str, limit: int) -> list[Any]:
    """All pages; only the newest `limit` are kept while reading."""
    found: list[Any] = []
    seq = 1
    while True:
        page = await broker.next_by_subject(stream, subject, seq, timeout_seconds=10.0)
        found = (found + page.records)[-limit:]
        if not page.more:
            return found
        seq = page.records[-1].seq + 1


def _print(found: list[Any], subject: str, where: str, *, as_json: bool) -> None:
    from rich.markup import escape

    if not as_json:
        err.print(f"[dim]{subject} in {where}: {len(found)} record{'s' if len(found) != 1 else ''}[/]")
    for stored in found:
        content, record = readable(stored.payload)
        if as_json:
            print_json({"seq": stored.seq, "stored_at": stored.time, **content})
        elif record is None:
            out.print(f"[bold]{stored.seq:>8}[/]  no record: {escape(repr(stored.payload[:200]))}")
        else:
            what = record.get("type") or record.get("kind")
            text = f"{record.get('at')}  {what}  id {record.get('id')}  {record.get('data', '')}"
            # What a service wrote may hold brackets that rich would take for its own markup.
            out.print(f"[bold]{stored.seq:>8}[/]  {escape(text)}")
