"""Rebuilds of the tables in PostgreSQL, for `rebuild`: beside the live version, as the command makes them."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncpg

from bench.load import PARTITIONS, TENANT, commit_all
from bench.machine import cpu_seconds
from bench.report import per_unit, progress
from engine.broker.jetstream import Broker, Outgoing
from ops.collecting import collect_rarely
from ops.dev.servers import Postgres
from ops.migrate import migrate
from projections.rebuild.tables import Rebuild
from seamark.protocol.subjects import encode_token, log_stream, partition_of, receipt_subject

RANGE = 10
"""Records that one receipt of a gateway covers here: three a second, told once a second, from a few devices."""


async def rebuild_tables(broker: Broker, users: int, receipts: int, data: Path | None) -> dict[str, Any]:
    """Records per second of `inbox` and `deliveries`; the logs must be full already."""
    await write_receipts(broker, users, receipts)
    collect_rarely()  # as `seamark rebuild` does
    with tempfile.TemporaryDirectory(prefix="seamark-bench-", dir=data) as folder:
        server = Postgres(Path(folder) / "postgres")
        server.start()
        try:
            await migrate(server.url)
            async with asyncpg.create_pool(server.url, min_size=1, max_size=4) as pool:
                return {name: await _rebuild(broker, pool, name, server.pid) for name in ("inbox", "deliveries")}
        finally:
            server.stop()


async def _rebuild(broker: Broker, pool: asyncpg.Pool, name: str, pid: int) -> dict[str, Any]:
    progress(name)
    cpu, ours, started = cpu_seconds([pid]), time.process_time(), time.perf_counter()
    done = await Rebuild(broker, pool, name, PARTITIONS).run()
    seconds = time.perf_counter() - started
    spent = {
        "fold": per_unit(time.process_time() - ours, done.records),
        "postgres": per_unit(cpu_seconds([pid]) - cpu, done.records),
    }
    return {"records_per_second": round(done.records / seconds), "cpu_us_per_record": spent}


async def write_receipts(broker: Broker, users: int, receipts: int) -> None:
    """Acknowledgements of `RANGE` records each, spread over the users."""
    progress(f"writing {receipts} receipts")
    epochs = [(await broker.stream(log_stream(p))).epoch for p in range(PARTITIONS)]
    messages = []
    for number in range(receipts):
        user = f"user-{number % users}"
        p = partition_of(encode_token(TENANT), encode_token(user), PARTITIONS)
        after = number // users * RANGE
        body = {"user": user, "channel": "inapp", "device": "phone", "state": "acknowledged", "epoch": epochs[p],
                "after": after, "up_to": after + RANGE, "at": "2026-01-31T12:00:01Z"}  # fmt: skip
        messages.append(Outgoing(receipt_subject(p, TENANT, user), json.dumps(body).encode()))
    await commit_all(broker, messages)
