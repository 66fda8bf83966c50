"""`later`: how long events take that all are due at once."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.load import PARTITIONS, TENANT, Copies, broker_limit, commit_all, event
from bench.machine import cpu_seconds
from bench.report import per_unit, progress
from bench.stack import stack
from chaos.load import drained
from engine.broker.jetstream import Outgoing

ROLES = ("dispatcher", "broker", "valkey")
WANTED_SECONDS = 3.0


async def run(
    *,
    events: int = 10_000,
    users: int = 2_000,
    ahead_seconds: float = 15.0,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        progress("the broker's own limit")
        before = await broker_limit(bench.broker, events, users)
        await bench.start("dispatcher")
        copies = Copies(bench.broker, f"live.*.{TENANT}.>")
        await copies.ready()
        due = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=ahead_seconds)
        progress(f"publishing {events} events for {due}")
        await commit_all(bench.broker, [_later(event(n, n % users, due.timestamp()), due) for n in range(events)])
        while not await drained(bench.broker, PARTITIONS):
            await asyncio.sleep(0.05)
        put_off = (due - datetime.now(UTC)).total_seconds()
        if put_off < 1 and not hurry:
            raise RuntimeError("it took too long to put the events off: give them more time (--ahead)")
        progress(f"all wait, {put_off:.1f} s before they are due")
        await asyncio.sleep(max(0.0, due.timestamp() - time.time()))
        cpu = {role: cpu_seconds(bench.pids(role)) for role in ROLES}
        await copies.until(1)
        first = time.time() - due.timestamp()
        await copies.until(events)
        last = time.time() - due.timestamp()
        copies.close()
        spent = {role: per_unit(cpu_seconds(bench.pids(role)) - cpu[role], events) for role in ROLES}
        after = await broker_limit(bench.broker, events, users, tenant="yardstick2")
    limit = (before.seconds + after.seconds) / 2
    return {
        "result": {"first_seconds": round(first, 3), "last_seconds": round(last, 3)},
        "wanted": {"last_seconds": WANTED_SECONDS},
        "yardstick": {"broker_seconds": round(limit, 3)},
        "ratio": round(last / limit, 3),
        "cpu_us_per_notification": spent,
    }


def _later(message: Outgoing, due: datetime) -> Outgoing:
    """The same event, not to be sent before."""
    send_at = b',"send_at":"%b"}' % due.isoformat().encode()
    return Outgoing(message.subject, message.payload[:-1] + send_at, message.headers)
