"""When a webhook is tried again: 5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h, each a fifth shorter or longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.webhook.schedule import DELAYS_SECONDS, TABLE, delay_seconds

FAILED = TABLE.judged("webhook", 500)
chances = st.floats(0, 1, exclude_max=True)


def test_the_delays_are_those_of_standard_webhooks() -> None:
    hours = [delay_seconds(attempt, FAILED, lambda: 0.5) / 3600 for attempt in range(1, 10)]
    assert hours == pytest.approx([5 / 3600, 5 / 60, 0.5, 2, 5, 10, 14, 20, 24])
    assert delay_seconds(10, FAILED, lambda: 0.5) is None
    assert sum(DELAYS_SECONDS) / 3600 == pytest.approx(75.6, abs=0.1)


@given(attempt=st.integers(1, 9), chance=chances)
def test_chance_moves_a_delay_by_a_fifth_at_most(attempt: int, chance: float) -> None:
    due = DELAYS_SECONDS[attempt - 1]
    assert 0.8 * due <= delay_seconds(attempt, FAILED, lambda: chance) <= 1.2 * due


@given(attempt=st.integers(1, 9), asked=st.none() | st.floats(0, 1e9), chance=chances, status=st.sampled_from([429, 502, 504]))
def test_a_throttled_endpoint_is_left_alone_for_a_minute_or_as_it_asks_up_to_twice_the_slot(attempt, asked, chance, status) -> None:
    due = DELAYS_SECONDS[attempt - 1]
    outcome = TABLE.judged("webhook", status, retry_after_seconds=asked)
    wait = delay_seconds(attempt, outcome, lambda: chance)
    most = 2 * max(60, due)
    assert wait >= min(max(60, outcome.retry_after_seconds or 0), most)
    assert wait <= 1.2 * most


def test_nothing_is_said_of_attempts_beyond_the_last() -> None:
    assert delay_seconds(10, TABLE.judged("webhook", 429, retry_after_seconds=5), lambda: 0.0) is None
