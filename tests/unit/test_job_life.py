"""What a worker does with a job, by its claim: every claim has an answer, and these are the ones that matter."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.channels.channel import Job, Outcome
from engine.jobs.claims import CLAIM_HORIZON_SECONDS, Claim, Done, Leased, Look, Waiting, believable, replaces
from engine.jobs.life import (
    ALONE_SECONDS,
    DELIVERIES_MAX,
    AskDeliveries,
    Drop,
    Follow,
    Go,
    Poison,
    PutBack,
    Step,
    judge,
)
from engine.jobs.receipts import receipts_of
from projections.folds.deliveries import rank

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
SECONDS = NOW.timestamp()
JOB = Job(id="n", tenant="t", user="u", type="a", channel="push", attempt=1, first_at=NOW - timedelta(hours=1))
DONE = Done(1, "sent", "ok", Outcome(kind="ok"))


def look(claim: Claim | None, *, until: float = 0, written: float = -60, born: float = -1e6) -> Look:
    return Look(claim, b"raw", SECONDS + until, SECONDS + written, SECONDS, SECONDS + born)


def asked(claim: Claim | None, job: Job = JOB, deliveries: int = 1, *, held_seconds: float = 1, **times: float) -> Step:
    return judge(job, deliveries, look(claim, **times), "me", held_seconds=held_seconds)


@pytest.mark.parametrize(
    ("claim", "step"),
    [
        (None, Go()),
        (DONE, Follow(DONE)),
        (Waiting(2, NOW), Follow(Waiting(2, NOW))),
        (Waiting(1, NOW, lost=2, doubt=True), Go(None, 2, doubtful=True)),
        (Waiting(0, NOW), Go()),
        (Leased(2, "they"), Drop()),
        (Leased(1, "they"), Go("lease_lost", 1, doubtful=True)),
        (Leased(1, "me", lost=1), Go(None, 1)),
        (Leased(0, "they"), Go()),
    ],
)
def test_the_claim_says_what_to_do(claim: Claim | None, step: Step) -> None:
    found = asked(claim)
    assert (type(found), found) == (type(step), step)


def test_a_lease_that_runs_is_waited_for_whoever_asks_but_its_owner() -> None:
    assert asked(Leased(1, "they"), until=20) == PutBack(21.0, "busy")
    assert asked(Leased(0, "they"), until=20) == PutBack(21.0, "busy")
    assert asked(Leased(1, "me"), until=20) == Go()


def test_without_the_store_only_what_may_be_repeated_goes_on_and_it_says_so() -> None:
    assert judge(JOB, 1, None, "me", held_seconds=1) == Go("unclaimed", 1, doubtful=True)
    for semantics in ("effectively_once", "at_most_once"):
        step = judge(replace(JOB, semantics=semantics), 1, None, "me", held_seconds=1)
        assert isinstance(step, PutBack)


def test_a_message_that_nobody_can_have_worked_on_needs_no_claim_to_be_believed() -> None:
    assert asked(None, born=-1) == Go()
    assert isinstance(asked(None, deliveries=2, born=-1), AskDeliveries)
    assert isinstance(asked(None, replace(JOB, again=True), born=-1), AskDeliveries)
    assert isinstance(asked(None, held_seconds=ALONE_SECONDS + 1, born=-1), AskDeliveries), "it stood still meanwhile"
    assert asked(None, deliveries=2) == Go(), "the store has been there all the time"
    digest = replace(JOB, digest="news/2026-03-04T11:00:00Z")
    assert isinstance(asked(None, digest, born=-1), AskDeliveries), "each record planned late has a message of its own"
    assert asked(None, digest) == Go()


def test_what_deliveries_show_counts_where_a_claim_may_be_lost_and_else_it_is_in_doubt() -> None:
    found = look(None, born=-1)
    assert judge(JOB, 2, found, "me", held_seconds=1, asked=True, ended=DONE) == Follow(DONE)
    assert judge(JOB, 2, found, "me", held_seconds=1, asked=True, ended=None) == Go("forgotten", 1, doubtful=True)


def test_a_claim_of_a_former_run_of_the_store_may_not_be_the_last() -> None:
    assert isinstance(asked(Waiting(1, NOW), deliveries=2, born=-30), AskDeliveries)
    assert asked(Waiting(1, NOW), deliveries=2, born=-90) == Go()


def test_a_job_that_was_seen_untried_outlives_the_memory_of_claims() -> None:
    old = replace(JOB, again=True, first_at=NOW - timedelta(seconds=CLAIM_HORIZON_SECONDS + 1))
    assert isinstance(asked(None, old), AskDeliveries)
    assert asked(None, replace(old, untried_at=NOW - timedelta(days=1))) == Go()
    assert isinstance(asked(None, replace(old, untried_at=NOW - timedelta(days=30)), born=-1e7), AskDeliveries)


def test_a_job_of_a_campaign_whose_claim_may_be_let_go_is_looked_for_in_deliveries_and_is_no_doubt_else() -> None:
    campaign = replace(JOB, lane="bulk")
    assert asked(None, campaign) == Go(), "nobody else has its message"
    assert isinstance(asked(None, campaign, deliveries=2), AskDeliveries)
    assert judge(campaign, 2, look(None), "me", held_seconds=1, asked=True, ended=DONE) == Follow(DONE)
    assert judge(campaign, 2, look(None), "me", held_seconds=1, asked=True, ended=None) == Go()
    young = replace(campaign, untried_at=NOW - timedelta(seconds=60))
    assert asked(None, young, deliveries=2) == Go()


def test_poison_ends_and_says_whether_it_may_have_been_sent() -> None:
    assert asked(None, deliveries=DELIVERIES_MAX) == Go()
    assert asked(None, deliveries=DELIVERIES_MAX + 1) == Poison(doubtful=False)
    assert asked(Leased(1, "they"), deliveries=DELIVERIES_MAX + 1) == Poison(doubtful=True)
    assert asked(DONE, deliveries=100) == Follow(DONE), "what has ended is no poison"
    assert isinstance(asked(Leased(1, "they"), deliveries=100, until=5), PutBack)


outcomes = st.builds(Outcome, kind=st.sampled_from(["ok", "transient", "ambiguous", "permanent", "target_invalid"]))
ends = st.sampled_from(["sent", "failed", "suppressed", "expired", "cancelled", "ambiguous", "split"])
counts = st.integers(0, 3)
claims = (
    st.none()
    | st.builds(Leased, counts, st.sampled_from(["me", "they"]), counts, st.booleans())
    | st.builds(Waiting, counts, st.just(NOW), st.none(), outcomes, counts, st.booleans())
    | st.builds(Done, counts, ends, st.just("x"), st.none() | outcomes)
)
news = claims.filter(lambda claim: isinstance(claim, Waiting | Done))
times = st.floats(-1000, 1000)


@given(
    claim=claims,
    attempt=counts,
    deliveries=st.integers(1, 8),
    again=st.booleans(),
    until=times,
    written=times,
    born=times,
    away=st.booleans(),
    ended=st.none() | st.just(DONE),
)
def test_every_job_has_an_answer_and_nothing_that_has_ended_is_sent(
    claim: Claim | None,
    attempt: int,
    deliveries: int,
    again: bool,
    until: float,
    written: float,
    born: float,
    away: bool,
    ended: Done | None,
) -> None:
    job = replace(JOB, attempt=attempt, again=again)
    found = None if away else look(claim, until=until, written=written, born=born)
    step = judge(job, deliveries, found, "me", held_seconds=1, asked=True, ended=ended)
    assert not isinstance(step, AskDeliveries), "it was asked"
    if found is None:
        return
    if isinstance(claim, Done):
        assert step == Follow(claim)
    if isinstance(step, Go) and step.doubt is None and (deliveries > 1 or again):
        assert believable(found, job)
        assert not (isinstance(claim, Leased) and claim.attempt == attempt and claim.owner != "me")


@given(new=news, found=claims, attempt=counts)
def test_an_acceptance_is_never_lost_and_what_has_ended_ends_otherwise_only_by_one(
    new: Waiting | Done, found: Claim | None, attempt: int
) -> None:
    stored = replaces(new, found, Leased(attempt, "me"))
    sent = isinstance(new, Done) and new.end == "sent"
    if sent:
        assert stored is not None or (isinstance(found, Done) and found.end == "sent")
    if isinstance(found, Done) and stored is not None:
        assert sent
    if stored is not None and isinstance(found, Leased) and found.owner == "they" and found.attempt >= attempt:
        assert sent


@example(new=Done(0, "sent", "ok"), found=Done(0, "failed", "x"))
@given(new=news, found=claims)
def test_a_late_acceptance_is_what_deliveries_show(new: Waiting | Done, found: Claim | None) -> None:
    """In their fold the later attempt wins, and within one what was sent wins over all but what has failed."""
    stored = replaces(new, found, Leased(JOB.attempt, "me"))
    if not isinstance(stored, Done) or stored.end != "sent" or not isinstance(found, Waiting | Done):
        return
    before = [rank(one.state, one.attempt) for one in receipts_of(JOB, found, NOW)]
    [after] = [rank(one.state, one.attempt) for one in receipts_of(JOB, stored, NOW)]
    assert all(one < after for one in before)
