"""Planners that die or freeze at the worst moment: the plan shown is that of the highest term, and each job is there once."""

from pathlib import Path

import pytest

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.jobs.messages import decode_job
from engine.log.writer import read_mark
from engine.planner import position
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections.folds.deliveries import fold
from seamark.protocol.receipts import decode_receipt
from seamark.protocol.subjects import log_stream, log_subject
from tests.support.logs import FAST, connected, eventually
from tests.support.planning import PlannerProcess, record
from tests.support.projections import delivered

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


class Writer:
    """Writes records whose rule names two channels, and among them some that nobody plans anything for."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.ids: list[str] = []
        self.end = 0

    async def write(self, count: int) -> None:
        for _ in range(count):
            number = len(self.ids) + 1
            self.ids.append(f"e{number}")
            if number % 5 == 0:
                await self._broker.append(log_subject(0, "default", "bob"), record(f"app{number}", "bob", "demo.hello"))
            ack = await self._broker.append(log_subject(0, "default", "alice"), record(f"e{number}"))
            self.end = ack.seq

    async def planned(self) -> bool:
        mark = (await read_mark(self._broker, position.marked(0))).mark
        return mark is not None and mark.seq >= self.end

    async def judge(self) -> None:
        """Every record has a plan, the one shown has the highest term that was said of it, and each of its jobs is there once."""
        await eventually(self.planned, seconds=60)
        stored = [delivered(one) for one in await whole_stream(self._broker, "RECEIPTS", "rcpt.0.>")]
        highest: dict[str, int] = {}
        for receipt in (decode_receipt(one.payload) for one in stored):
            highest[receipt.id or ""] = max(highest.get(receipt.id or "", 0), receipt.term)
        plans = fold(stored).plans
        assert {id for _, user, id in plans if user == "alice"} == set(self.ids)
        for (_, user, id), plan in plans.items():
            assert plan.term == highest[id]
            assert set(plan.channels) == ({"email", "push"} if user == "alice" else {"inapp"}), id
        jobs = [decode_job(one.payload) for one in await whole_stream(self._broker, "JOBS", "job.>")]
        assert sorted((job.id, job.channel) for job in jobs) == sorted(
            (id, channel) for id in self.ids for channel in ("email", "push")
        )
        log = await self._broker.stream(log_stream(0))
        assert log.messages == log.last_seq, "a planner changes no log"


@pytest.fixture
async def writer(nats_server: NatsServer):
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        yield Writer(broker)


async def test_a_planner_killed_anywhere_leaves_no_record_without_its_plan(
    writer: Writer, nats_server: NatsServer, valkey: Valkey, postgres: str, tmp_path: Path
) -> None:
    planner = PlannerProcess("planner", tmp_path, nats_server.url, valkey.url, postgres)
    try:
        for point in (
            "after-take-over",
            "before-receipts",
            "between-receipts-and-mark:2",
            "before-append:2",
            "after-commit-before-answer:2",
        ):
            planner.spawn(fail_point=point)
            await eventually(lambda: _killed(planner, writer), seconds=60, every_seconds=0.1)
        planner.start()
        await writer.write(5)
        await writer.judge()
    finally:
        planner.kill()


async def _killed(planner: PlannerProcess, writer: Writer) -> bool:
    """It gets to its fail point by what comes: a log without news has no owner."""
    await writer.write(3)
    return planner.exit_code == -9


async def test_a_planner_that_wakes_up_after_another_took_over_writes_what_nobody_shows_and_steps_down(
    writer: Writer, nats_server: NatsServer, valkey: Valkey, postgres: str, tmp_path: Path
) -> None:
    first, second = (
        PlannerProcess(name, tmp_path, nats_server.url, valkey.url, postgres) for name in ("first", "second")
    )
    try:
        first.spawn(fail_point="before-receipts:2:stop")  # it holds decisions that it has not written down
        await eventually(lambda: _frozen(first, writer), seconds=60, every_seconds=0.1)
        second.start()
        await writer.write(20)
        await eventually(writer.planned, seconds=60)
        first.resume()
        await writer.write(20)
        await eventually(lambda: first.metric("seamark_partition_step_downs_total") > 0, seconds=60)
        await writer.judge()
    finally:
        first.kill()
        second.kill()


async def _frozen(planner: PlannerProcess, writer: Writer) -> bool:
    await writer.write(3)
    return planner.suspended
