"""`plan`: how fast a planner decides about a log of records that each go by push, too, against the fold of unread counts.

A planner stores two messages for each record where the fold stores none, so the broker alone may be slower than the fold. That is
measured, too: the same messages, ready made, in batches as large as the planner's, and nothing else to do.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redis.asyncio import Redis

from bench.load import PARTITIONS, TENANT, bare_records, commit_all, user_name
from bench.machine import cpu_seconds
from bench.rebuild import reached
from bench.report import per_unit, progress
from bench.stack import Stack, stack
from engine.broker import wire
from engine.broker.jetstream import Broker, Outgoing
from engine.directory.changing import Directory
from engine.directory.push_tokens import NewToken, register_token
from engine.limits import BATCH_MESSAGES_MAX
from engine.log.incarnations import epoch_of
from engine.log.writer import read_mark
from engine.planner import position
from engine.postgres import lazy_pool
from seamark.protocol.records import epoch_line
from seamark.protocol.subjects import JOBS_STREAM, RECEIPTS_STREAM

WANTED_RATIO = 0.5
SECONDS_MAX = 300.0
USERS_AT_ONCE = 500

LOOK_SECONDS = 0.1
"""How often the marks are looked at: asking the broker for all of them costs it as much as storing some records."""

SAMPLE = 20_000
"""How many records' receipts and jobs are read back for the broker's limit; they are stored again as often as it takes."""

READ_BYTES_MAX = 4 << 20

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
            watched = _watched(bench, pids)
            unread = await _rate(lambda wanted: reached(redis, counts, wanted), watched, records)
        await bench.start_postgres()
        await _fill(bench, users)
        progress("planner")
        async with bench.role("planner") as pids:
            watched = _watched(bench, pids)
            planned = await _rate(lambda wanted: _planned(bench, counts, wanted), watched, records)
        jobs, _ = await bench.broker.count(JOBS_STREAM, "job.push.>")
        if jobs != records:
            raise RuntimeError(f"{jobs} jobs were made of {records} records")
        progress("the broker alone, with what the planner has stored")
        limit, batches_of = await _limit(bench, records)
    return {
        "result": {"records_per_second": planned.per_second},
        "yardstick": {"records_per_second": unread.per_second},
        "limit": {"records_per_second": limit.per_second, "messages_per_batch": batches_of},
        "ratio": _ratio(planned, unread),
        "ratio_to_limit": _ratio(planned, limit),
        "limit_to_fold": _ratio(limit, unread),
        "wanted": {"ratio": WANTED_RATIO},
        "cpu_us_per_record": {"planner": planned.cpu_us["role"], "projector": unread.cpu_us["role"]},
        "servers_cpu_us_per_record": {
            name: {server: cpu for server, cpu in one.cpu_us.items() if server != "role"}
            for name, one in {"planner": planned, "projector": unread, "limit": limit}.items()
        },
    }


class _Rate(NamedTuple):
    """Records a second, and processor time for each in microseconds, by who has spent it."""

    per_second: int
    cpu_us: dict[str, float]


def _watched(bench: Stack, role: Sequence[int]) -> dict[str, Sequence[int]]:
    return {"role": role, "broker": bench.pids("broker"), "valkey": bench.pids("valkey")}


async def _rate(reached: Callable[[int], Awaitable[int]], watched: Mapping[str, Sequence[int]], records: int) -> _Rate:
    """Of a process, behind the first tenth of the records.

    Before that it takes logs over and meets each user for the first time: a planner reads his profile from PostgreSQL.
    """
    first = await reached(max(1, records // 10))
    began, spent = time.perf_counter(), _spent(watched)
    work = await reached(records) - first
    return _rate_of(work, time.perf_counter() - began, watched, spent)


def _spent(watched: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {name: cpu_seconds(pids) for name, pids in watched.items()}


def _rate_of(work: int, seconds: float, watched: Mapping[str, Sequence[int]], before: Mapping[str, float]) -> _Rate:
    cpu = {name: per_unit(spent - before[name], work) for name, spent in _spent(watched).items()}
    return _Rate(round(work / seconds), cpu)


async def _limit(bench: Stack, records: int) -> tuple[_Rate, dict[str, int]]:
    """What the broker takes of receipts and jobs, and how many of either are in a batch, as they were in the planner's.

    Of each log one batch is in flight: receipts, then the jobs of the same records.
    """
    broker = bench.broker
    receipts, receipts_a_batch = await _read_back(broker, RECEIPTS_STREAM, "rcpt.>", min(records, SAMPLE))
    jobs, jobs_a_batch = await _read_back(broker, JOBS_STREAM, "job.push.>", min(records, SAMPLE))
    epoch = epoch_line(epoch_of(await broker.stream(JOBS_STREAM)))

    async def one_log(rounds: int) -> None:
        at = 0
        for _ in range(rounds):
            part = [(at + number) % len(jobs) for number in range(jobs_a_batch)]
            for start in range(0, jobs_a_batch, receipts_a_batch):
                some = part[start : start + receipts_a_batch]
                await broker.commit([receipts[one % len(receipts)] for one in some], timeout_seconds=60)
            await broker.commit([jobs[one] for one in part], lines=epoch, timeout_seconds=60)
            at += jobs_a_batch

    rounds = max(1, records // PARTITIONS // jobs_a_batch)
    watched = {"broker": bench.pids("broker")}
    began, spent = time.perf_counter(), _spent(watched)
    await asyncio.gather(*(one_log(rounds) for _ in range(PARTITIONS)))
    rate = _rate_of(rounds * PARTITIONS * jobs_a_batch, time.perf_counter() - began, watched, spent)
    return rate, {"receipts": receipts_a_batch, "jobs": jobs_a_batch}


async def _read_back(broker: Broker, stream: str, subject: str, count: int) -> tuple[list[Outgoing], int]:
    """Messages of a stream, ready to be stored again, and how many of them a batch had on average."""
    found: list[Outgoing] = []
    batches = set[bytes | None]()
    seq = 1
    while len(found) < count:
        page = await broker.next_by_subject(stream, subject, seq, max_bytes=READ_BYTES_MAX)
        if not page.records:
            break
        found += [Outgoing(one.subject, one.payload) for one in page.records]
        batches |= {wire.header(one.headers, b"Nats-Batch-Id") for one in page.records}
        seq = page.records[-1].seq + 1
    return found, min(BATCH_MESSAGES_MAX, round(len(found) / len(batches)))


def _ratio(one: _Rate, other: _Rate) -> float | None:
    """None: of the other there were so few that all were done between two looks."""
    return round(one.per_second / other.per_second, 3) if other.per_second else None


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
