"""`sustained`: the rate that is held from the publisher to devices that acknowledge, and what a notification costs."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from bench.behind import Behind
from bench.course import Course
from bench.devices import Broken, Devices, Spread, devices, settled
from bench.load import PARTITIONS, broker_limit
from bench.machine import cpu_seconds
from bench.publisher import Settings
from bench.report import per_unit, progress
from bench.stack import Stack, stack
from engine.dispatch.source import EVENTS
from engine.log.writer import read_mark
from seamark.protocol.subjects import EVENTS_STREAM

HELD_P99_SECONDS = 0.5
LAG_MAX = 1000
DRAIN_SECONDS = 30.0
LAG_EVERY_SECONDS = 1.0
PROJECTIONS_SECONDS = 60.0
"""To fold what was stored, once the load is over."""

ROUNDS = "seamark_dispatcher_delay_seconds_count"
RESETS = "seamark_partition_resets_total"
ROLES = ("broker", "valkey", "postgres", "dispatcher", "gateway", "projector")


class Lag:
    """How many of its events lay beyond the position of the dispatcher's slowest partition, at worst.

    Positions are sequences of the whole stream; users, and so events, are spread evenly over the partitions.
    """

    def __init__(self, behind: Behind | None) -> None:
        self.highest = 0
        self._recent = 0
        self._behind = behind

    def recent(self) -> int:
        """The worst since this was last asked."""
        found, self._recent = self._recent, 0
        return found

    async def watch(self, bench: Stack) -> None:
        """Look every second, at the projections, too."""
        while True:
            if self._behind is not None:
                await self._behind.look()
            last = (await bench.broker.stream(EVENTS_STREAM)).last_seq
            for partition in range(PARTITIONS):
                found = await read_mark(bench.broker, EVENTS.marked(partition, partition))
                self._recent = max(self._recent, (last - (found.mark.seq if found.mark else 0)) // PARTITIONS)
            self.highest = max(self.highest, self._recent)
            await asyncio.sleep(LAG_EVERY_SECONDS)


async def run(
    *,
    rates: list[int],
    sockets: int = 2_000,
    seconds: float = 15.0,
    gateways: int = 1,
    acks: bool = True,
    batches_per_second: int = 50,
    projections: bool = False,
    follow_one_in: int = 0,
    stretch_seconds: float = 60.0,
    prototype: Path | None = None,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    """One run for each rate.

    Args:
        stretch_seconds: of a run that is longer each stretch of this length is shown for itself, too.
    """
    before = await _prototype(prototype, rates, sockets, seconds)
    runs = []
    for rate in rates:
        async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
            progress(f"{rate}/s to {sockets} devices for {seconds:g} s")
            runs.append(
                await _one(
                    bench,
                    rate,
                    sockets,
                    seconds,
                    gateways,
                    batches_per_second,
                    stretch_seconds,
                    acks=acks,
                    projections=projections,
                    follow_one_in=follow_one_in,
                    limit_records=2_000 if hurry else 20_000,
                )
            )
    after = await _prototype(prototype, rates, sockets, seconds)
    held = max((run["rate"] for run in runs if run["held"]), default=0)
    figures: dict[str, Any] = {
        "result": {
            "held_per_second": held,
            "sockets": sockets,
            "seconds": seconds,
            "acks": acks,
            "projections": projections,
            "follow_one_in": follow_one_in,
            "runs": runs,
        },
        "yardstick": {"broker_records_per_second": runs[-1]["broker_records_per_second"]},
        "ratio": round(held / runs[-1]["broker_records_per_second"], 4),
        "cpu_us_per_notification": runs[-1]["cpu_us_per_notification"],
    }
    if prototype is not None:
        figures["prototype"] = _compared(runs, before, after)
    return figures


async def _one(
    bench: Stack,
    rate: int,
    sockets: int,
    seconds: float,
    gateways: int,
    batches_per_second: int,
    stretch_seconds: float,
    *,
    acks: bool,
    projections: bool,
    follow_one_in: int,
    limit_records: int,
) -> dict[str, Any]:
    limit = await broker_limit(bench.broker, limit_records, sockets)
    await bench.start("dispatcher")
    if projections:
        await bench.start_postgres()
        await bench.start("projector")
    behind = Behind(bench) if projections else None
    await bench.start("gateway", gateways)
    async with devices(bench, sockets, acks=acks) as swarm:
        await swarm.connect(cursor="")
        await settled(bench)
        await _warm(bench, swarm, sockets)
        pids = {role: bench.pids(role) for role in ROLES} | {"devices": swarm.worker.pids}
        cpu = {role: cpu_seconds(found) for role, found in pids.items()}
        rounds, resets = await bench.metric("dispatcher", ROUNDS), await bench.metric("dispatcher", RESETS)
        settings = Settings(
            url=bench.nats.url,
            rate=rate,
            users=sockets,
            seconds=seconds,
            id_from=sockets,
            batches_per_second=batches_per_second,
            follow_one_in=follow_one_in,
        )
        publisher = await bench.worker("publisher", msgspec.json.encode(settings).decode())
        lag = Lag(behind)
        watch = asyncio.create_task(lag.watch(bench), name="lag")
        publishing = asyncio.create_task(publisher.fact("published", seconds + 60), name="published")
        course = Course(swarm, pids, lag.recent)
        await course.follow(publishing, stretch_seconds)
        published = publishing.result()
        facts = await swarm.expect(published["events"], DRAIN_SECONDS)
        rounds = await bench.metric("dispatcher", ROUNDS) - rounds
        resets = await bench.metric("dispatcher", RESETS) - resets
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        caught_up = await behind.over(PROJECTIONS_SECONDS) if behind is not None else None
        spent = {role: cpu_seconds(found) - cpu[role] for role, found in pids.items()}
    spread, delivered = Spread.of(facts), facts["delivered"]
    p99 = spread.at(0.99)
    on_time = published["seconds"] < seconds * 1.05 + 0.5
    whole = delivered == published["events"]
    lags = {"dispatcher": lag.highest, **(behind.highest if behind is not None else {})}
    return {
        "rate": rate,
        "held": bool(
            whole and on_time and p99 is not None and p99 <= HELD_P99_SECONDS and max(lags.values()) < LAG_MAX
        ),
        "published": published["events"],
        "publish_seconds": round(published["seconds"], 2),
        "delivered": delivered,
        **spread.milliseconds(),
        "events_per_round": round(delivered / max(rounds, 1), 1),
        "reading_resets": int(resets),
        "lag_max": lags,
        **({"projections_caught_up_after_seconds": caught_up} if projections else {}),
        "broker_records_per_second": round(limit.per_second),
        "cpu_us_per_notification": {role: per_unit(used, delivered) for role, used in spent.items() if pids[role]},
        **({"course": course.stretches} if course.stretches else {}),
    }


async def _warm(bench: Stack, swarm: Devices, sockets: int) -> None:
    """One notification for each device: subscriptions, subjects and positions are known before anything is measured."""
    settings = Settings(url=bench.nats.url, rate=sockets, users=sockets, seconds=1.0)
    await swarm.forget()
    publisher = await bench.worker("publisher", msgspec.json.encode(settings).decode())
    published = await publisher.fact("published", 60)
    facts = await swarm.expect(published["events"], DRAIN_SECONDS)
    if facts["delivered"] != published["events"]:
        raise Broken(f"{facts['delivered']} of {published['events']} notifications arrived before the load began")
    await swarm.forget()


async def _prototype(path: Path | None, rates: list[int], sockets: int, seconds: float) -> list[dict[str, Any]]:
    """The naive pipeline on this machine in these minutes: one run for each rate."""
    if path is None:
        return []
    progress(f"{path.name} at {rates}")
    arguments = ["--rates", ",".join(map(str, rates)), "--sockets", str(sockets), "--seconds", str(int(seconds))]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(path), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout((seconds + 40) * len(rates) + 60):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    return [json.loads(line) for line in output.splitlines() if line.startswith(b"{")]


def _compared(runs: list[dict[str, Any]], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours beside the naive pipeline's, rate by rate, its two runs averaged."""
    theirs = before + after
    held = max((run["rate"] for run in theirs if run["held"]), default=0)
    mine = max((run["rate"] for run in runs if run["held"]), default=0)
    ratios: dict[str, dict[str, float]] = {}
    for run in runs:
        same = [other["cpu_us_per_notification"] for other in theirs if other["rate"] == run["rate"]]
        if same:
            ratios[str(run["rate"])] = {
                role: round(run["cpu_us_per_notification"][role] * len(same) / sum(other[role] for other in same), 2)
                for role in ("dispatcher", "gateway", "broker")
            }
    return {
        "before": before,
        "after": after,
        "held_per_second": held,
        "held_ratio": round(mine / held, 2) if held else None,
        "cpu_ratios_by_rate": ratios,
    }
