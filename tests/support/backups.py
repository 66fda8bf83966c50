"""A stream's backup: its store on disk while the server is down (quick, with consumers), or as the `nats` command makes it."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

from engine.broker.jetstream import Broker
from ops.dev.servers import NatsServer


def folder_of(server: NatsServer, stream: str) -> Path:
    """Where a server without accounts keeps a stream."""
    return server.data / "store" / "jetstream" / "$G" / "streams" / stream


def take(server: NatsServer, stream: str, backup: Path) -> None:
    """Copy a stream as it is now; the server is restarted."""
    server.stop()
    shutil.copytree(folder_of(server, stream), backup)
    server.start()


def put_back(server: NatsServer, stream: str, backup: Path) -> None:
    """Make a stream what it was; the server is restarted."""
    server.stop()
    shutil.rmtree(folder_of(server, stream))
    shutil.copytree(backup, folder_of(server, stream))
    server.start()


async def snapshot(broker: Broker, stream: str) -> tuple[dict[str, Any], list[bytes]]:
    """What `nats stream backup` writes: `backup.json`, and the chunks of the archive. Without consumers, as by default."""
    inbox, chunks, whole = broker.nc.new_inbox(), [], asyncio.Event()

    def on_chunk(_subject: bytes, reply: bytes, _headers: bytes, payload: bytes) -> None:
        if not payload:
            whole.set()
            return
        chunks.append(payload)
        if reply:
            broker.publish(reply)

    subscription = broker.subscribe(inbox, on_chunk)
    try:
        described = await broker.api(f"STREAM.SNAPSHOT.{stream}", {"deliver_subject": inbox, "no_consumers": True})
        async with asyncio.timeout(30):
            await whole.wait()
    finally:
        subscription.unsubscribe()
    return {"config": described["config"], "state": described["state"]}, chunks


async def restore(broker: Broker, backup: dict[str, Any], chunks: list[bytes]) -> None:
    """What `nats stream restore` does; a stream of that name must be gone."""
    answer = await broker.api(f"STREAM.RESTORE.{backup['config']['name']}", backup)
    for chunk in (*chunks, b""):
        await broker.request(answer["deliver_subject"], chunk, timeout_seconds=10)
