"""`campaign`: how fast a campaign goes from its table into the logs of its audience."""

import asyncio
import time
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from bench.load import TEXT, TYPE, Copies, broker_limit, user_name
from bench.machine import cpu_seconds
from bench.report import per_unit, progress
from bench.stack import TENANT, Stack, stack
from engine.campaigns.commands import Campaigns
from engine.campaigns.draft import Audience, Draft, Message

ROLES = ("pager", "dispatcher", "broker", "postgres", "valkey")
TOPIC = "news"
LOOK_SECONDS = 0.1
FINISHED_SECONDS_MAX = 60.0


async def run(
    *, users: int = 200_000, data: Path | None = None, sync: str | None = None, hurry: bool = False
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        await bench.start_postgres()
        progress("the broker's own limit")
        before = await broker_limit(bench.broker, users, users)
        sent = await send(bench, users)
        after = await broker_limit(bench.broker, users, users, tenant="yardstick2")
    limit = (before.per_second + after.per_second) / 2
    return {
        "result": {"recipients_per_second": round(users / sent["seconds"]), "looks_that_added_up": sent["looks"]},
        "yardstick": {"broker_records_per_second": round(limit)},
        "ratio": round(users / sent["seconds"] / limit, 3),
        "cpu_us_per_notification": sent["cpu_us"],
    }


async def send(bench: Stack, users: int) -> dict[str, Any]:
    """Have a topic of so many members, start a campaign and watch until the last record is republished."""
    assert bench.postgres is not None
    for role in ("dispatcher", "pager"):
        await bench.start(role)
    async with asyncpg.create_pool(bench.postgres.url, min_size=1, max_size=2) as pool:
        await pool.copy_records_to_table(
            "topic_members",
            records=[(TENANT, TOPIC, user_name(user)) for user in range(users)],
            columns=["tenant", "topic", "user_id"],
        )
        await pool.execute("ANALYZE topic_members")
        copies, campaigns = Copies(bench.broker, f"live.*.{TENANT}.>"), Campaigns(pool)
        await copies.ready()
        progress(f"a campaign to {users} users")
        message = Message(type=TYPE, data=msgspec.Raw(msgspec.json.encode({"due": 0.0, "text": TEXT})))
        cpu, started = {role: cpu_seconds(bench.pids(role)) for role in ROLES}, time.perf_counter()
        await campaigns.create(TENANT, Draft(id="bench", audience=Audience(topic=TOPIC), message=message))
        watching = asyncio.create_task(_watch(campaigns), name="watch")
        await copies.until(users)
        seconds = time.perf_counter() - started
        copies.close()
        spent = {role: per_unit(cpu_seconds(bench.pids(role)) - cpu[role], users) for role in ROLES}
        async with asyncio.timeout(FINISHED_SECONDS_MAX):
            looks = await watching
    return {"seconds": seconds, "cpu_us": spent, "looks": looks}


async def _watch(campaigns: Campaigns) -> int:
    """Look at the progress until the campaign is over; how often. Fails where its parts do not add up."""
    looks = 0
    while True:
        said = await campaigns.progress(TENANT, "bench")
        assert said.adds_up, said
        looks += 1
        if said.finished_at is not None:
            return looks
        await asyncio.sleep(LOOK_SECONDS)
