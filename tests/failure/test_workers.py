"""Workers and planners that are killed while providers fail: every job ends, and whatever was accepted twice was announced.

SEAMARK_CHAOS_JOBS: how many jobs the long form has, where 20 000 take too long.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from chaos.faults import Fault, kill_one, torment
from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.jobs.retry import POLICIES
from engine.log.writer import read_mark
from engine.patience import patiently
from engine.plan.rules import Channel
from engine.planner import position
from engine.postgres import Pool
from engine.topology import server as topology
from ops.dev.providers import faults
from ops.dev.providers.acceptlog import Accepted
from ops.dev.servers import NatsCluster, NatsServer, Valkey
from projections.folds.deliveries import rank
from seamark.protocol.receipts import Receipt, decode_receipt
from seamark.protocol.subjects import log_subject
from tests.failure.test_cluster import deposed, frozen, killed
from tests.support.chaos import SECONDS, TIMEOUT, Chaos
from tests.support.hasty import ACK_WAIT_SECONDS
from tests.support.logs import FAST, connected, eventually
from tests.support.planning import record
from tests.support.sending import TENANT, Simulated, StoresRole, known, settings_of, simulated

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]

JOBS = int(os.environ.get("SEAMARK_CHAOS_JOBS") or (20_000 if SECONDS else 120))
USERS = [f"user{number}" for number in range(50)]
CHANNELS: tuple[Channel, ...] = ("push", "email", "sms", "webhook")
FINAL = {"sent", "failed", "suppressed", "expired", "cancelled", "ambiguous", "split"}
RECORDS_AT_ONCE = 50 if SECONDS else 4
RECORDS_PAUSE_SECONDS = 0.5
BACKLOG_MAX = 2000
"""Jobs that wait when more records are stored."""

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


def trouble(chaos: Chaos, providers: Simulated, jobs: int) -> None:
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
        simulator.faults.script(troubles(chaos, codes, jobs * 3))  # type: ignore[attr-defined]


async def last_receipts(broker: Broker) -> dict[tuple[str, str, str], list[Receipt]]:
    """The receipts of each job, by its notification, channel and target."""
    found: dict[tuple[str, str, str], list[Receipt]] = {}
    for stored in await whole_stream(broker, "RECEIPTS", "rcpt.>"):
        one = decode_receipt(stored.payload)
        if one.channel:  # else it is the plan
            found.setdefault((one.id or "", one.channel, one.device), []).append(one)
    return found


def shown(said: Sequence[Receipt]) -> Receipt:
    """What `deliveries` shows of these facts about one job."""
    return max(said, key=lambda one: rank(one.state, one.attempt))


def judged(receipts: Mapping[tuple[str, str, str], Sequence[Receipt]], accepted: Counter[tuple[str, str]]) -> list[str]:
    """What is wrong with what is stored, held against what providers have accepted, by notification and channel."""
    wrong = []
    # Of a job that was split it is its parts that are sent, though it may end as poison itself: its doubts are theirs.
    doubted = Counter[tuple[str, str]]()
    for (id, channel, _), said in receipts.items():
        doubted[id, channel] += sum(one.state == "ambiguous" for one in said)
    for (id, channel, _), said in receipts.items():
        last = shown(said)
        times = accepted[id, channel]
        doubts = doubted[id, channel]
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


async def nothing_waits(broker: Broker, besides: int = 1) -> bool:
    """Whether JOBS holds no more than that: the mark of its planner stays."""
    return (await patiently(broker.stream, "JOBS")).messages <= besides


def named(accepted: Accepted) -> str:
    """The notification that a message is about: its title, which every channel shows somewhere."""
    shown = accepted.shown.get("data", accepted.shown)
    return str(shown.get("title") or shown.get("subject") or shown.get("text"))


class Storm:
    """Records that are planned for every channel, providers of which each third request fails, and processes that die.

    Args:
        roles: workers and a planner, not started.
        jobs: how many there are to be.
    """

    def __init__(
        self, chaos: Chaos, broker: Broker, providers: Simulated, roles: Sequence[StoresRole], jobs: int
    ) -> None:
        self._chaos, self._broker, self._providers = chaos, broker, providers
        self.roles = list(roles)
        self._ids = [f"n{number}" for number in range(jobs // len(CHANNELS))]
        trouble(chaos, providers, jobs)

    async def _record(self) -> None:
        """Store the records: a planner always has some before it, and workers have never all of them."""
        plan = {channel: {"when": "now", "why": "requested"} for channel in CHANNELS}
        end = 0
        for number, id in enumerate(self._ids):
            user = USERS[number % len(USERS)]
            said = record(id, user, "parcel.shipped", plan=plan, data={"title": id})
            end = (await patiently(self._broker.append, log_subject(0, TENANT, user), said)).seq
            if number % RECORDS_AT_ONCE == 0:
                await asyncio.sleep(RECORDS_PAUSE_SECONDS)  # they come over the time in which processes die
                await eventually(lambda: nothing_waits(self._broker, BACKLOG_MAX), seconds=TIMEOUT, every_seconds=0.2)
        await eventually(lambda: self._planned(end), seconds=TIMEOUT, every_seconds=0.2)
        await eventually(lambda: nothing_waits(self._broker), seconds=TIMEOUT, every_seconds=0.5)

    async def _planned(self, end: int) -> bool:
        mark = (await patiently(read_mark, self._broker, position.marked(0))).mark
        return mark is not None and mark.seq >= end

    async def endured(self, *faults: Fault) -> None:
        """Until every job has ended; then what is stored is held against what was accepted."""
        try:
            for one in self.roles:
                one.spawn()
            ending = asyncio.create_task(self._record(), name="records")
            deaths = Fault("kill", len(self.roles), kill_one(self.roles, lambda process, _: process.spawn()))
            # Every five seconds until all is done; in short, four times, as a process needs a second to begin.
            until = ending.done if SECONDS else lambda: True
            pause = (5.0, 5.0) if SECONDS else (1.5, 2.5)
            drawn = await torment(self._chaos.rng, [deaths, *faults], count=4, until=until, pause_seconds=pause)
            for one in self.roles:
                if not one.alive:  # as a supervisor would
                    one.spawn()
            await ending
        finally:
            for one in self.roles:
                one.kill()
        receipts = await last_receipts(self._broker)
        accepted = Counter(
            (named(message), "sms" if channel == "spare" else channel)
            for channel, log in {**self._providers.logs, "spare": self._providers.spare.log}.items()
            for message in log.messages()
        )
        ends = Counter(shown(said).state for said in receipts.values())
        print(f"{drawn}; {len(receipts)} jobs, {accepted.total()} accepted, {ends}")
        assert {(id, channel) for id, channel, _ in receipts} == {(id, one) for id in self._ids for one in CHANNELS}
        assert judged(receipts, accepted) == []


@pytest.mark.chaos(takes_seconds=25)
async def test_with_failing_providers_and_killed_workers_and_planners_every_job_ends_and_repetitions_are_announced(
    nats_server: NatsServer, valkey: Valkey, pool: Pool, postgres: str, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker, simulated(tmp_path / "providers") as providers:
        await topology.ensure(broker, "dev", 1, overrides=sooner)
        await known(pool, *USERS)
        settings = settings_of(nats_server.url, valkey.url, postgres, providers.file)
        roles: list[StoresRole] = [HastyRole(f"worker-{number}", "worker", tmp_path, settings) for number in range(2)]
        await Storm(
            chaos, broker, providers, [*roles, StoresRole("planner", "planner", tmp_path, settings)], JOBS
        ).endured()


if SECONDS:  # a cluster of three for one more way to die: too much for every run

    async def test_the_same_holds_on_three_nodes_while_the_leader_of_jobs_changes(
        nats_cluster: NatsCluster, valkey: Valkey, pool: Pool, postgres: str, tmp_path: Path, chaos: Chaos
    ) -> None:
        cluster = nats_cluster

        def of_three(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
            return sooner(name, config) | {"num_replicas": 3}

        def leader(cluster: NatsCluster, rng: random.Random) -> NatsServer:
            return cluster.leader_of("JOBS") or rng.choice(cluster.servers)

        async with connected(cluster.url) as broker, simulated(tmp_path / "providers") as providers:
            await topology.ensure(broker, "dev", 1, overrides=of_three)
            await known(pool, *USERS)
            of_worker, of_planner = (
                settings_of(cluster.url_of(user), valkey.url, postgres, providers.file)
                for user in ("worker", "planner")
            )
            roles: list[StoresRole] = [HastyRole(f"worker-{n}", "worker", tmp_path, of_worker) for n in range(2)]
            roles.append(StoresRole("planner", "planner", tmp_path, of_planner))
            consumers = [f"CONSUMER.LEADER.STEPDOWN.JOBS.{channel}-normal" for channel in CHANNELS]
            await Storm(chaos, broker, providers, roles, JOBS // 10).endured(
                Fault("leader killed", 1, killed(cluster, leader)),
                Fault("leader frozen", 1, frozen(cluster, leader)),
                Fault("leader deposed", 2, deposed(broker, "STREAM.LEADER.STEPDOWN.JOBS", *consumers)),
            )
