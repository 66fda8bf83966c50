"""`campaign`: how fast a campaign goes from its table into the logs of its audience, and what others notice of it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from bench.devices import Broken, Devices, Spread, devices, settled
from bench.load import TEXT, TYPE, Copies, broker_limit, user_name
from bench.machine import cpu_seconds
from bench.publisher import Settings
from bench.report import per_unit, progress
from bench.stack import Stack, stack
from engine.campaigns.commands import Campaigns
from engine.campaigns.draft import Audience, Draft, Message

ROLES = ("pager", "dispatcher", "broker", "postgres", "valkey")
SENDER = "sender"
"""The tenant of the campaign; the events of other tenants' users are those of the benchmark's own."""
TOPIC = "news"
LOOK_SECONDS = 0.1
FINISHED_SECONDS_MAX = 60.0
DEVICES = 200
RATE = 200
"""Critical events a second: one-time passwords of a busy service."""
DRAIN_SECONDS = 30.0


async def run(
    *,
    users: int = 200_000,
    seconds: float = 10.0,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    """Send one campaign alone, then others beside another tenant's critical events.

    Args:
        seconds: of critical events, without a campaign and with one, each four times: of so few events a 99th percentile is no
            more than the twentieth slowest, and one of them says little.
    """
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        await bench.start_postgres()
        for role in ("dispatcher", "pager", "gateway"):
            await bench.start(role)
        assert bench.postgres is not None
        async with asyncpg.create_pool(bench.postgres.url, min_size=1, max_size=2) as pool:
            await pool.copy_records_to_table(
                "topic_members",
                records=[(SENDER, TOPIC, user_name(user)) for user in range(users)],
                columns=["tenant", "topic", "user_id"],
            )
            await pool.execute("ANALYZE topic_members")
            progress("the broker's own limit")
            before = await broker_limit(bench.broker, users, users)
            sent = await send(bench, Campaigns(pool), "alone", users)
            after = await broker_limit(bench.broker, users, users, tenant="yardstick2")
            beside = await critical(bench, Campaigns(pool), users, seconds, turns=1 if hurry else 4)
    limit = (before.per_second + after.per_second) / 2
    return {
        "result": {
            "recipients_per_second": round(users / sent["seconds"]),
            "looks_that_added_up": sent["looks"],
            "critical_events": beside,
        },
        "yardstick": {"broker_records_per_second": round(limit)},
        "ratio": round(users / sent["seconds"] / limit, 3),
        "cpu_us_per_notification": sent["cpu_us"],
    }


async def send(bench: Stack, campaigns: Campaigns, id: str, users: int) -> dict[str, Any]:
    """Start a campaign to the topic and watch until the last record is republished."""
    copies = Copies(bench.broker, f"live.*.{SENDER}.>")
    await copies.ready()
    progress(f"a campaign to {users} users: {id}")
    message = Message(type=TYPE, data=msgspec.Raw(msgspec.json.encode({"due": 0.0, "text": TEXT})))
    cpu, started = {role: cpu_seconds(bench.pids(role)) for role in ROLES}, time.perf_counter()
    await campaigns.create(SENDER, Draft(id=id, audience=Audience(topic=TOPIC), message=message))
    watching = asyncio.create_task(_watch(campaigns, id), name="watch")
    await copies.until(users)
    seconds = time.perf_counter() - started
    copies.close()
    spent = {role: per_unit(cpu_seconds(bench.pids(role)) - cpu[role], users) for role in ROLES}
    async with asyncio.timeout(FINISHED_SECONDS_MAX):
        looks = await watching
    return {"seconds": seconds, "cpu_us": spent, "looks": looks}


async def _watch(campaigns: Campaigns, id: str) -> int:
    """Look at the progress until the campaign is over; how often. Fails where its parts do not add up."""
    looks = 0
    while True:
        said = await campaigns.progress(SENDER, id)
        assert said.adds_up, said
        looks += 1
        if said.finished_at is not None:
            return looks
        await asyncio.sleep(LOOK_SECONDS)


async def critical(bench: Stack, campaigns: Campaigns, users: int, seconds: float, *, turns: int) -> dict[str, Any]:
    """How long another tenant's critical events take to their devices: without campaigns and with them, in turn."""
    without, during, sent = [], [], []
    async with devices(bench, DEVICES) as swarm:
        await swarm.connect(cursor="")
        await settled(bench)
        await _events(
            bench, swarm, 1.0, 0
        )  # subscriptions, subjects and positions are known before anything is measured
        for turn in range(1, turns + 1):
            progress("critical events alone")
            without.append(await _events(bench, swarm, seconds, 2 * turn))
            stop = asyncio.Event()
            sending = asyncio.create_task(_send_until(bench, campaigns, users, turn, stop), name="campaigns")
            progress("critical events beside campaigns")
            before, began = sum(await bench.heads()), time.perf_counter()
            during.append(await _events(bench, swarm, seconds, 2 * turn + 1))
            sent.append((sum(await bench.heads()) - before) / (time.perf_counter() - began) - RATE)
            stop.set()
            await sending
    alone, beside = (sum(runs) / len(runs) for runs in (without, during))
    return {
        "p99_ms_without": [round(p99 * 1e3, 1) for p99 in without],
        "p99_ms_during": [round(p99 * 1e3, 1) for p99 in during],
        "during_to_without": round(beside / alone, 2),
        "campaign_records_per_second_during": [round(rate) for rate in sent],
    }


async def _send_until(bench: Stack, campaigns: Campaigns, users: int, turn: int, stop: asyncio.Event) -> None:
    """One campaign after the other, for as long as the events last."""
    number = 0
    while not stop.is_set():
        await send(bench, campaigns, f"beside-{turn}-{number}", users)
        number += 1


async def _events(bench: Stack, swarm: Devices, seconds: float, part: int) -> float:
    """The 99th percentile of the time from publishing to the device, in seconds; all of them have arrived.

    Args:
        part: of the ids, which are new ones each time.
    """
    await swarm.forget()
    settings = Settings(
        url=bench.nats.url, rate=RATE, users=DEVICES, seconds=seconds, id_from=part * 1_000_000, critical=True
    )
    publisher = await bench.worker("publisher", msgspec.json.encode(settings).decode())
    published = await publisher.fact("published", seconds + 60)
    facts = await swarm.expect(published["events"], DRAIN_SECONDS)
    p99 = Spread.of(facts).at(0.99)
    if facts["delivered"] != published["events"] or p99 is None:
        raise Broken(f"{facts['delivered']} of {published['events']} critical events arrived")
    return p99
