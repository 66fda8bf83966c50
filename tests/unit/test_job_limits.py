"""What keeps providers from being overrun: retry policies, the bucket, the breaker, the budget of retries."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Job, Outcome
from engine.jobs import breaker as breakers
from engine.jobs import budget as budgets
from engine.jobs.breaker import Breaker
from engine.jobs.bucket import PACE_MIN, Level, Limit, pace, refused, take
from engine.jobs.budget import Budget
from engine.jobs.claims import Done, Leased, Waiting
from engine.jobs.retry import POLICIES, PUT_BACK_SECONDS_MAX, RetryPolicy, put_back_seconds, settle

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
CHANNELS = sorted(POLICIES)

draws = st.floats(0, 1, exclude_max=True)
kinds = st.sampled_from(
    ["ok", "transient", "throttled", "permanent", "target_invalid", "opted_out", "config", "expired", "ambiguous"]
)


def job(channel: str = "push", **more: object) -> Job:
    return Job(id="n", tenant="t", user="u", type="a.b", channel=channel, first_at=NOW, **more)  # type: ignore[arg-type]


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", CHANNELS)
@given(
    outcomes=st.lists(
        st.tuples(kinds.filter("config".__ne__), draws, st.none() | st.floats(0, 1e5)), min_size=40, max_size=60
    )
)
def test_every_job_ends_within_the_cap_and_the_horizon_of_its_channel(
    channel: str, outcomes: list[tuple[str, float, float | None]]
) -> None:
    policy, tried, now, tries, attempt, doubt = POLICIES[channel], None, NOW, 0, 0, False
    for kind, draw, retry_after in outcomes:
        tries += 1
        outcome = Outcome(kind=kind, retry_after_seconds=retry_after if kind == "throttled" else None)  # type: ignore[arg-type]
        current = job(channel, tried_at=tried)
        next_ = settle(current, Leased(attempt, "o", 0, doubt), outcome, policy, now, draw, repeatable=True)
        if isinstance(next_, Done):
            break
        assert next_.due >= now
        if outcome.retry_after_seconds is not None:
            asked = outcome.retry_after_seconds
            if channel == "webhook":
                asked = min(asked, 2 * max(policy.throttled_seconds_min, policy.delays_seconds[attempt]))
            # Names of schedules have milliseconds.
            assert (next_.due - now).total_seconds() >= asked - 0.001
        now, attempt, tried, doubt = next_.due, next_.attempt, next_.tried_at, next_.doubt
    else:
        pytest.fail("it never ended")
    assert tries <= policy.tries_max
    assert now - NOW <= timedelta(seconds=policy.horizon_seconds)


@pytest.mark.parametrize("channel", CHANNELS)
def test_the_whole_ladder_of_a_channel_fits_into_its_horizon(channel: str) -> None:
    policy = POLICIES[channel]
    assert sum(policy.delays_seconds) * policy.shares[1] <= policy.horizon_seconds * 1.2
    assert all(one <= other for one, other in pairwise(policy.delays_seconds))


def test_fcm_is_left_alone_for_ten_seconds_before_the_first_retry() -> None:
    assert POLICIES["push"].pause_seconds(1, 0.0) >= 10


@given(draw=draws, asked=st.floats(0, 1e6))
def test_what_the_provider_asks_for_wins(draw: float, asked: float) -> None:
    waited = RetryPolicy((1,), (0, 1), 60).pause_seconds(1, draw, retry_after_seconds=asked, slower=10)
    assert asked <= waited <= asked * 1.1


@given(kind=kinds, repeatable=st.booleans(), doubt=st.booleans(), attempt=st.integers(0, 30), lost=st.integers(0, 5))
def test_nothing_in_doubt_is_said_to_have_failed_and_nothing_is_repeated_that_must_not_be(
    kind: str, repeatable: bool, doubt: bool, attempt: int, lost: int
) -> None:
    lease, outcome = Leased(attempt, "o", lost, doubt), Outcome(kind=kind)  # type: ignore[arg-type]
    next_ = settle(job(), lease, outcome, POLICIES["push"], NOW, 0.5, repeatable=repeatable)
    if isinstance(next_, Waiting):
        assert kind in {"transient", "throttled", "config"} or (kind == "ambiguous" and repeatable)
        assert next_.attempt + lost < POLICIES["push"].tries_max or kind == "config"
        assert next_.doubt == (doubt or kind == "ambiguous")
    elif kind == "ok":
        assert next_.end == "sent"
    else:
        assert (next_.end == "ambiguous") == (doubt or kind == "ambiguous")


def test_a_wrong_set_up_costs_no_attempt() -> None:
    next_ = settle(job(), Leased(2, "o"), Outcome(kind="config"), POLICIES["push"], NOW, 0.5, repeatable=True)
    assert isinstance(next_, Waiting)
    assert next_.attempt == 2


def test_a_try_for_which_no_connection_was_free_costs_no_attempt() -> None:
    busy = Outcome(kind="transient", code="busy", begun=False)
    next_ = settle(job("email"), Leased(18, "o"), busy, POLICIES["email"], NOW, 0.5, repeatable=True)
    assert isinstance(next_, Waiting)
    assert next_.attempt == 18
    assert timedelta(seconds=30) <= next_.due - NOW <= timedelta(seconds=60)


def test_what_a_target_brings_about_costs_attempts_as_nobody_mends_it() -> None:
    outcome = Outcome(kind="config", code="blocked", scope="target")
    next_ = settle(job("webhook"), Leased(2, "o"), outcome, POLICIES["webhook"], NOW, 0.5, repeatable=True)
    assert isinstance(next_, Waiting)
    assert next_.attempt == 3
    last = Leased(POLICIES["webhook"].tries_max - 1, "o")
    ended = settle(job("webhook"), last, outcome, POLICIES["webhook"], NOW, 0.5, repeatable=True)
    assert isinstance(ended, Done)
    assert ended.end == "failed"


@given(put_backs=st.integers(0, 10_000), draw=draws, first=st.floats(1, 20))
def test_what_waits_for_long_is_written_anew_once_in_a_minute_and_comes_back_a_minute_and_a_half_late(
    put_backs: int, draw: float, first: float
) -> None:
    waits = put_back_seconds(put_backs, first, draw)
    assert first <= waits <= 1.5 * PUT_BACK_SECONDS_MAX
    assert waits >= PUT_BACK_SECONDS_MAX or put_backs < 6
    assert put_back_seconds(0, first, draw) <= 1.5 * first, "and what has just begun to wait soon"


def test_what_would_be_tried_after_it_has_expired_has_ended() -> None:
    current = job(expires_at=NOW + timedelta(seconds=1))
    next_ = settle(current, Leased(0, "o"), Outcome(kind="transient"), POLICIES["push"], NOW, 0.5, repeatable=True)
    assert isinstance(next_, Done)


# --- the bucket ------------------------------------------------------------------------------------------------------

gaps = st.lists(st.floats(0, 0.5), min_size=1, max_size=200)


@given(gaps=gaps, per_second=st.floats(1, 500), burst=st.integers(1, 20), most=st.floats(0, 1))
def test_in_any_time_no_more_goes_than_the_contract_allows(
    gaps: list[float], per_second: float, burst: int, most: float
) -> None:
    limit, level, now, went = Limit(per_second, burst), Level(), 0.0, []
    for gap in gaps:
        now += gap
        level, taken, seconds = take(level, limit, now, wait_seconds_max=most)
        if taken:
            assert 0 <= seconds <= most
            went.append(now + seconds)
        else:
            assert seconds > 0
    for first, start in enumerate(went):
        for last in range(first, len(went)):
            assert last - first + 1 <= per_second * (went[last] - start) + burst + 1e-6


@given(gaps=gaps, per_second=st.floats(1, 500))
def test_who_waits_as_long_as_he_is_told_is_given_a_slot(gaps: list[float], per_second: float) -> None:
    limit, level, now = Limit(per_second), Level(), 0.0
    for gap in gaps:
        now += gap / 100
        level, taken, seconds = take(level, limit, now)
        if not taken:
            now += seconds + 1e-9
            level, taken, _ = take(level, limit, now)
            assert taken


@given(times=st.lists(st.floats(0, 100), max_size=30))
def test_refusals_halve_the_pace_at_most_once_a_second_and_it_comes_back(times: list[float]) -> None:
    level, halved = Level(), 0
    for now in sorted(times):
        before, level = pace(level, now), refused(level, now)
        assert pace(level, now) in (pytest.approx(before), pytest.approx(max(PACE_MIN, before / 2)))
        halved += pace(level, now) < before
    assert halved <= 101
    assert pace(level, 1e6) == 1.0


# --- the breaker -----------------------------------------------------------------------------------------------------

DOWN, OK = Outcome(kind="transient", code="503"), Outcome(kind="ok")


def test_a_provider_that_is_down_is_tried_no_more_and_found_again_by_one_probe() -> None:
    breaker, now = Breaker(), 100.0
    for _ in range(breakers.IN_A_ROW):
        assert breaker.wait_seconds(now) == 0
        breaker = breaker.begun(now).told(DOWN, now + 0.1)
        now += 0.2
    assert breaker.state == "open"
    assert breaker.why == "503"
    now += breaker.wait_seconds(now)
    breaker = breaker.begun(now)
    assert breaker.wait_seconds(now) > 0, "one probe, no more"
    longer = breaker.told(DOWN, now)
    assert longer.wait_seconds(now) == 2 * breakers.PAUSE_SECONDS
    assert breaker.told(OK, now) == Breaker(halved_at=now)


def test_it_opens_within_five_seconds_of_traffic_that_fails_by_half() -> None:
    breaker, now = Breaker(), 0.0
    for number in range(10_000):  # a long time at 100/s in which all is well
        now = number / 100
        breaker = breaker.told(OK, now)
    down_at = now
    while breaker.state == "closed":
        now += 0.01
        breaker = breaker.told(DOWN, now)
    assert now - down_at <= breakers.LATE_SECONDS
    breaker = Breaker(halved_at=now)
    for number in range(2_000):
        breaker = breaker.told(DOWN if number % 2 else OK, now + number / 100)
        if breaker.state == "open":
            break
    assert breaker.state == "open"


@given(st.lists(st.tuples(kinds, st.floats(0, 10), st.booleans()), max_size=80))
def test_no_sequence_of_answers_keeps_a_provider_closed_for_ever(steps: list[tuple[str, float, bool]]) -> None:
    breaker, now = Breaker(), 0.0
    for kind, gap, begins in steps:
        now += gap
        if begins and breaker.wait_seconds(now) == 0:
            breaker = breaker.begun(now)
        breaker = breaker.told(Outcome(kind=kind), now)  # type: ignore[arg-type]
        assert breaker.wait_seconds(now) <= breakers.CONFIG_PAUSE_SECONDS + 1e-6
    now += breaker.wait_seconds(now)
    assert breaker.begun(now).told(OK, now).state == "closed"


@pytest.mark.parametrize("kind", ["permanent", "target_invalid", "opted_out", "throttled", "expired"])
def test_what_is_wrong_with_a_job_says_nothing_of_its_provider(kind: str) -> None:
    breaker = Breaker()
    for now in range(100):
        breaker = breaker.told(Outcome(kind=kind), float(now))  # type: ignore[arg-type]
    assert breaker.state == "closed"


# --- the budget ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=200))
def test_retries_are_slowed_down_exactly_while_they_are_too_large_a_share(sends: list[tuple[bool, float]]) -> None:
    budget, now = Budget(), 0.0
    for retry, gap in sends:
        now += gap
        budget = budget.told(now, retry=retry)
        spent = budget.retries >= max(budgets.FREE, budget.sends * budgets.SHARE)
        assert budget.slower(now) == (budgets.SLOWER if spent else 1.0)
        assert budget.retries <= budget.sends
    assert budget.slower(now + 3600) == 1.0


def test_a_storm_of_retries_spends_the_budget_and_ordinary_traffic_does_not() -> None:
    storm, calm = Budget(), Budget()
    for number in range(1000):
        storm = storm.told(number / 100, retry=number % 2 == 1)
        calm = calm.told(number / 100, retry=number % 20 == 1)
    assert (storm.slower(10), calm.slower(10)) == (budgets.SLOWER, 1.0)
