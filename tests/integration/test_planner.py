"""A planner on real servers: what it decides is stored and shown, and it never plans twice what it may not."""

import asyncio
import functools
import time
from datetime import timedelta

import asyncpg
import msgspec
import pytest

from chaos.load import whole_stream
from engine import metrics
from engine.broker.answers import WATERMARK_KEY
from engine.broker.jetstream import After, Broker, PubAck
from engine.cancels import cancel, watching
from engine.errors import PartitionStopped, StepDown
from engine.jobs.messages import decode_job
from engine.letters.letter import letter_of
from engine.log.marks import encode_mark
from engine.log.writer import read_mark
from engine.partition import head
from engine.partition.reader import Phase
from engine.plan.decide import plan
from engine.plan.decisions import Inputs
from engine.plan.profile import Profile
from engine.plan.rules import ChannelRule, TypeRule
from engine.planner import planner as role
from engine.planner import position, shares
from engine.planner import worker as worker_module
from engine.planner.shares import Shares
from engine.planner.witness import Witness, Witnesses
from engine.planner.worker import PlanWorker
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections.proof import Proofs
from projections.verify.tables import Verification
from seamark.protocol.receipts import Receipt, decode_receipt
from seamark.protocol.subjects import log_subject
from tests.support import planning as support
from tests.support.logs import PATIENT, PIN_KEPT_SECONDS, connected, eventually
from tests.support.planning import FixedProfiles, FixedRules, record
from tests.support.projections import log_of
from tests.support.tables import projecting_tables

# A planner alone does not lose its log to a pause: it would wait for the next record to be its owner again.
planning = functools.partial(support.planning, pin_timeout_seconds=PIN_KEPT_SECONDS)


@pytest.fixture
async def broker(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "GIVE_BACK_SECONDS", 20.0)  # the next one would wait for the pin's time-out
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", 1, overrides=PATIENT)
        yield connection


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored after a take-over, no earlier planner has read."""
    monkeypatch.setattr(worker_module, "DOUBT", timedelta())


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lag and witness follow within a moment."""
    monkeypatch.setattr(role, "LAG_SECONDS", 0.2)
    monkeypatch.setattr(role, "PLAN_WITNESS_SECONDS", 0.2)


async def write(broker: Broker, *bodies: bytes, user: str = "alice") -> PubAck:
    for body in bodies:
        ack = await broker.append(log_subject(0, "default", user), body)
    return ack


async def receipts(broker: Broker) -> list[Receipt]:
    return [decode_receipt(one.payload) for one in await whole_stream(broker, "RECEIPTS", "rcpt.0.>")]


async def planned_up_to(broker: Broker) -> int:
    mark = (await read_mark(broker, position.marked(0))).mark
    assert mark is not None
    return mark.seq


async def test_a_decision_is_stored_with_what_it_was_made_from_and_shown_in_table_and_proof(
    broker: Broker, nats_server: NatsServer, valkey: Valkey, pool: asyncpg.Pool, postgres: str
) -> None:
    async with (
        planning(nats_server.url, pool, profiles=FixedProfiles(Profile(reach=("email",)))),
        projecting_tables(nats_server.url, valkey.url, postgres, 1),
    ):
        end = await write(broker, record("e1"))

        async def shown() -> list[str]:
            return [f"{one['channel']} {one['state']} {one['plan_when']} {one['plan_why']}" for one in
                    await pool.fetch("SELECT * FROM deliveries ORDER BY channel")]  # fmt: skip

        await eventually(lambda: _is(shown, ["email planned now default", "push suppressed never no_token"]))
        assert await planned_up_to(broker) == end.seq
        [receipt] = await receipts(broker)
        assert receipt.term == (await read_mark(broker, position.marked(0))).mark.term  # type: ignore[union-attr]
        again = plan(msgspec.json.decode(receipt.inputs, type=Inputs))
        told = {name: (one.when, one.why) for name, one in (receipt.plan or {}).items()}
        assert told == {name: (one.when, one.why) for name, one in again.items() if name != "inapp"}
        await eventually(lambda: _found(pool))
        [proof] = await Proofs(pool).of("default", "e1")
        facts = {(one.fact, one.channel): one.detail for one in proof.facts}
        assert facts["planned", "email"] == "now, because: default"
        assert facts["planned", "push"] == "never, because: no_token"
        assert "sent by email: no receipt of that channel" in proof.not_proven
        assert not any("push" in gap for gap in proof.not_proven), "what is never sent needs no proof of it"
        work = Verification(broker, pool, "deliveries", 1)
        assert [one async for one in work.differences()] == []
        assert work.result.compared == 2


async def _is(ask, wanted) -> bool:
    return await ask() == wanted


async def _found(pool: asyncpg.Pool) -> bool:
    return bool(await Proofs(pool).of("default", "e1"))


async def test_records_for_the_app_alone_leave_no_receipt_and_move_the_mark_once_a_second(
    broker: Broker, nats_server: NatsServer, pool: asyncpg.Pool, certain: None
) -> None:
    async with planning(nats_server.url, pool) as planner:
        await eventually(lambda: planner.readers[0].phase is Phase.READING or _nudge(broker))
        began, before = time.monotonic(), (await broker.stream("JOBS")).last_seq
        end = await write(broker, *(record(f"e{n}", type="demo.hello") for n in range(200)))
        end = await write(broker, b'{"id":"r1","kind":"read","ids":["e1"]}', b"no record")
        await eventually(lambda: _reached(broker, end.seq))
        moves = (await broker.stream("JOBS")).last_seq - before
        assert moves <= time.monotonic() - began + 2
        assert [one for one in await receipts(broker) if one.id != "nudge"] == []


async def _nudge(broker: Broker) -> bool:
    """A log without news has no owner."""
    await write(broker, record("nudge", type="demo.hello"))
    return False


async def _reached(broker: Broker, seq: int) -> bool:
    return await planned_up_to(broker) >= seq


async def test_with_its_stores_away_a_planner_waits_and_its_lag_shows_and_then_it_goes_on(
    broker: Broker, nats_server: NatsServer, pool: asyncpg.Pool, watchful: None
) -> None:
    rules, profiles = FixedRules(), FixedProfiles()
    lag = metrics.planner_lag.labels("LOG-0")._value
    lag.set(0)  # whatever an earlier test has left
    async with planning(nats_server.url, pool, rules, profiles) as planner:
        await write(broker, record("e1"))
        await eventually(lambda: _stored(broker, 1))
        profiles.away = True
        end = await write(broker, record("e2"))
        await eventually(lambda: lag.get() > 1)
        assert planner.readers[0].phase is not Phase.STOPPED
        assert len(await receipts(broker)) == 1
        profiles.away = False
        await eventually(lambda: _reached(broker, end.seq))
        assert {one.id for one in await receipts(broker)} == {"e1", "e2"}


async def _stored(broker: Broker, count: int) -> bool:
    return len(await receipts(broker)) >= count


async def test_jobs_that_were_put_back_stop_the_planner_which_names_the_remedy_and_that_helps(
    broker: Broker, nats_server: NatsServer, pool: asyncpg.Pool, watchful: None
) -> None:
    backup = await read_mark(broker, position.marked(0))
    async with planning(nats_server.url, pool):
        await write(broker, record("e1"), record("e2"))
        await eventually(lambda: _stored(broker, 2))
        await eventually(lambda: _witnessed(pool, 2))
    # As a backup holds it from before, under numbers that came after.
    now = await read_mark(broker, position.marked(0))
    assert backup.mark is not None
    headers = {"Nats-Rollup": "sub"}
    await broker.append("jmark.0", encode_mark(backup.mark), headers, after=After("JOBS", now.seq))
    worker = _worker(broker, pool)
    with pytest.raises(
        PartitionStopped, match=r"JOBS was put back: .* is at 0, and its witness has seen it at 2\. Delete JOBS"
    ):
        await worker.acquire()
    with pytest.raises(PartitionStopped, match="JOBS was put back"):
        await worker.position()
    await broker.api("STREAM.DELETE.JOBS")
    with pytest.raises(PartitionStopped, match=r"there is no stream JOBS\. Run `seamark topology apply`"):
        await worker.position()
    await topology.apply(broker, await topology.plan(broker, "dev", overrides=PATIENT))
    assert await worker.position() == 3
    async with planning(nats_server.url, pool):
        await write(broker, record("e3"))
        await eventually(lambda: _stored(broker, 3))
    found = await receipts(broker)
    assert [one.id for one in found] == ["e1", "e2", "e3"], "nothing was planned again"
    assert found[2].term > found[1].term


async def _witnessed(pool: asyncpg.Pool, seq: int) -> bool:
    return bool(await pool.fetchval("SELECT seq >= $1 FROM plan_witnesses WHERE partition = 0", seq))


def _worker(broker: Broker, pool: asyncpg.Pool) -> PlanWorker:
    return PlanWorker(broker, 0, FixedRules(), FixedProfiles(), lambda tenant, user: (), Witnesses(pool))


async def test_of_two_owners_the_later_one_is_shown_whole_and_the_earlier_one_steps_down(
    broker: Broker, pool: asyncpg.Pool
) -> None:
    await write(broker, record("e1"), record("e2"))
    batch = await log_of(broker, 0)
    first, second = _worker(broker, pool), _worker(broker, pool)
    await first.acquire()
    await second.acquire()
    await second.handle(batch)
    with pytest.raises(StepDown):
        await first.handle(batch)
    found = await receipts(broker)
    terms = [one.term for one in found]
    assert len(terms) == 4, "the earlier one has spoken, too"
    assert terms[0] == terms[1] > terms[2] == terms[3]
    assert await planned_up_to(broker) == 2


async def jobs_of(broker: Broker, subject: str = "job.>") -> list[tuple[str, str, str]]:
    found = [decode_job(one.payload) for one in await whole_stream(broker, "JOBS", subject)]
    return sorted((job.id, job.channel, job.stage) for job in found)


async def test_what_is_planned_has_its_jobs_and_whoever_comes_late_adds_none(
    broker: Broker, pool: asyncpg.Pool
) -> None:
    await write(broker, record("e1"), record("e2", type="demo.hello"), record("e3"))
    batch = await log_of(broker, 0)
    first, second = _worker(broker, pool), _worker(broker, pool)
    await first.acquire()
    await second.acquire()
    await second.handle(batch)
    with pytest.raises(StepDown):
        await first.handle(batch)
    channels = ("email", "push")
    assert await jobs_of(broker) == [(id, channel, "first") for id in ("e1", "e3") for channel in channels]
    state = await broker.stream("JOBS")
    assert state.messages == 4 + 1, "beside them there is the mark, and only the newest"


async def letters(broker: Broker) -> list[tuple[str, str, str]]:
    """Dead letters of jobs: id, channel, why."""
    found = [letter_of(one) for one in await whole_stream(broker, "DEAD-LETTERS", "dlq.job.>")]
    return sorted((one.id, one.channel, one.code) for one in found if one is not None)


async def reconfigured(broker: Broker, **changes: object) -> None:
    """JOBS with something else in its configuration."""
    state = await broker.stream("JOBS")
    await broker.api("STREAM.UPDATE.JOBS", {**state.config, **changes})


async def test_jobs_that_are_refused_end_with_a_letter_and_hold_up_no_others(
    broker: Broker, pool: asyncpg.Pool
) -> None:
    await reconfigured(broker, max_msg_size=3000)
    large = {"text": "x" * 4000}
    bodies = [record(f"e{n}", data=large if n in {2, 5} else {}) for n in range(1, 8)]
    await write(broker, *bodies)
    worker = _worker(broker, pool)
    await worker.acquire()
    await worker.handle(await log_of(broker, 0))
    channels = ("email", "push")
    assert await jobs_of(broker) == [(f"e{n}", one, "first") for n in (1, 3, 4, 6, 7) for one in channels]
    assert await letters(broker) == [(f"e{n}", one, "jobs_refused") for n in (2, 5) for one in channels]
    ended = [one for one in await receipts(broker) if one.state == "failed"]
    assert sorted((one.id, one.channel) for one in ended) == [(f"e{n}", one) for n in (2, 5) for one in channels]
    assert await planned_up_to(broker) == 7


async def test_a_tenant_with_too_many_jobs_gets_letters_instead_and_others_their_jobs(
    broker: Broker, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "SHARES_KEPT_SECONDS", 0.0)
    sources = (FixedRules(), FixedProfiles(), lambda *_: (), Witnesses(pool))
    worker = PlanWorker(broker, 0, *sources, shares=Shares(broker))
    await worker.acquire()

    async def planned(*bodies: bytes, tenant: str = "default") -> None:
        first = (await broker.stream("LOG-0")).last_seq
        for body in bodies:
            await broker.append(log_subject(0, tenant, "alice"), body)
        await worker.handle([one for one in await log_of(broker, 0) if one.seq > first])

    await planned(record("e1"))
    assert len(await jobs_of(broker)) == 2, "it has room enough at first"
    state = await broker.stream("JOBS")
    await reconfigured(broker, metadata={**state.config["metadata"], WATERMARK_KEY: str(state.bytes * 3 // 2)})
    await planned(record("e2"), record("e3", priority="critical"))
    await planned(record("e4"), tenant="other")
    assert {id for id, _, _ in await jobs_of(broker)} == {"e1", "e3", "e4"}
    assert await letters(broker) == [("e2", channel, "throttled") for channel in ("email", "push")]
    state = await broker.stream("JOBS")
    await reconfigured(broker, metadata={**state.config["metadata"], WATERMARK_KEY: str(state.bytes)})
    await planned(record("e5", priority="critical"))
    assert {id for id, _, _ in await jobs_of(broker)} == {"e1", "e3", "e4"}, "and what is critical has an end, too"
    (said,) = [one for one in await receipts(broker) if one.id == "e2"]
    assert {(one.when, one.why) for one in (said.plan or {}).values()} == {("never", "throttled")}


async def test_what_waits_is_a_schedule_that_the_broker_fires_with_all_that_the_job_says(
    broker: Broker, pool: asyncpg.Pool
) -> None:
    lines = {"push": ChannelRule(unless_seen_seconds=1), "email": ChannelRule(unless_seen_seconds=3600)}
    rules = FixedRules([TypeRule(pattern="order.*", channels=lines)])
    worker = PlanWorker(broker, 0, rules, FixedProfiles(), lambda *_: (), Witnesses(pool))
    await worker.acquire()
    await write(broker, record("e1", data={"order": 17}))
    await worker.handle(await log_of(broker, 0))
    assert await jobs_of(broker, "jobsched.email.>") == [("e1", "email", "escalation")]
    await eventually(lambda: _is(lambda: jobs_of(broker), [("e1", "push", "escalation")]))
    [fired] = await whole_stream(broker, "JOBS", "job.push.normal.default.alice")
    assert decode_job(fired.payload).data == {"order": 17}
    assert await jobs_of(broker, "jobsched.>") == [("e1", "email", "escalation")], "one that has fired is gone"


async def test_a_round_with_more_jobs_than_a_batch_holds_moves_the_mark_batch_by_batch(
    broker: Broker, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.planner.jobs.BATCH_MESSAGES_MAX", 8)
    worker = _worker(broker, pool)
    await worker.acquire()
    end = await write(broker, *(record(f"e{n}") for n in range(20)), record("app", type="demo.hello"))
    await worker.handle(await log_of(broker, 0))
    assert len(await jobs_of(broker)) == 40
    assert await planned_up_to(broker) == end.seq


async def test_what_is_cancelled_or_whose_user_was_deleted_before_it_is_planned_goes_nowhere(
    broker: Broker, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "PLAN_MARK_SECONDS", 600.0)
    await write(broker, *(record(f"e{n}", transaction_id=f"order {n}") for n in (1, 2)), record("e3"))
    batch = await log_of(broker, 0)
    async with watching(broker) as cancels:
        profiles = FixedProfiles()
        worker = PlanWorker(broker, 0, FixedRules(), profiles, lambda *_: (), Witnesses(pool), cancels)
        await worker.acquire()
        await cancel(broker, "default", "order 1", budget_seconds=30)
        await eventually(lambda: cancels.holds("default", "order 1"))
        await worker.handle(batch)
        whys = {
            one.id: {channel: plan.why for channel, plan in (one.plan or {}).items()} for one in await receipts(broker)
        }
        sent = {"email": "default", "push": "default"}
        assert whys == {"e1": {"email": "cancelled", "push": "cancelled"}, "e2": sent, "e3": sent}
        profiles.profile = Profile(version=2, deleted=True)
        end = await write(broker, record("e4"))
        await worker.handle((await log_of(broker, 0))[3:])
        assert await planned_up_to(broker) < end.seq, "nothing was written down, so the mark has time"
        await worker.pass_over(end.seq)
        assert len(await receipts(broker)) == 3, "what is stored of him now would outlast his being erased"


async def test_a_witness_follows_its_log_and_is_not_moved_back_by_whoever_comes_late(pool: asyncpg.Pool) -> None:
    witnesses = Witnesses(pool)
    assert await witnesses.of(0) is None
    await witnesses.begin(0, Witness("aaaa", 5), None)
    await witnesses.begin(0, Witness("aaaa", 2), None)  # has seen none, and another one was there
    assert await witnesses.of(0) == Witness("aaaa", 5)
    await witnesses.note({0: Witness("aaaa", 9), 1: Witness("aaaa", 9)})
    await witnesses.note({0: Witness("aaaa", 7)})
    assert await witnesses.of(0) == Witness("aaaa", 9)
    await witnesses.begin(0, Witness("bbbb", 1), Witness("aaaa", 9))
    await witnesses.note({0: Witness("aaaa", 99)})
    assert await witnesses.of(0) == Witness("bbbb", 1)


async def test_a_round_that_cannot_be_planned_stops_the_log_and_loses_nothing(
    broker: Broker, nats_server: NatsServer, pool: asyncpg.Pool
) -> None:
    profiles = FixedProfiles()
    profiles.profile = None  # type: ignore[assignment] - a fault of ours
    worker = PlanWorker(broker, 0, FixedRules(), profiles, lambda tenant, user: (), Witnesses(pool))
    await write(broker, record("e1"))
    batch = await log_of(broker, 0)
    await worker.acquire()
    with pytest.raises(PartitionStopped, match="records 1 to 1 of LOG-0 cannot be planned: AttributeError"):
        await worker.handle(batch)
    with pytest.raises(PartitionStopped):
        await worker.position()
    profiles.profile = FixedProfiles().profile
    assert await worker.position() == 1
    await asyncio.wait_for(worker.handle(batch), 30)
    assert [one.id for one in await receipts(broker)] == ["e1"]
