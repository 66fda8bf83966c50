"""What providers report of texts, and what people answer."""

import base64
import hashlib
import hmac
import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.sms.callbacks import inbound_of, inbound_of_sns, is_signed_by_twilio, report_of
from engine.channels.sms.keywords import keyword_of
from projections.folds.deliveries import delivery_of
from seamark.protocol.receipts import Receipt

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
URL = "https://mycompany.com/myapp.php?foo=1&bar=2"
FORM = [("CallSid", "CA1234567890ABCDE"), ("From", "+12349013030"), ("To", "+18005551212"), ("Caller", "+12349013030"),
        ("Digits", "1234")]  # fmt: skip
SIGNATURE = "0/KCTR6DLpKmkAf8muzZqo1nDgQ="
"""What Twilio's own libraries are tested with, for the token 12345."""

forms = st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=6)


def test_a_request_of_twilio_is_recognised_by_either_of_two_secrets() -> None:
    assert is_signed_by_twilio(URL, FORM, SIGNATURE, ["12345"])
    assert is_signed_by_twilio(URL, FORM, SIGNATURE, ["new", "12345"])
    assert is_signed_by_twilio(URL, FORM, SIGNATURE, ["12345", "new"])
    assert is_signed_by_twilio(URL, FORM[::-1], SIGNATURE, ["12345"])


@pytest.mark.parametrize(
    ("url", "form", "signature", "secrets"),
    [
        (URL + "0", FORM, SIGNATURE, ["12345"]),
        (URL.replace("https", "http"), FORM, SIGNATURE, ["12345"]),
        (URL, FORM[:-1], SIGNATURE, ["12345"]),
        (URL, [*FORM, ("ErrorCode", "21610")], SIGNATURE, ["12345"]),
        (URL, [*FORM[:-1], ("Digits", "12345")], SIGNATURE, ["12345"]),
        (URL, FORM, SIGNATURE.replace("0", "1", 1), ["12345"]),
        (URL, FORM, "", ["12345"]),
        (URL, FORM, "\udcff", ["12345"]),
        (URL, FORM, SIGNATURE, ["1234"]),
        (URL, FORM, SIGNATURE, []),
    ],
)
def test_what_anybody_else_has_made_or_changed_is_refused(url, form, signature, secrets) -> None:
    assert not is_signed_by_twilio(url, form, signature, secrets)


@given(forms, forms)
def test_a_signature_is_good_for_one_form_only(form, other) -> None:
    text = URL + "".join(name + value for name, value in sorted(set(form)))
    made = base64.b64encode(hmac.new(b"token", text.encode(), hashlib.sha1).digest()).decode()
    assert is_signed_by_twilio(URL, form, made, ["token"])
    same = text == URL + "".join(name + value for name, value in sorted(set(other)))
    assert is_signed_by_twilio(URL, other, made, ["token"]) == same


@pytest.mark.parametrize(
    ("status", "code", "state", "kind"),
    [
        ("queued", "", "sent", None),
        ("sent", "", "sent", None),
        ("delivered", "", "delivered", None),
        ("read", "", "delivered", None),
        ("undelivered", "30003", "failed", "transient"),
        ("undelivered", "30005", "failed", "target_invalid"),
        ("undelivered", "30007", "failed", "permanent"),
        ("failed", "21610", "failed", "opted_out"),
        ("failed", "", "failed", "transient"),
    ],
)
def test_a_report_says_how_a_text_has_fared(status: str, code: str, state: str, kind: str | None) -> None:
    report = report_of("twilio", {"MessageSid": "SM1", "MessageStatus": status, "ErrorCode": code}, NOW)
    assert report is not None
    assert (report.provider_id, report.state) == ("SM1", state)
    assert (report.outcome.kind if report.outcome else None) == kind


@pytest.mark.parametrize(
    "form", [{}, {"MessageSid": "SM1"}, {"MessageSid": "SM1", "MessageStatus": "novel"}, {"MessageStatus": "sent"}]
)
def test_a_report_that_says_nothing_changes_nothing(form: dict[str, str]) -> None:
    assert report_of("twilio", form, NOW) is None


@given(st.lists(st.sampled_from(["sent", "failed", "delivered"]), min_size=1, max_size=3))
def test_reports_in_any_order_and_number_come_to_the_same_and_delivered_wins(states: list[str]) -> None:
    ends = set()
    for order in itertools.permutations([*states, states[0]]):
        known, *others = [delivery_of(Receipt("u", "sms", state, NOW, id="n", attempt=1)) for state in order]
        for other in others:
            known.merge(other)
        ends.add(known.state)
    assert ends == {max(states, key=["sent", "failed", "delivered"].index)}


@pytest.mark.parametrize(
    ("text", "keyword"),
    [
        ("STOP", "stop"), ("stop", "stop"), (" Stop. ", "stop"), ("STOP!!", "stop"), ("Stop all", "stop"),
        ("unsubscribe", "stop"),
        ("arrêt", "stop"), ("opt-out", "stop"), ("START", "start"), ("unstop", "start"), ("yes", "start"), ("help", "help"),
        ("ＳＴＯＰ", "stop"),
        ("Please don't stop!", None), ("stop it, I love it", None), ("", None), ("...", None), ("STOPP", "stop"),
        ("stop" * 50, None),
        ("no", None), ("restart", None),
    ],
)  # fmt: skip
def test_a_keyword_is_one_only_when_nothing_else_is_said(text: str, keyword: str | None) -> None:
    assert keyword_of(text) == keyword


@given(st.text(max_size=60))
def test_nothing_is_taken_for_a_start_that_twilio_would_not_take_for_one(text: str) -> None:
    if keyword_of(text) == "start":
        assert (
            "".join(c for c in text if c.isascii() and c.isalpha()).upper() in ("START", "YES", "UNSTOP")
            or not text.isascii()
        )


def test_an_answer_is_read_and_its_text_and_numbers_are_not_shown() -> None:
    form = {"MessageSid": "SM1", "From": "+15551234567", "To": "+15557654321", "Body": "my secret", "OptOutType": ""}
    inbound = inbound_of(form)
    assert inbound is not None
    assert (inbound.number, inbound.keyword) == ("+15551234567", None)
    assert "555" not in repr(inbound)
    assert "secret" not in repr(inbound)
    assert inbound_of({**form, "OptOutType": "STOP"}).keyword == "stop"
    assert inbound_of({**form, "From": ""}) is None


def test_what_amazon_publishes_of_an_answer_is_read_and_nothing_else() -> None:
    said = {"originationNumber": "+4366412345678", "destinationNumber": "+18005551212", "messageBody": "Stop.",
        "inboundMessageId": "in-1"}  # fmt: skip
    found = inbound_of_sns(said, NOW)
    assert found is not None
    assert (found.number, found.keyword, found.at) == ("+4366412345678", "stop", NOW)
    assert "+43" not in repr(found)
    for name in ("originationNumber", "messageBody", "inboundMessageId"):
        assert inbound_of_sns({**said, name: 7}, NOW) is None
