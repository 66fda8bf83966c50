"""What push providers say, read: nothing that is sent breaks it, no dead token is seen where there is none, no token is kept."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Outcome
from engine.channels.push.apns_answers import apns_outcome
from engine.channels.push.fcm_answers import fcm_outcome
from engine.channels.push.webpush_answers import Refusals, webpush_outcome
from engine.channels.retry_after import retry_after

STATUSES = st.integers(100, 599)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["reason", "timestamp", "error", "details", "@type", "errorCode", "fieldViolations", "errno", "name"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
BODIES = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


@given(STATUSES, BODIES)
def test_any_answer_is_an_outcome_and_an_unknown_one_retires_no_token(status: int, body: bytes) -> None:
    found = [
        apns_outcome("p", status, body, "", None),
        fcm_outcome("p", status, body),
        webpush_outcome("p", status, body),
    ]
    for outcome in found:
        assert (outcome.kind == "ok") is (200 <= status < 300)
        assert outcome.kind != "target_invalid" or outcome.known
        if status >= 500:
            assert outcome.kind in ("transient", "config", "target_invalid")
            assert outcome.known or outcome.kind == "transient"


@given(
    STATUSES,
    st.from_regex(r"[0-9a-f]{64}|https://[a-z]+/[a-z0-9]{20}|[A-Za-z0-9]{1,20}[0-9][A-Za-z0-9:_-]{20}", fullmatch=True),
)
def test_a_token_that_a_provider_repeats_is_not_stored(status: int, token: str) -> None:
    said = [
        apns_outcome("p", status, json.dumps({"reason": token}).encode(), "", None),
        fcm_outcome(
            "p", status, json.dumps({"error": {"details": [{"@type": "FcmError", "errorCode": token}]}}).encode()
        ),
        webpush_outcome("p", status, json.dumps({"reason": token}).encode()),
    ]
    assert all(token not in outcome.code for outcome in said)


@pytest.mark.parametrize("timestamp", [None, "1700000000000", True, -1, 0, 1 << 60, 1e300, [1], {"a": 1}], ids=str)
def test_a_time_that_is_none_is_left_out(timestamp: object) -> None:
    outcome = apns_outcome("p", 410, json.dumps({"reason": "Unregistered", "timestamp": timestamp}).encode(), "", None)
    assert (outcome.kind, outcome.target_invalid_at) == ("target_invalid", None)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 120 ", 120.0),
        ("0", 0.0),
        ("999999999", 86_400.0),
        ("Sun, 29 Nov 2026 12:01:30 GMT", 90.0),
        ("Sun, 29 Nov 2026 11:00:00 GMT", 0.0),
        ("Sat, 01 Jan 2028 00:00:00 GMT", 86_400.0),
        (None, None),
        ("", None),
        ("-5", None),
        ("1e9", None),
        ("soon", None),
        ("٣", None),
        ("Sun, 99 Nov 2026 12:01:30 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_never_longer_than_a_day(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


@given(st.text(max_size=60))
def test_no_retry_after_breaks_the_sender(value: str) -> None:
    found = retry_after(value, NOW)
    assert found is None or 0 <= found <= 86_400


@given(st.integers(-40 * 86_400, 40 * 86_400))
def test_dates_of_http_are_counted_from_now(offset: int) -> None:
    value = (NOW + timedelta(seconds=offset)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert retry_after(value, NOW) == min(max(offset, 0), 86_400)


REFUSED = Outcome(kind="config", provider="p", code="403", scope="domain")


def test_an_endpoint_refused_twice_while_others_pass_is_invalid() -> None:
    refusals = Refusals()
    assert refusals.judged(REFUSED, "apple", b"dead").kind == "transient", "one refusal proves nothing"
    refusals.accepted("apple", b"alive")
    assert refusals.judged(REFUSED, "apple", b"dead").kind == "target_invalid"


def test_a_wrong_key_retires_nobody_however_often_it_is_refused() -> None:
    """Accepts from before the key was changed do not count."""
    refusals = Refusals()
    for endpoint in range(50):
        refusals.accepted("apple", b"%d" % endpoint)
    kinds = [refusals.judged(REFUSED, "apple", b"%d" % endpoint).kind for _ in range(4) for endpoint in range(50)]
    assert kinds[:2] == ["transient", "transient"]
    assert set(kinds[2:]) == {"config"}


def test_one_endpoint_alone_is_never_called_a_wrong_key_nor_invalid() -> None:
    refusals = Refusals()
    assert {refusals.judged(REFUSED, "apple", b"only").kind for _ in range(20)} == {"transient"}


def test_what_one_service_takes_says_nothing_of_another() -> None:
    refusals = Refusals()
    refusals.judged(REFUSED, "apple", b"x")
    refusals.accepted("mozilla", b"y")
    assert refusals.judged(REFUSED, "apple", b"x").kind == "transient"


def test_an_endpoint_that_is_taken_again_starts_anew() -> None:
    refusals = Refusals()
    refusals.judged(REFUSED, "apple", b"x")
    refusals.accepted("apple", b"x")
    assert refusals.judged(REFUSED, "apple", b"x").kind == "transient"


def test_refused_endpoints_without_number_do_not_fill_the_memory() -> None:
    refusals = Refusals()
    for count in range(Refusals.ENDPOINTS_MAX + 50):
        refusals.judged(REFUSED, "apple", b"%d" % count)
    for count in range(Refusals.ORIGINS_MAX + 50):
        refusals.judged(REFUSED, f"origin{count}", b"x")
    assert len(refusals._origins) == Refusals.ORIGINS_MAX
    assert all(len(one.refused) <= Refusals.ENDPOINTS_MAX for one in refusals._origins.values())
