"""When a webhook is tried again: 5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h, each a fifth shorter or longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Outcome
from engine.channels.webhook.schedule import DELAYS_SECONDS, TABLE
from engine.jobs.retry import POLICIES

FAILED = TABLE.judged("webhook", 500)
draws = st.floats(0, 1, exclude_max=True)


def delay_seconds(attempt: int, outcome: Outcome, draw: float) -> float:
    asked, throttled = outcome.retry_after_seconds, outcome.kind == "throttled"
    return POLICIES["webhook"].pause_seconds(attempt, draw, retry_after_seconds=asked, throttled=throttled)


def test_the_delays_are_those_of_standard_webhooks() -> None:
    hours = [delay_seconds(attempt, FAILED, 0.5) / 3600 for attempt in range(1, 10)]
    assert hours == pytest.approx([5 / 3600, 5 / 60, 0.5, 2, 5, 10, 14, 20, 24])
    assert POLICIES["webhook"].tries_max == 10
    assert sum(DELAYS_SECONDS) / 3600 == pytest.approx(75.6, abs=0.1)


@given(attempt=st.integers(1, 9), draw=draws)
def test_chance_moves_a_delay_by_a_fifth_at_most(attempt: int, draw: float) -> None:
    due = DELAYS_SECONDS[attempt - 1]
    assert 0.8 * due <= delay_seconds(attempt, FAILED, draw) <= 1.2 * due


@given(
    attempt=st.integers(1, 9), asked=st.none() | st.floats(0, 1e9), draw=draws, status=st.sampled_from([429, 502, 504])
)
def test_a_throttled_endpoint_is_left_alone_for_a_minute_or_as_it_asks_up_to_twice_the_slot(
    attempt, asked, draw, status
) -> None:
    due = DELAYS_SECONDS[attempt - 1]
    outcome = TABLE.judged("webhook", status, retry_after_seconds=asked)
    wait = delay_seconds(attempt, outcome, draw)
    most = 2 * max(60, due)
    assert wait >= min(max(60, outcome.retry_after_seconds or 0), most)
    assert wait <= 1.2 * most
