"""A provider's answer is judged by its code, else by its status, else by its class; what no table names is said to be unknown."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Outcome
from engine.channels.email.tables import POSTMARK
from engine.channels.sms.tables import SNS, TWILIO
from engine.channels.verdicts import RETRY_AFTER_SECONDS_MAX, Table
from engine.channels.webhook.schedule import TABLE

TABLES = {"twilio": TWILIO, "sns": SNS, "webhook": TABLE}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@given(status=st.integers(0, 999), code=st.text(max_size=12), wait=st.none() | st.floats(0, allow_nan=False))
def test_every_answer_has_a_verdict_and_no_wait_is_endless(table: Table, status: int, code: str, wait: float) -> None:
    outcome = table.judged("p", status, code, retry_after_seconds=wait)
    assert outcome.retry_after_seconds is None or 0 <= outcome.retry_after_seconds <= RETRY_AFTER_SECONDS_MAX
    if outcome.kind not in ("transient", "throttled"):
        assert outcome.retry_after_seconds is None
    assert msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome) == outcome


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_code_decides_whatever_status_it_comes_with(table: Table) -> None:
    for code, verdict in table.codes.items():
        for status in (0, 200, 400, 429, 500):
            outcome = table.judged("p", status, code)
            assert (outcome.kind, outcome.scope, outcome.known) == (verdict.kind, verdict.scope, True)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(400, "99999", "permanent"), (503, "99999", "transient"), (429, "99999", "throttled"), (418, "", "permanent"),
    (302, "", "transient")],
)  # fmt: skip
def test_an_unknown_answer_is_judged_by_its_class_and_said_to_be_unknown(status: int, code: str, kind: str) -> None:
    outcome = TWILIO.judged("p", status, code)
    assert (outcome.kind, outcome.known) == (kind, False)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_only_a_2xx_is_ever_taken_for_success(table: Table) -> None:
    assert [status for status in range(100, 600) if table.judged("p", status).kind == "ok"] == list(range(200, 300))


def test_what_the_provider_asks_for_wins_over_the_table() -> None:
    assert POSTMARK.judged("p", 0, "405").retry_after_seconds == 3600
    assert POSTMARK.judged("p", 503, "405", retry_after_seconds=7).retry_after_seconds == 7
