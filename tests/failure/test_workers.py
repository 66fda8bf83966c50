"""Workers that are killed while providers fail: every job ends, and whatever was accepted twice was announced."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from chaos.faults import Fault, kill_one, torment
from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.channels.channel import Job
from engine.jobs.messages import message_of
from engine.jobs.retry import POLICIES
from engine.plan.rules import Channel
from engine.postgres import Pool
from engine.topology import server as topology
from ops.dev.providers import faults
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.receipts import Receipt, decode_receipt
from tests.support.chaos import SECONDS, TIMEOUT, Chaos
from tests.support.hasty import ACK_WAIT_SECONDS
from tests.support.logs import FAST, connected, eventually
from tests.support.sending import Simulated, StoresRole, a_job, known, settings_of, simulated

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]

JOBS = 20_000 if SECONDS else 120
USERS = [f"user{number}" for number in range(50)]
CHANNELS: tuple[Channel, ...] = ("push", "email", "sms", "webhook")
FINAL = {"sent", "failed", "suppressed", "expired", "cancelled", "ambiguous", "split"}
FAULTY = 0.3
"""The share of requests that meet a fault."""


class HastyRole(StoresRole):
    def command(self) -> list[str]:
        return ["tests.support.hasty"]


def sooner(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """As FAST; jobs of a worker that was killed are handed out again soon."""
    wait = {"ack_wait": int(ACK_WAIT_SECONDS * 1e9)} if config.get("ack_policy") == "explicit" else {}
    return FAST(name, config) | wait


def troubles(chaos: Chaos, codes: Sequence[tuple[int, str]], count: int) -> Iterator[faults.Fault | None]:
    """What requests meet: mostly nothing; else a refusal, or silence before or after the message was taken."""
    for _ in range(count):
        if chaos.rng.random() >= FAULTY:
            yield None
        elif chaos.rng.random() < 0.8:
            status, code = chaos.rng.choice(codes)
            yield faults.Answers(status=status, code=code)
        else:
            yield faults.Hangs(accepts=chaos.rng.random() < 0.5)


def trouble(chaos: Chaos, providers: Simulated) -> None:
    """Have providers of every channel fail for as many requests as there may be."""
    http = [(429, ""), (503, "")]
    apns = [(429, "TooManyRequests"), (503, "ServiceUnavailable")]
    for simulator, codes in (
        (providers.push.production, apns),
        (providers.mail, [(421, ""), (451, "")]),
        (providers.texts, [(429, "20429"), (503, "")]),
        (providers.spare, http),
        (providers.hooks, http),
    ):
        simulator.faults.script(troubles(chaos, codes, JOBS * 3))  # type: ignore[attr-defined]


async def last_receipts(broker: Broker) -> dict[tuple[str, str, str], list[Receipt]]:
    """The receipts of each job, by its notification, channel and target."""
    found: dict[tuple[str, str, str], list[Receipt]] = {}
    for stored in await whole_stream(broker, "RECEIPTS", "rcpt.>"):
        one = decode_receipt(stored.payload)
        found.setdefault((one.id or "", one.channel, one.device), []).append(one)
    return found


def is_unanswered(receipt: Receipt) -> bool:
    """Whether an endpoint did not answer. It gets the webhook again then, and knows it by its id (docs/webhooks.md)."""
    return receipt.channel == "webhook" and receipt.reason in {"timeout", "reset"}


def judged(receipts: Mapping[tuple[str, str, str], Sequence[Receipt]], accepted: Counter[tuple[str, str]]) -> list[str]:
    """What is wrong with what is stored, held against what providers have accepted, by notification and channel."""
    wrong = []
    for (id, channel, _), said in receipts.items():
        last = max(said, key=lambda one: (one.attempt, one.state in FINAL))
        times = accepted[id, channel]
        doubts = sum(one.state == "ambiguous" or is_unanswered(one) for one in said)
        if last.state not in FINAL:
            wrong.append(f"{id} {channel}: it is {last.state}")
        if last.state == "split":
            continue
        if times > 1 + doubts:
            wrong.append(f"{id} {channel}: accepted {times} times, and {doubts} doubts are recorded")
        if last.state == "sent" and not times:
            wrong.append(f"{id} {channel}: said to be sent, and nobody has accepted it")
        if last.state == "failed" and times and not doubts:
            wrong.append(f"{id} {channel}: said to have failed, and was accepted")
        most = POLICIES[channel].tries_max  # type: ignore[index]
        if last.attempt > most:
            wrong.append(f"{id} {channel}: attempt {last.attempt} of {most}")
    return wrong


def the_jobs() -> list[Job]:
    return [
        a_job(CHANNELS[number % 4], f"n{number}", user=USERS[number % len(USERS)], data={"title": f"n{number}"})
        for number in range(JOBS)
    ]


async def nothing_waits(broker: Broker) -> bool:
    return (await broker.stream("JOBS")).messages == 1  # the mark of the planner


@pytest.mark.chaos(takes_seconds=25)
async def test_with_failing_providers_and_killed_workers_every_job_ends_and_repetitions_are_announced(
    nats_server: NatsServer, valkey: Valkey, pool: Pool, postgres: str, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker, simulated(tmp_path / "providers") as providers:
        await topology.ensure(broker, "dev", 1, overrides=sooner)
        await known(pool, *USERS)
        trouble(chaos, providers)
        settings = settings_of(nats_server.url, valkey.url, postgres, providers.file)
        workers = [HastyRole(f"worker-{number}", "worker", tmp_path, settings) for number in range(2)]
        made = the_jobs()
        try:
            for one in workers:
                one.spawn()
            for start in range(0, JOBS, 200):
                await broker.commit([message_of(job) for job in made[start : start + 200]])
            ending = asyncio.create_task(eventually(lambda: nothing_waits(broker), seconds=TIMEOUT, every_seconds=0.5))
            deaths = [Fault("kill", 1, kill_one(workers, lambda process, _: process.spawn()))]
            # Every five seconds until all is done; in short, four times, as a worker needs a second to begin.
            until = ending.done if SECONDS else lambda: True
            pause = (5.0, 5.0) if SECONDS else (1.5, 2.5)
            drawn = await torment(chaos.rng, deaths, count=4, until=until, pause_seconds=pause)
            for one in workers:
                if not one.alive:
                    one.spawn()
            await ending
        finally:
            for one in workers:
                one.kill()
        receipts = await last_receipts(broker)
    accepted: Counter[tuple[str, str]] = Counter()
    for channel, log in {**providers.logs, "spare": providers.spare.log}.items():
        for message in log.messages():
            shown = message.shown.get("data", message.shown)
            title = shown.get("title") or shown.get("subject") or shown.get("text")
            accepted[str(title), "sms" if channel == "spare" else channel] += 1
    print(
        f"{drawn}; {len(receipts)} jobs, {sum(accepted.values())} accepted, {Counter(r[-1].state for r in receipts.values())}"
    )
    assert {(id, channel) for id, channel, _ in receipts} == {(job.id, job.channel) for job in made}
    assert judged(receipts, accepted) == []
