"""`resume`: from `hello` to `live` when little or nothing was missed, and 100 000 missed records while others go on."""

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.devices import Broken, Devices, Spread, bare_handshakes, devices, settled
from bench.load import PARTITIONS, TENANT, TRACE, commit_all, user_name
from bench.machine import cpu_seconds
from bench.publisher import Settings
from bench.report import per_unit, progress
from bench.stack import Stack, stack
from engine.broker.jetstream import Outgoing
from seamark.protocol.subjects import encode_token, partition_of

OTHERS_PER_SECOND = 500


async def run(
    *,
    resumes: int = 2_000,
    missed: int = 100_000,
    others: int = 200,
    at_a_time: int = 4,
    others_seconds: float = 5.0,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        await bench.start("dispatcher")
        await bench.start("gateway")
        progress(f"{resumes} warm resumes, {at_a_time} at a time")
        warm = await _warm(bench, resumes, at_a_time)
        bare = await _bare(bench, resumes, at_a_time)
        progress(f"{missed} missed records, {others} others at {OTHERS_PER_SECOND}/s")
        long = await _long(bench, resumes, missed, others, others_seconds)
    p99 = warm["p99_ms"]
    return {
        "result": {"warm": warm, "long": long},
        "yardstick": {"bare_handshake": bare, "others_alone": long["others_alone"]},
        "ratio": round(warm["p50_ms"] / bare["p50_ms"], 2) if bare["p50_ms"] else None,
        "others_p99_ratio": round(long["others_during"]["p99_ms"] / max(long["others_alone"]["p99_ms"], 0.1), 2),
        "cpu_us_per_notification": long["cpu_us_per_record"],
        "wanted": {"p99_ms_at_most": 20, "p99_reached": p99 is not None and p99 <= 20},
    }


async def _warm(bench: Stack, resumes: int, at_a_time: int) -> dict[str, Any]:
    """Sessions come back one after the other, with the cursor they had; half of them have missed a record."""
    async with devices(bench, resumes) as swarm:
        await swarm.connect(cursor="")
        await settled(bench)
        await swarm.drop()
        await _publish(bench, rate=resumes // 2, users=resumes // 2, seconds=1.0)
        await settled(bench)
        await swarm.forget()
        spreads = await swarm.connect(at_a_time=at_a_time)
        facts = await swarm.expect(resumes // 2, 10)
        if facts["delivered"] != resumes // 2:
            raise Broken(f"{facts['delivered']} of {resumes // 2} missed records were replayed")
    return Spread.of(spreads, "joins").milliseconds()


async def _bare(bench: Stack, count: int, at_a_time: int) -> dict[str, Any]:
    """What a bare handshake takes at the same pace: connect to 101."""
    async with bare_handshakes(bench.folder, count, 1) as bare:
        facts = await bare.devices.connect(at_a_time=at_a_time)
    return Spread.of(facts, "handshakes").milliseconds()


async def _long(bench: Stack, first: int, missed: int, others: int, others_seconds: float) -> dict[str, Any]:
    """One device comes back after a very long time while others are served."""
    reader, epoch = first, await _epoch_of(bench, first)
    async with devices(bench, others, first=first + 1) as swarm, devices(bench, 1, first=reader) as lone:
        await swarm.connect(cursor="")
        await settled(bench)
        await _fill(bench, reader, missed)
        alone = await _others(bench, swarm, others, first + 1, others_seconds, id_from=10_000_000)
        cpu, started = {role: cpu_seconds(bench.pids(role)) for role in ("gateway", "broker")}, time.monotonic()
        paging = asyncio.create_task(_page(lone, missed, f"{epoch}.0"), name="page")
        during = await _others(bench, swarm, others, first + 1, others_seconds, id_from=20_000_000)
        seconds = await paging
        spent = {role: per_unit(cpu_seconds(bench.pids(role)) - used, missed) for role, used in cpu.items()}
    overlap = min(1.0, seconds / others_seconds)
    return {
        "missed": missed,
        "seconds": round(seconds, 2),
        "records_per_second": round(missed / seconds),
        "others_alone": alone,
        "others_during": during,
        "share_of_others_time": round(overlap, 2),
        "cpu_us_per_record": spent,
        "measured_seconds": round(time.monotonic() - started, 1),
    }


async def _page(lone: Devices, missed: int, cursor: str) -> float:
    started = time.monotonic()
    await lone.connect(cursor=cursor)
    facts = await lone.expect(missed, 60)
    if facts["delivered"] != missed:
        raise Broken(f"{facts['delivered']} of {missed} missed records were replayed")
    return time.monotonic() - started


async def _others(bench: Stack, swarm: Devices, users: int, first: int, seconds: float, id_from: int) -> dict[str, Any]:
    await swarm.forget()
    published = await _publish(
        bench, rate=OTHERS_PER_SECOND, users=users, seconds=seconds, first=first, id_from=id_from
    )
    facts = await swarm.expect(published, 30)
    if facts["delivered"] != published:
        raise Broken(f"{facts['delivered']} of {published} notifications arrived")
    return Spread.of(facts).milliseconds()


async def _publish(bench: Stack, **settings: Any) -> int:
    encoded = msgspec.json.encode(Settings(url=bench.nats.url, **settings)).decode()
    publisher = await bench.worker("publisher", encoded)
    events: int = (await publisher.fact("published", settings["seconds"] + 60))["events"]
    return events


async def _epoch_of(bench: Stack, user: int) -> str:
    state = await bench.broker.stream(f"LOG-{_partition(user)}")
    assert state.epoch is not None
    return state.epoch


def _partition(user: int) -> int:
    return partition_of(TENANT, encode_token(user_name(user)), PARTITIONS)


async def _fill(bench: Stack, user: int, count: int) -> None:
    """Records straight into the log: how they got there is another benchmark."""
    subject = f"log.{_partition(user)}.{TENANT}.{user_name(user)}"
    body = b'{"id":"m%d","kind":"notification","tenant":"default","user":"%b","data":{"text":"%b"}}'
    name = user_name(user).encode()
    await commit_all(bench.broker, [Outgoing(subject, body % (n, name, b"x" * 240), TRACE) for n in range(count)])
