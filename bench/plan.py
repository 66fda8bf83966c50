"""`plan`: how fast a planner decides about a log of records that each go by push, too, against the fold of unread counts."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from bench.load import TENANT, bare_records, commit_all, user_name
from bench.machine import cpu_seconds
from bench.rebuild import reached
from bench.report import per_unit, progress
from bench.stack import Stack, stack
from engine.directory.changing import Directory
from engine.directory.push_tokens import NewToken, register_token
from engine.log.writer import read_mark
from engine.planner import position
from engine.postgres import lazy_pool
from seamark.protocol.subjects import JOBS_STREAM

WANTED_RATIO = 0.5
SECONDS_MAX = 300.0
USERS_AT_ONCE = 500

LOOK_SECONDS = 0.1
"""How often the marks are looked at: asking the broker for all of them costs it as much as storing some records."""

_PLAN = b'{"inapp":{"when":"now","why":"requested"},"push":{"when":"now","why":"requested"}}'


async def run(
    *,
    records: int = 100_000,
    users: int = 2_000,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        progress(f"writing {records} records of {users} users")
        batches = bare_records(records, users, TENANT, plan=_PLAN)
        await asyncio.gather(*(commit_all(bench.broker, messages) for messages in batches.values()))
        counts = {p: len(messages) for p, messages in batches.items()}
        progress("unread")
        async with bench.role("projector") as pids, Redis.from_url(bench.valkey.url) as redis:
            unread = await _rate(lambda wanted: reached(redis, counts, wanted), pids, records)
        await bench.start_postgres()
        await _fill(bench, users)
        progress("planner")
        async with bench.role("planner") as pids:
            planned = await _rate(lambda wanted: _planned(bench, counts, wanted), pids, records)
        jobs, _ = await bench.broker.count(JOBS_STREAM, "job.push.>")
        if jobs != records:
            raise RuntimeError(f"{jobs} jobs were made of {records} records")
    return {
        "result": {"records_per_second": planned["records_per_second"]},
        "yardstick": {"records_per_second": unread["records_per_second"]},
        "ratio": _ratio(planned["records_per_second"], unread["records_per_second"]),
        "wanted": {"ratio": WANTED_RATIO},
        "cpu_us_per_record": {"planner": planned["cpu_us_per_record"], "projector": unread["cpu_us_per_record"]},
    }


async def _rate(reached: Callable[[int], Awaitable[int]], pids: Sequence[int], records: int) -> dict[str, float]:
    """Records a second of a process, and its processor time for each, behind the first tenth of them.

    Before that it takes logs over and meets each user for the first time: a planner reads his profile from PostgreSQL.
    """
    first = await reached(max(1, records // 10))
    began, spent = time.perf_counter(), cpu_seconds(pids)
    work = await reached(records) - first
    seconds, spent = time.perf_counter() - began, cpu_seconds(pids) - spent
    return {"records_per_second": round(work / seconds), "cpu_us_per_record": per_unit(spent, work)}


def _ratio(planned: float, folded: float) -> float | None:
    """None: so few were folded that all were between two looks."""
    return round(planned / folded, 3) if folded else None


async def _planned(bench: Stack, counts: dict[int, int], wanted: int) -> int:
    """How many records are planned, once it is `wanted` or more; logs hold nothing else here, so marks count them."""
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            marks = await asyncio.gather(*(read_mark(bench.broker, position.marked(p)) for p in counts))
            planned = sum(one.mark.seq for one in marks if one.mark is not None)
            if planned >= wanted:
                return planned
            await asyncio.sleep(LOOK_SECONDS)


async def _fill(bench: Stack, users: int) -> None:
    """Give each user a device."""
    assert bench.postgres is not None
    pool = await lazy_pool(bench.postgres.url, 2, connect_seconds=10)
    names = [user_name(number) for number in range(users)]
    try:
        for start in range(0, users, USERS_AT_ONCE):
            some = names[start : start + USERS_AT_ONCE]
            async with Directory(pool).changing(TENANT, some, 60) as change:
                for name in some:
                    token = NewToken(platform="apns", token=name.encode().hex(), app="com.example.bench")
                    await register_token(change, name, "phone", token)
    finally:
        pool.terminate()
