"""From the end of a job to its dead letter and back: on a real broker, a real Valkey and a real PostgreSQL."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from chaos.load import whole_stream
from engine import metrics
from engine.channels.channel import Job, Outcome
from engine.directory.contacts import address_hash
from engine.directory.push_tokens import NewToken, register_token, tokens_of
from engine.directory.suppressions import find_suppressions
from engine.directory.users import ensure_user
from engine.dispatch.claims import claim_key
from engine.jobs.claims import Done
from engine.jobs.desk import Send
from engine.jobs.messages import decode_job
from engine.jobs.receipts import receipts_of
from engine.jobs.replays import replayed
from engine.letters.letter import Letter
from engine.letters.reading import Filter, letter_at, page_of_letters
from engine.letters.triage import grouped
from engine.letters.writing import store_job_letter
from engine.patience import patiently
from engine.postgres import asking
from engine.worker.targets import fingerprint_of
from projections.proof import Name, Proofs
from projections.tries import receipts_in
from tests.support.letters import TENANT, USER, World, dead, job, known_to_the_inbox
from tests.support.logs import eventually


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


async def test_while_there_is_no_room_for_their_letters_messages_that_cannot_be_read_wait_and_jobs_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold none of the places that a lane has for what is handed out, and the alarm says what is missing."""
    monkeypatch.setattr("engine.worker.journal.NO_ROOM_SECONDS", 2.0)
    monkeypatch.setattr("engine.jobs.unreadable.PUT_BACK_SECONDS", (0.3, 0.3))
    consumer = (await world.broker.api("CONSUMER.INFO.JOBS.email-normal"))["config"] | {"max_ack_pending": 4}
    await world.broker.api("CONSUMER.CREATE.JOBS.email-normal", {"stream_name": "JOBS", "config": consumer})
    config = (await world.broker.stream("DEAD-LETTERS")).config
    await world.broker.api("STREAM.UPDATE.DEAD-LETTERS", config | {"max_bytes": 1})
    unreadable = [b'{"id":"newer%d","type":"a.b","first_at":17}' % number for number in range(8)]
    for number, payload in enumerate(unreadable):
        await world.broker.append(f"job.email.normal.{TENANT}.other{number}", payload)
    stalled = metrics.append_stalled.labels("DEAD-LETTERS")
    before = stalled._value.get()

    async def opens() -> None:
        await eventually(lambda: world.desk.accepted.total() == 20, seconds=20)
        await eventually(lambda: stalled._value.get() == before + 1, seconds=20)
        assert (await world.broker.stream("DEAD-LETTERS")).messages == 0
        await world.broker.api("STREAM.UPDATE.DEAD-LETTERS", config)

    room, world.desk.outcome = asyncio.create_task(opens()), Outcome(kind="ok")
    await world.work(*(job(f"ok{number}", user=f"u{number}") for number in range(20)))
    await room
    assert sorted([one.stored.payload for one in await world.letters()]) == unreadable
    assert stalled._value.get() == before


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
        told = msgspec.structs.replace(invalid, target_digest=fingerprint_of(digest), target_invalid_at=at)
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
