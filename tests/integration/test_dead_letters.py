"""From the end of a job to its dead letter and back: on a real broker, a real Valkey and a real PostgreSQL."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.channels.channel import Job, Outcome
from engine.directory.changes import changing
from engine.directory.changing import Directory
from engine.directory.contacts import address_hash
from engine.directory.push_tokens import NewToken, register_token, tokens_of
from engine.directory.rules import Rules
from engine.directory.suppressions import find_suppressions
from engine.directory.users import ensure_user
from engine.directory.webhooks import (
    FORMER_TYPES_MAX,
    EndpointSettings,
    NewEndpoint,
    WebhookEndpoint,
    create_endpoint,
    replace_endpoint,
)
from engine.dispatch.claims import claim_key, release
from engine.jobs.claims import Done, Waiting
from engine.jobs.desk import Hold, Over, Send, Split
from engine.jobs.handling import Handler
from engine.jobs.messages import decode_job, message_of
from engine.jobs.queue import JobsQueue
from engine.jobs.receipts import part_receipts, receipts_of
from engine.jobs.redisclaims import RedisClaims
from engine.jobs.replays import replayed
from engine.jobs.retry import RetryPolicy
from engine.jobs.worker import Worker
from engine.letters.letter import Letter
from engine.letters.reading import Filter, Found, letter_at, letters, page_of_letters
from engine.letters.replaying import Replays
from engine.letters.triage import grouped
from engine.letters.writing import store_job_letter
from engine.log.incarnations import epoch_of
from engine.partition.reader import Delivered
from engine.patience import patiently
from engine.plan.rules import Channel
from engine.postgres import Pool, asking
from engine.topology import server as topology
from engine.worker.journal import WorkerJournal
from engine.worker.targets import digest_of
from ops.dev.servers import NatsServer, Valkey
from projections.deliveries.ends import JobEnds
from projections.deliveries.missed import Place, missed_by
from projections.deliveries.sweep import Late, Sweep
from projections.deliveries.table import DeliveriesStore
from projections.inbox.table import InboxStore
from projections.proof import Name, Proofs
from projections.store import Checkpoint
from projections.tries import receipts_in
from seamark.protocol.receipts import Planned, Receipt
from seamark.protocol.subjects import encode_user, receipt_subject
from tests.integration.test_events_api import add_key
from tests.support.gateways import gateway_on
from tests.support.logs import FAST, connected, eventually
from tests.support.projections import delivered

POLICY = RetryPolicy((0.05, 0.1, 0.1), (0, 1), 60)
TENANT, USER = "acme", "ann@example.com"


class Clock:
    def now(self) -> datetime:
        return datetime.now(UTC)


class Desk:
    """Says what it was told to say, and counts what was taken."""

    repeatable = False

    def __init__(self) -> None:
        self.outcome = Outcome(kind="permanent", provider="relay", code="550 5.7.1", known=False)
        self.accepted: Counter[str] = Counter()

    def slower(self, outcome: Outcome) -> float:
        return 1.0

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        return Send(None, None)

    async def turn(self, job: Job, send: Send) -> float:
        return 0.0

    def unused(self, send: Send) -> None: ...

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        if self.outcome.kind == "ok":
            self.accepted[job.key] += 1
        return self.outcome


@dataclass
class World:
    broker: Broker
    redis: Redis
    claims: RedisClaims
    pool: Pool
    desk: Desk = field(default_factory=Desk)
    checkpoint: Checkpoint | None = None

    @property
    def directory(self) -> Directory:
        return Directory(self.pool)

    @property
    def ends(self) -> JobEnds:
        return JobEnds(self.pool, self.broker, 1)

    @property
    def journal(self) -> WorkerJournal:
        return WorkerJournal(self.broker, 1, self.directory, self.ends)

    @property
    def replays(self) -> Replays:
        return Replays(self.broker, self.ends, self.claims, partial(release, self.redis))

    async def fold(self) -> None:
        """Have `deliveries` know all receipts that are stored."""
        after = 0 if self.checkpoint is None else self.checkpoint.seq
        batch = [delivered(one) for one in await whole_stream(self.broker, "RECEIPTS", "rcpt.0.>") if one.seq > after]
        if batch:
            epoch = epoch_of(await self.broker.stream("RECEIPTS"))
            reached = Checkpoint(epoch, batch[-1].seq)
            assert await DeliveriesStore(self.pool, 0).apply(batch, self.checkpoint, reached)
            self.checkpoint = reached

    async def work(self, *jobs: Job, channel: Channel = "email") -> None:
        """Have a worker do these jobs, and whatever waits, until nothing does."""
        if jobs:
            await self.broker.commit([message_of(job) for job in jobs])
        handler = Handler(self.claims, JobsQueue(self.broker), self.journal, self.desk, POLICY, Clock())
        task = asyncio.create_task(Worker(self.broker, channel, handler).run(), name="worker")
        try:
            await eventually(self._all_done)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.fold()

    async def _all_done(self) -> bool:
        return (await self.broker.stream("JOBS")).messages == 1  # the mark of the planner

    async def letters(self, **wanted: Any) -> list[Found]:
        return [one async for one in letters(self.broker, Filter(**wanted))]

    async def states(self) -> list[tuple[str, int]]:
        rows = await self.pool.fetch("SELECT state, attempts FROM deliveries ORDER BY id, device")
        return [tuple(row) for row in rows]


@pytest.fixture
async def world(nats_server: NatsServer, valkey: Valkey, pool: Pool) -> AsyncIterator[World]:
    async with connected(nats_server.url) as broker, Redis.from_url(valkey.url) as redis:
        await topology.ensure(broker, "dev", 1, overrides=FAST)
        claims = RedisClaims(redis)
        yield World(broker, redis, claims, pool)
        await claims.close()


def job(id: str, **more: Any) -> Job:
    given: dict[str, Any] = {"tenant": TENANT, "user": USER, "type": "order.shipped", "channel": "email"}
    given |= {"first_at": datetime.now(UTC), "data": {"text": "the parcel for ann"}}
    return Job(id=id, **(given | more))


async def dead(world: World, *jobs: Job, outcome: Outcome | None = None) -> None:
    """Store letters of jobs that have failed at their first try, and the receipts of that."""
    done = Done(0, "failed", "x", outcome or Outcome(kind="permanent", provider="relay", code="550"))
    for one in jobs:
        await world.journal.conclude(one, done)
        await world.journal.store(one, receipts_of(one, done, datetime.now(UTC)))
    await world.fold()


async def test_a_job_that_failed_leaves_one_letter_that_says_why_and_no_header_says_who_was_to_read_what(
    world: World,
) -> None:
    await world.work(job("n1", trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01"))
    await world.journal.conclude(
        job("n1"), Done(0, "failed", "x", world.desk.outcome)
    )  # as whoever finds the claim does
    [found] = await world.letters()
    said = found.letter
    assert (said.kind, said.tenant, said.user, said.channel, said.id) == ("job", TENANT, USER, "email", "n1")
    assert (said.cls, said.code, said.provider, said.known, said.tries) == ("permanent", "550 5.7.1", "relay", False, 1)
    assert said.trace.startswith("00-aaaa")
    assert decode_job(found.stored.payload).data == {"text": "the parcel for ann"}
    headers = found.stored.headers.split(b"\r\nNats-Subject:")[0]
    assert b"ann" not in headers
    assert b"parcel" not in headers
    assert await world.states() == [("failed", 1)]


@pytest.mark.parametrize(
    ("done", "letter"),
    [
        (Done(0, "sent", "ok", Outcome(kind="ok")), False),
        (Done(0, "split"), False),
        (Done(0, "expired", "expired"), False),
        (Done(0, "cancelled", "recalled"), False),
        (Done(0, "suppressed", "user_off"), False),
        (Done(0, "suppressed", "killed:all"), False),
        (Done(0, "suppressed", "user_deleted"), False),
        (Done(0, "suppressed", "throttled"), True),
        (Done(0, "failed", "poison"), True),
        (Done(4, "ambiguous", "lease_lost"), True),
    ],
)
async def test_only_what_somebody_may_want_to_look_at_or_replay_is_a_dead_letter(done: Done, letter: bool) -> None:
    from engine.letters.letter import deserves_letter

    assert deserves_letter(done) is letter


async def test_a_replayed_job_is_sent_once_however_often_its_letter_is_replayed_and_its_end_is_what_is_shown(
    world: World,
) -> None:
    await world.work(job("n1"))
    [found] = await world.letters()
    world.desk.outcome = Outcome(kind="ok", provider="relay", provider_id="queue-7")
    # Two commands that see the same letter at the same time, or one that was killed before it had removed it.
    assert [await world.replays.replay(found, in_doubt=False) for _ in range(2)] == ["replayed", "replayed"]
    assert await world.letters() == []
    await world.work()
    assert list(world.desk.accepted.values()) == [1]
    assert await world.states() == [("sent", 3)], "a number between the two lives is left out"
    assert await world.replays.replay(found, in_doubt=False) == "gone"
    # Long after, when the broker does not know the message any more: the claim of this life says what became of it.
    await world.work(replayed(decode_job(found.stored.payload), found.letter.tries, datetime.now(UTC)))
    assert list(world.desk.accepted.values()) == [1]
    await known_to_the_inbox(world, "n1", user=USER, ago=timedelta(hours=1))
    [proof] = await Proofs(world.pool).of(TENANT, "n1")
    [way] = [fact for fact in proof.facts if fact.channel == "email"]
    assert (way.fact, way.attempts, way.provider, way.names) == ("sent", 3, "relay", [Name(3, "relay", "queue-7")])
    assert way.detail == "attempt 3, relay, ok, relay calls it queue-7 (attempt 3)"
    [proof] = await Proofs(world.pool).of(TENANT, "n1", find_told=receipts_in(world.broker, 1))
    ways = [(fact.fact, fact.attempts, fact.reason) for fact in proof.facts if fact.channel == "email"]
    assert ways == [("failed", 1, "550 5.7.1"), ("sent", 3, "ok")]
    assert all(fact.where.startswith("RECEIPTS ") for fact in proof.facts if fact.channel == "email" and fact.where)


async def test_a_job_that_dies_again_has_another_letter_and_may_be_replayed_again(world: World) -> None:
    await world.work(job("n1"))
    [first] = await world.letters()
    assert await world.replays.replay(first, in_doubt=False) == "replayed"
    await world.work()
    [second] = await world.letters()
    assert (second.letter.seq > first.letter.seq, second.letter.tries) == (True, 3)
    world.desk.outcome = Outcome(kind="ok")
    assert await world.replays.replay(second, in_doubt=False) == "replayed"
    await world.work()
    assert (list(world.desk.accepted.values()), await world.states()) == ([1], [("sent", 5)])


async def test_what_was_sent_after_all_is_not_replayed_nor_what_may_have_been_unless_somebody_says_so(
    world: World,
) -> None:
    sent, doubtful = job("n1"), job("n2")
    await world.journal.conclude(sent, Done(0, "failed", "x", Outcome(kind="transient", code="503")))
    # A worker that was thought dead reports that its try was taken.
    late = Done(1, "sent", "ok", Outcome(kind="ok"))
    await world.journal.store(sent, receipts_of(sent, late, datetime.now(UTC)))
    await world.journal.conclude(doubtful, Done(0, "ambiguous", "lease_lost"))
    await world.fold()
    first, second = await world.letters()
    assert (first.letter.in_doubt, second.letter.in_doubt) == (False, True)
    assert await world.replays.replay(first, in_doubt=False) == "sent"
    assert await world.replays.replay(second, in_doubt=False) == "in_doubt"
    assert [one.letter.id for one in await world.letters()] == ["n2"]
    assert (await world.broker.stream("JOBS")).messages == 1
    assert await world.replays.replay(second, in_doubt=True) == "replayed"
    assert await world.letters() == []


async def test_a_letter_that_jobs_never_takes_stays_and_the_others_are_gone_on_with(world: World) -> None:
    await dead(world, job("n1", data={"text": "x" * 4000}), job("n2"))
    state = await world.broker.stream("JOBS")
    await world.broker.api("STREAM.UPDATE.JOBS", {**state.config, "max_msg_size": 3000})
    fates = [await world.replays.replay(one, in_doubt=False) for one in await world.letters()]
    assert fates == ["refused", "replayed"]
    assert [one.letter.id for one in await world.letters()] == ["n1"]


async def test_the_letter_of_a_planner_that_was_overtaken_is_not_replayed(world: World) -> None:
    throttled = Done(0, "suppressed", "throttled")
    stale, right = job("n1"), job("n2")
    for one in (stale, right):
        await store_job_letter(world.broker, one, throttled)
    await world.journal.store(stale, receipts_of(stale, Done(0, "failed", "x"), datetime.now(UTC)))
    await world.journal.store(right, receipts_of(right, throttled, datetime.now(UTC)))
    await world.fold()
    fates = [await world.replays.replay(one, in_doubt=False) for one in await world.letters()]
    assert fates == ["before", "replayed"]


async def test_letters_are_found_by_what_they_are_about_page_by_page_and_grouped_with_the_unknown_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await dead(world, job("a1"), job("a2", tenant="other"), job("a3", channel="sms", user="bob"))
    await dead(world, job("b1", user="eve"), outcome=Outcome(kind="config", provider="relay", code="535", known=False))
    await world.broker.append("dlq.0.e.17", b"{no json", {
        "Seamark-Reason": "schema", "Seamark-Detail": "no JSON", "Seamark-Original": "e.17",
        "Seamark-Subject": f"ev.0.{TENANT}.ann.demo.bad",
    })  # fmt: skip

    async def ids(**wanted: Any) -> list[str]:
        return [one.letter.id or one.letter.kind for one in await world.letters(**wanted)]

    assert await ids() == ["a1", "a2", "a3", "b1", "event"]
    assert await ids(tenant=TENANT) == ["a1", "a3", "b1", "event"]
    assert await ids(tenant=TENANT, kind="job") == ["a1", "a3", "b1"]
    assert await ids(kind="event") == ["event"]
    assert await ids(channel="sms") == ["a3"]
    assert await ids(cls="permanent", code="550", tenant="other") == ["a2"]
    middle = (await world.letters())[2].letter.at
    assert await ids(since=middle) == ["a3", "b1", "event"]
    assert await ids(until=middle) == ["a1", "a2"]
    seen: list[str] = []
    begin: int | None = 0
    while begin is not None:
        page = await page_of_letters(world.broker, Filter(tenant=TENANT), begin, 1)
        seen += [one.letter.id for one in page.found]
        begin = page.next
    assert seen == ["a1", "a3", "b1", ""]
    groups = grouped(one.letter for one in await world.letters())
    assert [(one.channel, one.cls, one.code, one.known, one.count, one.tenants) for one in groups] == [
        ("email", "config", "535", False, 1, 1),
        ("email", "permanent", "550", True, 2, 2),
        ("", "schema", "schema", True, 1, 1),
        ("sms", "permanent", "550", True, 1, 1),
    ]
    [last] = await world.letters(kind="event")
    # Who has none among many large ones is told where to go on, after some megabytes.
    monkeypatch.setattr("engine.letters.reading.SCANNED_BYTES_MAX", 1)
    page = await page_of_letters(world.broker, Filter(tenant="nobody"), 0, 1)
    assert (page.found, page.next is None) == ([], False)
    assert await letter_at(world.broker, last.letter.seq, "other") is None
    assert await letter_at(world.broker, last.letter.seq, TENANT) is not None


async def test_a_dead_event_is_published_again_where_it_came_from_and_is_no_repetition_of_itself(world: World) -> None:
    body = b'{"id":"e1","to":["ann"],"type":"demo.hello"}'
    await world.redis.set(claim_key(TENANT, "e1"), "e.17")  # it was claimed, and LATER was full
    await world.redis.set(claim_key(TENANT, "e2"), "e.99")  # somebody else's
    for seq, id in ((17, b"e1"), (18, b"e2")):
        await world.broker.append(f"dlq.0.e.{seq}", body.replace(b"e1", id), {
            "Seamark-Reason": "later_full", "Seamark-Original": f"e.{seq}", "Seamark-Subject": f"ev.0.{TENANT}.ann.demo.hello",
        })  # fmt: skip
    for found in await world.letters():
        assert await world.replays.replay(found, in_doubt=False) == "replayed"
    stored = await whole_stream(world.broker, "EVENTS", f"ev.*.{TENANT}.ann.demo.hello")
    assert [one.payload for one in stored] == [body, body.replace(b"e1", b"e2")]
    assert await world.letters() == []
    assert await world.redis.get(claim_key(TENANT, "e1")) is None
    assert await world.redis.get(claim_key(TENANT, "e2")) == b"e.99"


async def test_while_there_is_no_room_for_its_letter_a_job_waits_and_others_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.worker.journal.NO_ROOM_SECONDS", 1.0)
    config = (await world.broker.stream("DEAD-LETTERS")).config
    await world.broker.api("STREAM.UPDATE.DEAD-LETTERS", config | {"max_bytes": 1})

    async def opens() -> None:
        await eventually(lambda: _is(world, ("sent", "failed")))
        await world.broker.api("STREAM.UPDATE.DEAD-LETTERS", config)

    room = asyncio.create_task(opens())
    fails, outcome = job("n1"), world.desk.outcome

    async def send(job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        return outcome if job.id == "n1" else Outcome(kind="ok")

    world.desk.send = send  # type: ignore[method-assign]
    await world.work(fails, *(job(f"ok{number}", user=f"u{number}") for number in range(80)))
    await room
    assert [one.letter.id for one in await world.letters()] == ["n1"]


async def _is(world: World, wanted: Sequence[str]) -> bool:
    found = [
        msgspec.json.decode(one.payload)["state"] for one in await whole_stream(world.broker, "RECEIPTS", "rcpt.0.>")
    ]
    return set(wanted) <= set(found) and found.count("sent") >= 80


async def test_a_token_that_is_none_is_retired_unless_another_took_its_place_or_it_was_registered_since(
    world: World,
) -> None:
    async def registered(token: str) -> bytes:
        async with world.directory.changing(TENANT, [USER]) as change:
            new = NewToken(platform="fcm", token=token, app="com.example")
            await register_token(change, USER, "phone", new)
            return new.hash

    async def retired() -> str | None:
        async with asking(world.pool) as connection:
            [one] = await tokens_of(connection, TENANT, USER)
        return one.reason if one.retired_at else None

    push = job("n1", channel="push", target="phone")
    hash, now = await registered("first"), datetime.now(UTC)
    invalid = Outcome(kind="target_invalid", provider="google", code="404/UNREGISTERED")

    def done(digest: bytes, at: datetime) -> Done:
        told = msgspec.structs.replace(invalid, target_digest=digest_of(digest), target_invalid_at=at)
        return Done(0, "failed", "x", told)

    await world.journal.conclude(push, done(hash, now - timedelta(hours=1)))
    assert await retired() is None, "it was registered since the provider lost it"
    await registered("second")
    await world.journal.conclude(push, done(hash, now + timedelta(hours=1)))
    assert await retired() is None, "it is not the one that was tried"
    for _ in range(2):
        await world.journal.conclude(push, done(await registered_hash(world), now + timedelta(hours=1)))
        assert await retired() == "404/UNREGISTERED"


async def registered_hash(world: World) -> bytes:
    found: bytes = await world.pool.fetchval("SELECT token_hash FROM push_tokens")
    return found


async def test_an_address_that_is_nobodys_is_suppressed_once_and_only_while_its_user_has_it(world: World) -> None:
    async with world.directory.changing(TENANT, [USER]) as change:
        await ensure_user(change, USER)
        hash = address_hash("email", "ann@example.com")
        await change.connection.execute(
            "UPDATE users SET email = 'Ann@Example.com', email_hash = $1 WHERE tenant = $2", hash, TENANT
        )
        change.touch(USER)
    mail = job("n1", category="orders")
    bounced = Outcome(kind="target_invalid", provider="relay", code="550 5.1.1")

    async def suppressed() -> list[tuple[str, str]]:
        async with asking(world.pool) as connection:
            found = await find_suppressions(connection, TENANT, {"email": "ann@example.com"})
        return [(one.reason, one.source) for one in found]

    elsewhere = msgspec.structs.replace(bounced, target_digest=address_hash("email", "old@example.com")[:8].hex())
    await world.journal.conclude(mail, Done(0, "failed", "x", elsewhere))
    assert await suppressed() == []
    told = msgspec.structs.replace(bounced, target_digest=hash[:8].hex())
    for _ in range(2):
        await world.journal.conclude(job("n2"), Done(0, "failed", "x", told))
        assert await suppressed() == [("hard_bounce", "relay 550 5.1.1")]


async def test_what_deliveries_know_is_believed_once_they_have_folded_what_is_ten_minutes_old(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.errors import StoreUnavailable

    one, now = job("n1"), datetime.now(UTC)
    assert await world.ends.ended(one) is None
    await world.journal.store(one, receipts_of(one, Done(0, "sent", "ok", Outcome(kind="ok")), now))
    assert await world.ends.ended(one) is None, "it may lag for a while"
    monkeypatch.setattr("projections.deliveries.ends.LAG", timedelta(0))
    with pytest.raises(StoreUnavailable):
        await world.ends.ended(one)
    await world.fold()
    ended = await patiently(world.ends.ended, one)
    assert ended is not None
    assert (ended.attempt, ended.end) == (0, "sent")
    again = msgspec.structs.replace(one, tries_before=2)
    assert await world.ends.ended(again) is None, "that was another life of it"


def test_a_letter_that_somebody_else_has_written_hides_no_other() -> None:
    from engine.broker.jetstream import Stored
    from engine.letters.letter import letter_of

    for subject, payload in (
        ("dlq.job.a.b.email.c", b"no job"),
        ("dlq.job.x", b"{}"),
        ("dlq.job.=ZZ.b.email.c", b"{}"),
    ):
        assert letter_of(Stored(subject, 1, "2026-01-31T12:00:00Z", b"NATS/1.0\r\n\r\n", payload)) is None
    plain = letter_of(Stored("dlq.0.e.1", 1, "2026-01-31T12:00:00Z", b"NATS/1.0\r\n\r\n", b""))
    assert isinstance(plain, Letter)


async def known_to_the_inbox(world: World, *ids: str, user: str, type: str = "a.b", ago: timedelta) -> None:
    """The records of notifications, as the inbox folds them."""
    subject, stored = f"log.0.{TENANT}.{encode_user(user)}".encode(), (datetime.now(UTC) - ago).timestamp()
    batch = []
    for seq, id in enumerate(ids, 1):
        plan = {"webhook": {"when": "now", "why": "requested"}}
        record = {"id": id, "kind": "notification", "tenant": TENANT, "user": user, "type": type, "plan": plan}
        body = msgspec.json.encode(record | {"data": {"text": "hi"}, "at": "2026-01-31T12:00:00Z"})
        batch.append(Delivered(subject, seq, round(stored * 1e9), b"", body))
    assert await InboxStore(world.pool, 0).apply(batch, None, Checkpoint("e", len(ids)))


async def planned(world: World, one: Job, when: str, at: datetime, why: str = "default") -> None:
    """The receipt of a plan, as a planner stores it."""
    plan = {one.channel: Planned(when, why)}
    said = Receipt(user=one.user, channel="", state="planned", at=at, id=one.id, term=1, plan=plan)
    subject = receipt_subject(0, one.tenant, one.user)
    await world.broker.append(subject, msgspec.json.encode(said))


async def test_the_sweep_ends_what_is_open_past_its_time_and_for_which_jobs_holds_nothing(world: World) -> None:
    now, hour = datetime.now(UTC), timedelta(hours=1)
    names = ("lost", "waits", "held", "later", "young", "d")
    lost, waits, held, later, young, digest = (job(id, user="u1") for id in names)
    for one, when, at in (
        (lost, "now", now - 2 * hour),
        (waits, "now", now - 2 * hour),
        (held, "unless_seen:60", now - 2 * hour),
        (later, f"at:{(now + hour).isoformat()}", now - 2 * hour),
        (young, "now", now),
        (digest, f"digest:orders/{(now - 2 * hour).isoformat()}", now - 3 * hour),
    ):
        await planned(world, one, when, at)
    unreadable = job("unreadable", user="u0")
    await planned(world, unreadable, "now", now - 4 * hour)
    await world.broker.append(message_of(unreadable).subject, b"{")
    queue = JobsQueue(world.broker)
    await queue.add([waits])
    await queue.schedule(held, now + 3 * hour)
    key = f"orders/{(now - 2 * hour).isoformat()}"
    await queue.schedule(job("digest/x", user="u1", stage="digest", digest=key), now + hour)
    retried = job("retried", user="u2")
    waiting = Waiting(2, now - hour, None, Outcome(kind="transient", code="503"))
    await world.journal.store(retried, receipts_of(retried, waiting, now - 2 * hour))
    split = job("split", user="u3", channel="push")
    for receipts in (
        part_receipts(split, ("phone", "tablet"), None, now - 2 * hour),
        receipts_of(split, Done(0, "split"), now - 2 * hour),
    ):
        await world.journal.store(split, receipts)
    await queue.add([job("split", user="u3", channel="push", target="tablet")])
    await world.fold()
    await known_to_the_inbox(world, "lost", user="u1", ago=hour)
    sweep = Sweep(world.pool, world.broker, 1, Rules(world.pool, world.broker))
    working = asyncio.create_task(sweep.sweep())
    while not working.done():  # as a projector does
        await world.fold()
        await asyncio.sleep(0.1)
    assert await working == 3
    await world.fold()
    stored = await world.pool.fetch("SELECT * FROM deliveries")
    rows = {row["id"] + row["device"]: (row["state"], row["reason"], row["attempts"]) for row in stored}
    assert [rows.pop(f"split{one}")[:2] for one in ("", "phone", "tablet")] == [
        ("split", ""), ("failed", "lost"), ("queued", "")
    ]  # fmt: skip
    assert rows.pop("lost") == ("failed", "lost", 0)
    assert rows.pop("retried") == ("ambiguous", "lost", 3), "one of its tries may have been taken"
    assert {state for state, *_ in rows.values()} == {"planned"}
    [found] = await world.letters()
    assert (found.letter.cls, found.letter.id, found.letter.tries) == ("lost", "lost", 1)
    assert decode_job(found.stored.payload).data == {"text": "hi"}
    assert await sweep.sweep() == 0, "what has ended is not lost again"
    assert [await sweep._is_due() for _ in range(2)] == [True, False], "one process of all sweeps, once an hour"


async def test_the_sweep_waits_for_a_projection_that_is_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.deliveries.sweep.FOLDED_SECONDS", 0.2)
    monkeypatch.setattr("projections.deliveries.sweep.PAUSE_SECONDS", 0.1)
    one, long_ago = job("n1"), datetime.now(UTC) - timedelta(hours=2)
    await planned(world, one, "now", long_ago)
    await world.fold()
    await world.journal.store(one, receipts_of(one, Done(0, "sent", "ok", Outcome(kind="ok")), datetime.now(UTC)))
    sweep = Sweep(world.pool, world.broker, 1, Rules(world.pool, world.broker))
    with pytest.raises(Late):
        await sweep.sweep()
    await world.fold()
    assert await sweep.sweep() == 0
    assert await world.states() == [("sent", 1)]


KEYS = {"sk_test_1111111111": ["dead_letters:read", "dead_letters:write"], "sk_test_2222222222": ["dead_letters:read"]}


async def test_a_service_looks_through_replays_and_drops_what_is_its_tenants_over_http(
    world: World, nats_server: NatsServer, valkey: Valkey, postgres: str
) -> None:
    full, reader = KEYS
    for key, scopes in KEYS.items():
        await add_key(postgres, key, scopes)
    await dead(world, *(job(f"n{number}") for number in range(5)), job("foreign", tenant="other"))
    await dead(world, job("odd"), outcome=Outcome(kind="permanent", provider="relay", code="999", known=False))
    options: dict[str, Any] = {"postgres_url": postgres, "redis_url": valkey.url, "topology_ready": True}
    async with gateway_on(nats_server, **options) as gateway:

        async def ask(method: str, path: str, body: Any = None, key: str = full) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {key}"}
            url = f"{gateway.url}/v1/dead-letters{path}"
            async with gateway.http.request(method, url, json=body, headers=headers) as response:
                return response.status, await response.json()

        async def known() -> bool:
            return all([(await ask("GET", "", key=key))[0] == 200 for key in KEYS])

        await eventually(known)
        seen: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            _, page = await ask("GET", f"?limit=2{cursor and '&cursor=' + cursor}")
            seen += [one["id"] for one in page["items"]]
            cursor = page["next"]
        assert seen == ["n0", "n1", "n2", "n3", "n4", "odd"]
        _, said = await ask("GET", "/groups?channel=email")
        assert [(one["code"], one["known"], one["count"]) for one in said["groups"]] == [
            ("999", False, 1),
            ("550", True, 5),
        ]
        others = next(one.letter.seq for one in await world.letters() if one.letter.tenant == "other")
        assert (await ask("GET", f"/{others}"))[0] == 404
        assert (await ask("POST", "/drop", {"seqs": [others]}))[1] == {"fates": {"gone": 1}, "next": None}
        assert (await ask("POST", "/drop", {"code": "999"}, key=reader))[0] == 403
        assert (await ask("GET", "?tenant=other"))[0] == 403
        for unsaid in ({}, {"seqs": [others], "all": True}, {"seqs": [others], "class": "permanent"}):
            assert (await ask("POST", "/drop", unsaid))[0] == 400
        assert (await ask("GET", "?cursor=x"))[0] == 400
        assert (await ask("POST", "/drop", {"code": "999"}))[1]["fates"] == {"dropped": 1}
        first = (await ask("GET", "?limit=1"))[1]["items"][0]["seq"]
        _, whole = await ask("GET", f"/{first}")
        assert decode_job(whole["payload"].encode()).data == {"text": "the parcel for ann"}
        fates: Counter[str] = Counter()
        cursor = None
        while True:
            _, said = await ask(
                "POST", "/replay", {"class": "permanent", "limit": 2, "cursor": cursor, "per_second": 500}
            )
            fates += Counter(said["fates"])
            if (cursor := said["next"]) is None:
                break
        assert fates == {"replayed": 5}
        assert (await ask("GET", ""))[1]["items"] == []
    world.desk.outcome = Outcome(kind="ok")
    await world.work()
    assert sorted(world.desk.accepted.values()) == [1] * 5
    assert [one.letter.id for one in await world.letters()] == ["foreign"]


async def test_an_endpoint_gets_again_what_it_has_missed_since_a_time_each_message_once_and_others_get_nothing(
    world: World, nats_server: NatsServer, valkey: Valkey, postgres: str
) -> None:
    key = "sk_test_3333333333"
    await add_key(postgres, key, ["webhooks:write"])
    async with changing(world.pool, TENANT) as change:
        new = NewEndpoint(url="https://hooks.example.com/a", types=("order.*",))
        mine, other = [(await create_endpoint(change, new))[0].id for _ in range(2)]
    hook: dict[str, Any] = {"channel": "webhook", "target": mine}
    await dead(world, job("before", **hook))
    since = datetime.now(UTC)
    doubtful = Done(0, "ambiguous", "x", Outcome(kind="ambiguous", provider="webhook", code="timeout"))
    await dead(world, job("n1", **hook), job("n2", **hook), job("else", **(hook | {"target": other})), job("mail"))
    await world.journal.conclude(job("n3", **hook), doubtful)
    await dead(world, job("foreign", **hook, tenant="other"))
    await while_it_was_disabled(world, mine, datetime.now(UTC))
    options: dict[str, Any] = {"postgres_url": postgres, "redis_url": valkey.url, "topology_ready": True}
    async with gateway_on(nats_server, **options) as gateway:

        async def replay(endpoint: str = mine, **body: Any) -> tuple[int, Any]:
            url, headers = f"{gateway.url}/v1/webhooks/{endpoint}/replay", {"Authorization": f"Bearer {key}"}
            async with gateway.http.post(
                url, json={"since": since.isoformat(), "per_second": 500, **body}, headers=headers
            ) as response:
                return response.status, await response.json()

        await eventually(partial(_answers, replay))
        assert (await replay(since="2026-01-31T12:00:00"))[0] == 400
        assert (await replay("wh_" + "0" * 24))[0] == 404
        assert (await replay(until=since.isoformat()))[1]["fates"] == {}
        async with changing(world.pool, TENANT) as change:
            await replace_endpoint(change, other, EndpointSettings(url=new.url, state="disabled"))
        assert (await replay(other))[1]["code"] == "endpoint_disabled"
        answers = await asyncio.gather(*(replay() for _ in range(3)))
        assert {status for status, _ in answers} == {200}
        assert (await replay(cursor="m.x"))[0] == 400
        world.desk.outcome = Outcome(kind="ok")
        waiting = await whole_stream(world.broker, "JOBS", "job.webhook.>")
        await world.work(channel="webhook")
        assert (await replay())[1] == {"fates": {}, "next": None}
    assert set(world.desk.accepted.values()) == {1}
    assert {key.split("/")[1] for key in world.desk.accepted} == {"n1", "n2", "n3", "away", "split", "late"}
    jobs = [decode_job(one.payload) for one in waiting]
    assert {(one.target, one.again, one.type) for one in jobs} == {(mine, True, "order.shipped")}
    assert len({one.claim_key for one in jobs}) == 6, "a message that stands there twice is one life, sent once"
    assert {one.id for one in jobs if one.requested} == {"away", "split", "late"}, "as the event had asked for"
    # What it was never tried with has the claim that it would have had: a job that is late is the same.
    assert {one.id for one in jobs if one.claim_key == one.key} == {"away", "split"}
    assert {one.letter.id for one in await world.letters()} == {"before", "else", "mail", "foreign"}


async def test_an_endpoint_has_not_missed_what_it_was_not_subscribed_to_when_it_came(world: World) -> None:
    """A service that subscribes to more types, and asks for what it has missed, is not told of all that there ever was."""
    async with changing(world.pool, TENANT) as change:
        new = NewEndpoint(url="https://hooks.example.com/a", types=("mail.*",))
        mine = (await create_endpoint(change, new))[0].id

    async def subscribed(*types: str) -> WebhookEndpoint:
        async with changing(world.pool, TENANT) as change:
            found = await replace_endpoint(change, mine, EndpointSettings(url=new.url, types=types))
        assert found is not None
        return found

    since, came = datetime.now(UTC), dict[str, datetime]()
    came["too-early"] = datetime.now(UTC)
    await subscribed("mail.*", "order.*")
    came["missed"] = datetime.now(UTC)
    await subscribed("order.shipped")
    came["missed-too"] = datetime.now(UTC)
    await subscribed("mail.*")
    came["between"] = datetime.now(UTC)
    endpoint = await subscribed("order.*")
    for one in (job(id, channel="webhook") for id in came):
        await world.journal.store(one, receipts_of(one, Done(0, "split"), since))
    await world.fold()
    await known_to_the_inbox(world, *came, user=USER, type="order.shipped", ago=timedelta(0))
    for id, at in came.items():
        await world.pool.execute("UPDATE inbox SET stored_at = $2 WHERE id = $1", id, at)
    until = datetime.now(UTC) + timedelta(minutes=1)
    found, _ = await missed_by(world.pool, TENANT, endpoint, Place(since), until, 100)
    assert [one.id for one in found] == ["missed", "missed-too"]
    for number in range(FORMER_TYPES_MAX + 5):
        endpoint = await subscribed("order.*", f"other{number}.*")
    async with asking(world.pool) as connection:
        kept = await connection.fetchval("SELECT jsonb_array_length(former_types) FROM webhook_endpoints")
    assert kept == FORMER_TYPES_MAX


async def while_it_was_disabled(world: World, endpoint: str, now: datetime) -> None:
    """What came to a tenant whose endpoint was disabled: of three notifications it would have been told."""
    ids = ("away", "split", "late", "off", "had", "odd")
    away, split, late, off, had, odd = (job(id, channel="webhook") for id in ids)
    await planned(world, away, "never", now, "no_address")
    await planned(world, off, "never", now, "user_off")
    for one in (split, late, had, odd):
        await world.journal.store(one, receipts_of(one, Done(0, "split"), now))
    for one, done in ((late, Done(0, "suppressed", "no_address")), (had, Done(0, "sent", "200"))):
        await world.journal.store(one, receipts_of(replace(one, target=endpoint), done, now))
    await world.fold()
    await known_to_the_inbox(world, *ids, user=USER, type="order.shipped", ago=timedelta(0))
    await world.pool.execute("UPDATE inbox SET type = 'other.type' WHERE id = 'odd'")


async def _answers(replay: Callable[..., Awaitable[tuple[int, Any]]]) -> bool:
    return (await replay("wh_" + "0" * 24))[0] == 404
