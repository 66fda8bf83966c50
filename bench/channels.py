"""`channels`: how many jobs a second one worker sends by each channel, against the channel alone, which sends the same and does
nothing else."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.load import TENANT
from bench.machine import cpu_seconds
from bench.processes import Worker
from bench.report import per_unit, progress
from bench.stack import Stack, stack
from engine.channels.channel import Context, Job
from engine.channels.push.message import PushTarget
from engine.directory.changing import Directory
from engine.directory.push_tokens import NewToken, register_token
from engine.directory.users import UserFields, put_user
from engine.jobs.messages import message_of
from engine.jobs.worker import AT_A_TIME
from engine.plan.rules import Channel
from engine.postgres import lazy_pool
from engine.worker.providers import ProvidersFile
from ops.collecting import collect_rarely

CHANNELS: tuple[Channel, ...] = ("push", "email", "sms")
APP = "com.example.bench"
WANTED_RATIO = 0.6
SECONDS_MAX = 300.0
BATCH = 500


async def run(
    *, jobs: int = 10_000, users: int = 500, data: Path | None = None, sync: str | None = None, hurry: bool = False
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        await bench.start_postgres()
        providers = await bench.worker("providers", str(bench.folder / "simulated"))
        file = ProvidersFile(Path((await providers.fact("providers", 60))["file"]))
        await _fill(bench, users)
        collect_rarely()  # as the roles do: the yardstick must not be slow for want of it
        alone, sent, cpu = {}, {}, {}
        for channel in CHANNELS:
            progress(f"{channel} alone, {jobs} times")
            before = await _alone(file, channel, jobs, users)
            progress(f"{jobs} jobs of {channel}")
            sent[channel], cpu_of_worker = await _jobs(bench, providers, file, channel, jobs, users)
            after = await _alone(file, channel, jobs, users)
            alone[channel], cpu_alone = ((one + other) / 2 for one, other in zip(before, after, strict=True))
            cpu[channel] = {"worker": cpu_of_worker, "alone": round(cpu_alone, 1)}
    return {
        "result": {channel: {"jobs_per_second": round(rate)} for channel, rate in sent.items()},
        "wanted": {"ratio": WANTED_RATIO},
        "yardstick": {channel: round(rate) for channel, rate in alone.items()},
        "ratio": round(min(sent[channel] / alone[channel] for channel in CHANNELS), 3),
        "ratios": {channel: round(sent[channel] / alone[channel], 3) for channel in CHANNELS},
        "cpu_us_per_job": cpu,
    }


def _device(number: int) -> str:
    return f"{number:064x}"


def _phone(number: int) -> str:
    return f"+436641{number:07d}"


def _job(channel: Channel, number: int, users: int, prefix: str) -> Job:
    now = datetime.now(UTC)
    return Job(
        id=f"{prefix}{number}",
        tenant=TENANT,
        user=f"user{number % users}",
        type="bench.sent",
        channel=channel,
        target="phone" if channel == "push" else "",
        first_at=now,
        stored_at=now,
        requested=True,
        data={"title": "Shipped", "text": "Your order is on its way"},
    )


async def _fill(bench: Stack, users: int) -> None:
    assert bench.postgres is not None
    pool = await lazy_pool(bench.postgres.url, 2, connect_seconds=10)
    try:
        names = [f"user{number}" for number in range(users)]
        async with Directory(pool).changing(TENANT, names, 60) as change:
            for number, name in enumerate(names):
                await put_user(change, name, UserFields(email=f"{name}@example.com", phone=_phone(number)))
                await register_token(change, name, "phone", NewToken(platform="apns", token=_device(number), app=APP))
    finally:
        pool.terminate()


async def _alone(file: ProvidersFile, channel: Channel, jobs: int, users: int) -> tuple[float, float]:
    """Sends a second of the channel itself, as many at a time as a worker has, and microseconds of processor time for each."""
    providers = file.providers(channel)
    [provider] = [one for one in providers if one.platform in ("", "apns")]
    context, numbers = Context(now=datetime.now(UTC)), iter(range(jobs))

    def target(number: int) -> Any:
        user = number % users
        match channel:
            case "push":
                return PushTarget(id="phone", platform="apns", token=_device(user), app=APP)
            case "email":
                return f"user{user}@example.com"
        return _phone(user)

    async def one_after_the_other() -> None:
        for number in numbers:
            job = _job(channel, number, users, "alone")
            rendered = provider.channel.render(job, context)
            outcome = await provider.channel.send(rendered, target(number), key=job.key, deadline_seconds=30)
            assert outcome.kind == "ok", outcome

    began, spent = time.monotonic(), time.process_time()
    await asyncio.gather(*(one_after_the_other() for _ in range(AT_A_TIME)))
    seconds, spent = time.monotonic() - began, time.process_time() - spent
    await asyncio.gather(*(one.channel.close() for one in providers))
    return jobs / seconds, per_unit(spent, jobs)


async def _jobs(
    bench: Stack, providers: Worker, file: ProvidersFile, channel: Channel, jobs: int, users: int
) -> tuple[float, float]:
    """Jobs a second of one worker, and its processor time for each, in microseconds."""
    made = [message_of(_job(channel, number, users, "job")) for number in range(jobs)]
    for start in range(0, jobs, BATCH):
        await bench.broker.commit(made[start : start + BATCH], timeout_seconds=30)
    before = await _accepted(providers, channel)
    async with bench.role("worker", "--channel", channel, SEAMARK_PROVIDERS=str(file.path)) as pids:
        # Only what is behind the first batch counts: connections are made, templates and profiles read.
        first = max(1, jobs // 10)
        await _until(lambda: _reached(providers, channel, before + first))
        began, spent, counted = time.monotonic(), cpu_seconds(pids), await _accepted(providers, channel)
        await _until(lambda: _reached(providers, channel, before + jobs))
        seconds, spent = time.monotonic() - began, cpu_seconds(pids) - spent
        measured = before + jobs - counted
    return measured / seconds, per_unit(spent, measured)


async def _accepted(providers: Worker, channel: Channel) -> int:
    await providers.command("count")
    return int((await providers.fact("accepted", 30))[channel])


async def _reached(providers: Worker, channel: Channel, count: int) -> bool:
    return await _accepted(providers, channel) >= count


async def _until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not await check():
            await asyncio.sleep(0.02)
