"""Lives of a job that is replayed, and which deliveries are lost: what can be said without a server."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.broker.jetstream import Stored
from engine.channels.channel import Job, Members, Outcome
from engine.jobs.claims import Done, Leased, replaces
from engine.jobs.messages import schedule_of
from engine.jobs.receipts import receipts_of
from engine.jobs.replays import replayed
from engine.letters.letter import job_letter, letter_of
from engine.plan.rules import TypeRule
from projections.deliveries.lost import Open, end_of, job_of, lost_among, record_of, waited_until
from projections.folds.deliveries import rank

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
words = st.text(max_size=12)
JOB = Job(id="n1", tenant="acme", user="ann", type="a.b", channel="email", first_at=NOW)


def letter(job: Job, done: Done) -> Any:
    subject, payload, headers = job_letter(job, done)
    block = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    return letter_of(Stored(subject, 1, "2026-11-29T12:00:00Z", block.encode(), payload))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5))
def test_each_life_has_a_claim_of_its_own_and_receipts_that_win_over_all_of_the_former_ones(
    ends: list[tuple[int, int]],
) -> None:
    job, highest, keys = JOB, -1, set()
    for tried, more in ends:
        message = msgspec.structs.replace(job, attempt=tried)
        done = Done(tried + more, "failed", "x", Outcome(kind="transient", code="503"))
        # A worker that was thought dead reports last of all that its try was taken.
        late = replaces(Done(tried, "sent", "ok", Outcome(kind="ok")), done, Leased(tried, "o"))
        assert isinstance(late, Done)
        told = [rank(one.state, one.attempt) for end in (done, late) for one in receipts_of(message, end, NOW)]
        assert min(told) > highest
        highest = max(told)
        keys.add(job.claim_key)
        job = replayed(message, letter(message, done).tries, NOW)
        assert job.key == JOB.key, "for providers it is the same message"
    assert len(keys) == len(ends)
    assert job.claim_key not in keys


@given(words, words, words, words, st.integers(0, 99), st.integers(0, 99))
def test_no_life_of_one_job_has_the_claim_of_another_job(a: str, b: str, c: str, d: str, m: int, n: int) -> None:
    one = msgspec.structs.replace(JOB, id=a, target=b, tries_before=m)
    other = msgspec.structs.replace(JOB, id=c, target=d, tries_before=n)
    assert (one.claim_key == other.claim_key) == ((a, b, m) == (c, d, n))


def test_schedules_of_two_lives_have_two_names() -> None:
    again = replayed(JOB, 1, NOW)
    assert schedule_of(msgspec.structs.replace(JOB, stage="retry"), NOW).subject != schedule_of(again, NOW).subject


@given(words, words, words)
def test_no_code_of_a_provider_smuggles_a_header_into_a_letter(code: str, provider: str, type: str) -> None:
    told = Outcome(kind="permanent", code=code, provider=provider)
    found = letter(msgspec.structs.replace(JOB, type=type), Done(0, "failed", code, told))
    assert (found.cls, found.tries, found.in_doubt, found.id) == ("permanent", 1, False, "n1")


def opened(**more: Any) -> Open:
    given: dict[str, Any] = {
        "tenant": "acme", "user": "ann", "id": "n1", "channel": "email", "device": "", "state": "planned", "rank": -1,
        "at": NOW, "plan_at": NOW, "plan_when": "now", "record": None,
    }  # fmt: skip
    return Open(**(given | more))


@pytest.mark.parametrize(
    ("when", "minutes"),
    [
        ("now", 0),
        ("unless_seen:600", 10),
        ("at:2026-11-29T12:30:00+00:00", 30),
        ("digest:orders/2026-11-29T18:00:00+00:00", 360),
        ("at:soon", 0),
        ("at:2026-11-29T11:00:00+00:00", 0),
        ("unless_seen:1e400", 0),
    ],
)
def test_a_plan_says_when_it_is_over(when: str, minutes: float) -> None:
    assert waited_until(opened(plan_when=when)) == NOW + timedelta(minutes=minutes)


def test_a_job_stands_for_its_delivery_whatever_its_target_and_a_digest_for_all_of_its_members() -> None:
    split, phone, tv = opened(), opened(device="phone", state="queued", rank=20), opened(device="tv", state="queued")
    other, member = opened(id="n2"), opened(id="n3", plan_when="digest:orders/2026-11-29T18:00:00+00:00")
    everything = [split, phone, tv, other, member]
    assert lost_among(everything, []) == everything
    assert lost_among(everything, [JOB]) == [other, member]
    assert lost_among(everything, [msgspec.structs.replace(JOB, target="phone")]) == [tv, other, member]
    digest = msgspec.structs.replace(JOB, id="digest/x", digest="orders/2026-11-29T18:00:00+00:00")
    assert lost_among(everything, [digest]) == [split, phone, tv, other]
    assert lost_among([member], [msgspec.structs.replace(digest, digest="news/2026-11-29T18:00:00+00:00")]) == [member]
    part = opened(id="n3", device="phone", state="queued", plan_at=None, plan_when="")
    assert lost_among([part], [digest]) == [part]
    settled = Members(ids=("n3",), rendered_at=NOW)
    assert lost_among([part], [msgspec.structs.replace(digest, target="phone", members=settled)]) == []
    assert lost_among([part], [msgspec.structs.replace(digest, target="tv", members=settled)]) == [part]


def lost(rule: TypeRule | None = None, said: dict[str, Any] | None = None, **more: Any) -> tuple[Job, Done]:
    record = {
        "id": "n1", "kind": "notification", "tenant": "acme", "user": "ann", "type": "a.b", "at": "2026-11-29T12:00:00Z",
        "data": {"text": "hi"}, "category": "orders", "priority": "low", "plan": {"inapp": {"when": "now", "why": "default"}},
    }  # fmt: skip
    one = opened(record=msgspec.json.encode(record | (said or {})), **more)
    found = record_of(one)
    assert found is not None
    job = job_of(one, found, rule)
    assert job is not None
    return job, end_of(one, job)


def test_what_is_lost_ends_with_the_number_of_the_try_that_it_waited_for_and_can_be_replayed_from_its_record() -> None:
    job, done = lost(rank=rank("queued", 3), state="queued")
    assert (job.key, job.lane, job.data, job.category) == (JOB.key, "bulk", {"text": "hi"}, "orders")
    [receipt] = receipts_of(job, done, NOW)
    assert (receipt.reason, receipt.attempt) == ("lost", 3)
    assert record_of(opened(record=b"{")) is None
    assert record_of(opened()) is None


def test_what_is_lost_after_a_try_or_must_not_be_sent_twice_is_in_doubt() -> None:
    once = TypeRule(pattern="a.*", semantics="effectively_once")
    untried, tried, strict = lost(), lost(rank=rank("queued", 2), state="queued"), lost(once)
    assert [done.end for _, done in (untried, tried, strict)] == ["failed", "ambiguous", "ambiguous"]
    assert [letter(*one).in_doubt for one in (untried, tried, strict)] == [False, True, True]
    # Waiting for its first try still: our set-up was wrong, and nothing was sent.
    assert lost(rank=rank("queued", 1), state="queued")[1].end == "failed"


def test_what_is_lost_is_replayed_under_the_same_contract() -> None:
    rule = TypeRule(pattern="a.*", semantics="effectively_once", priority="critical", category="parcels")
    asked = {"email": {"when": "now", "why": "requested"}}
    job, _ = lost(rule, {"priority": "normal", "category": None, "plan": asked})
    assert (job.semantics, job.lane, job.category, job.requested) == ("effectively_once", "critical", "parcels", True)
    assert lost(rule)[0].lane == "bulk", "its event said more than the rule"
    assert not lost()[0].requested
