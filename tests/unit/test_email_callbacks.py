"""What mail services report becomes what it means for an address, and only if they have said it themselves."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.bounces import (
    COMPLAINED,
    SOFT_BOUNCES_MAX,
    SOFT_SUPPRESSED,
    SOFT_WINDOW,
    may_suppress,
    suppression_of,
)
from engine.channels.channel import Outcome
from engine.channels.email.callbacks import (
    is_authorized,
    is_signed_by_sendgrid,
    of_postmark,
    of_sendgrid,
    of_ses,
)
from engine.channels.reports import Report

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
ALICE = "alice@example.com"


def ses(kind: str, **said: Any) -> dict[str, Any]:
    return {
        "notificationType": kind,
        "mail": {"messageId": "0107-17", "destination": [ALICE]},
        kind.lower(): {"timestamp": "2026-11-29T12:00:00.000Z", "feedbackId": "f-1", **said},
    }


def ses_bounce(kind: str, sub: str, diagnostic: str | None = None, status: str | None = None) -> dict[str, Any]:
    recipient = {"emailAddress": ALICE, "action": "failed", "status": status, "diagnosticCode": diagnostic}
    bounced = {name: value for name, value in recipient.items() if value is not None}
    return ses("Bounce", bounceType=kind, bounceSubType=sub, bouncedRecipients=[bounced])


def sendgrid(event: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        {
            "email": ALICE,
            "timestamp": 1_796_040_000,
            "event": event,
            "sg_event_id": "e1",
            "sg_message_id": "m17.filter01.1",
            **fields,
        }
    ]


def postmark(record: str, **fields: Any) -> dict[str, Any]:
    return {
        "RecordType": record,
        "MessageID": "p-17",
        "ID": 42,
        "Email": ALICE,
        "BouncedAt": "2026-11-29T12:00:00Z",
        **fields,
    }


def ses_complaint(feedback: str | None, **said: Any) -> dict[str, Any]:
    said |= {} if feedback is None else {"complaintFeedbackType": feedback}
    return ses("Complaint", complainedRecipients=[{"emailAddress": ALICE}], **said)


HARD = ("failed", "target_invalid", False)
SOFT = ("failed", "permanent", True)
REFUSED = ("failed", "permanent", False)
COMPLAINT = ("delivered", "complaint", False)
WISH = ("delivered", "opted_out", False)


@pytest.mark.parametrize(("notification", "expected"), [
    (ses_bounce("Permanent", "General", "smtp; 550 5.1.1 user unknown", "5.1.1"), HARD),
    (ses_bounce("Permanent", "NoEmail"), HARD),
    (ses_bounce("Permanent", "General"), HARD),
    (ses_bounce("Permanent", "OnAccountSuppressionList", "Amazon SES did not send the message to this address", "5.1.1"), HARD),
    (ses_bounce("Permanent", "General", "smtp; 550 5.7.1 message rejected due to low reputation", "5.7.1"), REFUSED),
    (ses_bounce("Permanent", "General", "smtp; 554 5.7.1 Service unavailable; blocked using zen.spamhaus.org"), REFUSED),
    (ses_bounce("Permanent", "General", "smtp; 550 5.7.26 unauthenticated"), REFUSED),
    (ses_bounce("Transient", "MailboxFull", "smtp; 552 5.2.2 mailbox full", "5.2.2"), SOFT),
    (ses_bounce("Transient", "General", "smtp; 550 4.4.7 Message expired: unable to deliver in 840 minutes", "4.4.7"), SOFT),
    (ses_bounce("Transient", "MailboxFull"), SOFT),
    (ses_bounce("Transient", "ContentRejected"), REFUSED),
    (ses_bounce("Undetermined", "Undetermined"), SOFT),
    (ses_bounce("Peculiar", "New"), SOFT),
    (ses_bounce("Undetermined", "Undetermined", "I am away until Monday"), SOFT),
    (ses_bounce("Permanent", "Suppressed"), HARD),
    (ses_bounce("Permanent", "OnTenantSuppressionList"), HARD),
    (ses_bounce("Permanent", "EmailValidationSuppressed"), REFUSED),
    (ses_bounce("Permanent", "Brand new"), SOFT),
    (ses_bounce("Transient", "General", status="4.4.7"), SOFT),
    (ses_bounce("Transient", "MessageTooLarge"), REFUSED),
    (ses_bounce("Transient", "AttachmentRejected"), REFUSED),
    (ses_bounce("Transient", "CustomTimeoutExceeded"), REFUSED),
    (ses_complaint("abuse"), COMPLAINT),
    (ses_complaint("fraud"), COMPLAINT),
    (ses_complaint("other"), COMPLAINT),
    (ses_complaint(None), COMPLAINT),
    (ses_complaint("Brand-New"), COMPLAINT),
    (ses_complaint("opt-out"), WISH),
    (ses_complaint(None, complaintSubType="OnAccountSuppressionList"), ("failed", "opted_out", False)),
    (ses("Delivery", recipients=[ALICE], smtpResponse="250 2.6.0 Message received"), ("delivered", None, None)),
])  # fmt: skip
def test_what_ses_reports(notification: dict[str, Any], expected: tuple[str, str | None, bool | None]) -> None:
    (report,) = of_ses("ses", notification)
    assert_says(report, expected, "0107-17")


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "nonsense", None, 1e300])
def test_a_report_that_came_at_no_moment_that_can_be_stored_came_at_the_beginning_of_time(at: object) -> None:
    notification = ses_bounce("Permanent", "General")
    notification["bounce"]["timestamp"] = at
    assert of_ses("ses", notification)[0].at == datetime.fromtimestamp(0, UTC)


def test_a_server_that_bounces_in_the_name_of_somebody_else_accuses_only_its_own_user() -> None:
    """SES takes `emailAddress` from the Final-Recipient of what came back."""
    forged = [{"emailAddress": one, "status": "5.1.1"} for one in ("bob@example.com", "carol@example.com")]
    bounce = ses("Bounce", bounceType="Permanent", bounceSubType="General", bouncedRecipients=forged)
    complaint = ses("Complaint", complainedRecipients=forged)
    for notification in (bounce, complaint):
        assert [report.address for report in of_ses("ses", notification)] == [ALICE]


@pytest.mark.parametrize(("events", "expected"), [
    (sendgrid("bounce", type="bounce", status="5.1.1",
        reason="550 5.1.1 The email account that you tried to reach does not exist."), HARD),
    (sendgrid("bounce", type="bounce", status="5.0.0", reason="550 No such user"), HARD),
    (sendgrid("bounce", type="bounce", status="5.1.1"), HARD),
    (sendgrid("bounce", type="bounce"), HARD),
    (sendgrid("bounce", type="blocked", status="5.7.1", reason="550 5.7.1 very low reputation"), REFUSED),
    (sendgrid("bounce", type="blocked", reason="error dialing remote address"), REFUSED),
    (sendgrid("bounce", type="bounce", status="5.7.1", reason="550 5.7.1 blocked"), REFUSED),
    (sendgrid("bounce", type="bounce", status="5.2.2", reason="552 5.2.2 over quota"), SOFT),
    (sendgrid("dropped", reason="Bounced Address"), HARD),
    (sendgrid("dropped", reason="Invalid"), HARD),
    (sendgrid("dropped", reason="Unsubscribed Address"), ("failed", "opted_out", False)),
    (sendgrid("dropped", reason="Spam Reporting Address"), ("failed", "opted_out", False)),
    (sendgrid("dropped", reason="Something new"), REFUSED),
    (sendgrid("dropped", reason="Invalid SMTPAPI header"), REFUSED),
    (sendgrid("dropped", reason="Spam Content"), REFUSED),
    (sendgrid("dropped", reason="Recipient List over Package Quota"), REFUSED),
    (sendgrid("bounce", type="brand new"), REFUSED),
    (sendgrid("spamreport"), COMPLAINT),
    (sendgrid("unsubscribe"), WISH),
    (sendgrid("group_unsubscribe"), WISH),
    (sendgrid("delivered", response="250 OK"), ("delivered", None, None)),
])  # fmt: skip
def test_what_sendgrid_reports(events: list[dict[str, Any]], expected: tuple[str, str | None, bool | None]) -> None:
    (report,) = of_sendgrid("sendgrid", events)
    assert_says(report, expected, "m17")


@pytest.mark.parametrize(("said", "expected"), [
    (postmark("Bounce", Type="HardBounce", Details="smtp;550 5.1.1 user unknown"), HARD),
    (postmark("Bounce", Type="HardBounce", Details=""), HARD),
    (postmark("Bounce", Type="HardBounce", Details="smtp;550 5.7.1 spam"), REFUSED),
    (postmark("Bounce", Type="BadEmailAddress"), HARD),
    (postmark("Bounce", Type="SoftBounce"), SOFT),
    (postmark("Bounce", Type="Transient", Details="smtp;452 4.2.2 mailbox full"), SOFT),
    (postmark("Bounce", Type="Transient"), SOFT),
    (postmark("Bounce", Type="DnsError"), SOFT),
    (postmark("Bounce", Type="Unknown"), SOFT),
    (postmark("Bounce", Type="ManuallyDeactivated"), HARD),
    (postmark("Bounce", Type="SpamNotification"), REFUSED),
    (postmark("Bounce", Type="VirusNotification"), REFUSED),
    (postmark("Bounce", Type="DMARCPolicy"), REFUSED),
    (postmark("Bounce", Type="Blocked"), REFUSED),
    (postmark("Bounce", Type="SMTPApiError"), REFUSED),
    (postmark("Bounce", Type="TemplateRenderingFailed"), REFUSED),
    (postmark("Bounce", Type="Unconfirmed"), REFUSED),
    (postmark("Bounce", Type="SpamComplaint"), COMPLAINT),
    (postmark("Bounce", Type="Unsubscribe", Details="550 5.1.1 was said of another"), WISH),
    (postmark("Bounce", Type="BrandNew"), REFUSED),
    (postmark("Bounce", Type="BrandNew", Details="smtp;550 5.1.1 user unknown"), HARD),
    (postmark("SpamComplaint"), COMPLAINT),
    (postmark("SubscriptionChange", Recipient=ALICE, SuppressSending=True, SuppressionReason="ManualSuppression"), WISH),
    (postmark("SubscriptionChange", Recipient=ALICE, SuppressSending=True, SuppressionReason="ManualSuppression",
        Origin="Recipient"), WISH),
    (postmark("Delivery", Recipient=ALICE, DeliveredAt="2026-11-29T12:00:00Z"), ("delivered", None, None)),
])  # fmt: skip
def test_what_postmark_reports(said: dict[str, Any], expected: tuple[str, str | None, bool | None]) -> None:
    (report,) = of_postmark("postmark", said)
    assert_says(report, expected, "p-17")


def assert_says(report: Report, expected: tuple[str, str | None, bool | None], provider_id: str) -> None:
    state, kind, soft = expected
    outcome = report.outcome
    assert (report.provider_id, report.address, report.state) == (provider_id, ALICE, state)
    complains = kind == "complaint"
    assert (outcome and outcome.kind, outcome and outcome.soft_bounce) == ("opted_out" if complains else kind, soft)
    assert state == "failed" or (outcome is not None and outcome.code == COMPLAINED) == complains
    assert outcome is None or (outcome.provider and outcome.code)
    assert report.at.year == 2026
    assert ALICE not in repr(report)


@pytest.mark.parametrize("events", [sendgrid("processed"), sendgrid("deferred", response="450"), sendgrid("open"),
    sendgrid("click"), sendgrid("group_resubscribe"), sendgrid("account_status_change"), [], {}, None, [None, 1, "x"],
                                    [{"event": "bounce"}], sendgrid("bounce", sg_message_id=None), sendgrid("bounce",
                                        email=7)])  # fmt: skip
def test_what_ends_nothing_or_names_nobody_is_no_report(events: object) -> None:
    assert of_sendgrid("sendgrid", events) == []


@pytest.mark.parametrize("feedback", ["not-spam", "Not-Spam", "auth-failure", "virus"])
def test_what_a_filter_finds_and_that_a_mail_is_no_spam_are_no_complaints(feedback: str) -> None:
    assert of_ses("ses", ses_complaint(feedback)) == []


def test_the_answer_of_somebody_who_is_away_is_no_bounce() -> None:
    assert of_ses("ses", ses_bounce("Transient", "General")) == []
    assert of_postmark("postmark", postmark("Bounce", Type="AutoResponder", Details="Away, call 555 1234")) == []


@pytest.mark.parametrize("said", [
    *(postmark("Bounce", Type=type) for type in (
        "AutoResponder", "AddressChange", "ChallengeVerification", "Subscribe", "OpenRelayTest", "InboundError")),
    *(postmark("SubscriptionChange", SuppressSending=True, SuppressionReason="ManualSuppression", Origin=origin)
        for origin in ("Customer", "Admin")),
    postmark("SubscriptionChange", SuppressSending=True, SuppressionReason="HardBounce", Origin="Recipient"),
    postmark("SubscriptionChange", SuppressSending=False, SuppressionReason="ManualSuppression"),
    postmark("Open"), postmark("Click"), postmark("Inbound"),
])  # fmt: skip
def test_what_postmark_tells_that_is_no_failure_and_no_wish_is_no_report(said: dict[str, Any]) -> None:
    assert of_postmark("postmark", said) == []


def test_a_word_that_no_table_has_is_shown_to_somebody_and_suppresses_nobody() -> None:
    reports = (
        *of_postmark("p", postmark("Bounce", Type="BrandNew")),
        *of_sendgrid("s", sendgrid("bounce", type="brand new")),
        *of_sendgrid("s", sendgrid("dropped", reason="Something new")),
    )
    assert [(one.outcome.known, may_suppress(one.outcome)) for one in reports if one.outcome] == [(False, False)] * 3


def test_a_report_that_comes_twice_has_the_same_id_and_two_have_two() -> None:
    first, second = sendgrid("bounce", reason="550 5.1.1 x"), sendgrid("bounce", reason="550 5.1.1 x", sg_event_id="e2")
    assert of_sendgrid("s", first) == of_sendgrid("s", first)
    assert of_sendgrid("s", first)[0].id != of_sendgrid("s", second)[0].id
    assert of_ses("s", ses_bounce("Permanent", "NoEmail")) == of_ses("s", ses_bounce("Permanent", "NoEmail"))


def test_records_that_are_wrong_are_shown_to_somebody() -> None:
    for report in (
        *of_ses("ses", ses_bounce("Permanent", "General", "smtp; 550 5.7.26 unauthenticated")),
        *of_postmark("postmark", postmark("Bounce", Type="DMARCPolicy")),
    ):
        assert report.outcome is not None
        assert report.outcome.alarm


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
MEMBERS = st.sampled_from(
    ["event", "email", "sg_message_id", "timestamp", "RecordType", "MessageID", "Type", "Details", "mail", "messageId", "bounce",
     "bouncedRecipients", "emailAddress", "status", "Email", "reason", "bounceType", "complaint", "complainedRecipients"]
)  # fmt: skip
INNER = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(MEMBERS, SCALARS, max_size=4)
OUTER = INNER | st.lists(INNER, max_size=3) | st.dictionaries(MEMBERS, INNER, max_size=5)
JSON = OUTER | st.lists(OUTER, max_size=3) | st.dictionaries(MEMBERS, OUTER, max_size=5)


@given(JSON)
def test_no_request_breaks_the_reader(said: Any) -> None:
    of_sendgrid("s", said)
    if isinstance(said, dict):
        of_postmark("p", said)
        of_ses("a", said)
        for kind in ("Bounce", "Complaint", "Delivery"):
            of_ses("a", {**said, "notificationType": kind})


KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = base64.b64encode(
    KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
).decode()


def signed(body: bytes, at: datetime = NOW) -> dict[str, str]:
    timestamp = str(int(at.timestamp()))
    signature = base64.b64encode(KEY.sign(timestamp.encode() + body, ec.ECDSA(hashes.SHA256()))).decode()
    return {"signature": signature, "timestamp": timestamp, "key": PUBLIC}


def test_sendgrid_signs_what_it_sends() -> None:
    assert is_signed_by_sendgrid(b"[]\r\n", **signed(b"[]\r\n"), now=NOW)


@pytest.mark.parametrize("change", [
    {"signature": ""}, {"signature": "AAAA"}, {"signature": "é"}, {"timestamp": "1"}, {"timestamp": ""}, {"timestamp": "²"},
        {"timestamp": "9" * 400},
    {"key": ""}, {"key": "AAAA"}, {"key": base64.b64encode(b"x" * 90).decode()},
])  # fmt: skip
def test_what_is_signed_otherwise_is_refused(change: dict[str, str]) -> None:
    assert not is_signed_by_sendgrid(b"[]", **(signed(b"[]") | change), now=NOW)


def test_what_was_changed_or_kept_is_refused() -> None:
    assert not is_signed_by_sendgrid(b"[1]", **signed(b"[]"), now=NOW)
    assert not is_signed_by_sendgrid(b"[]", **signed(b"[]"), now=NOW + timedelta(hours=1))
    assert not is_signed_by_sendgrid(b"[]", **signed(b"[]", NOW + timedelta(hours=1)), now=NOW)


def test_postmark_has_a_login() -> None:
    header = "Basic " + base64.b64encode(b"postmark:s3cret").decode()
    assert is_authorized(header, [("postmark", "old"), ("postmark", "s3cret")])
    for wrong in ("", header[:-2], header.replace("Basic", "Bearer"), "Basic \ud800"):
        assert not is_authorized(wrong, [("postmark", "s3cret")])
    assert not is_authorized(header, [])


def suppression(outcome: Outcome, soft: list[datetime] | None = None, category: str = "news") -> Any:
    return suppression_of(outcome, "email", ALICE, category=category, soft_bounces=soft or [], now=NOW)


def test_a_hard_bounce_suppresses_at_once_for_all() -> None:
    made = suppression(Outcome(kind="target_invalid", provider="relay", code="550/5.1.1"))
    assert (made.reason, made.scope, made.expires_at, made.source) == ("hard_bounce", "all", None, "relay 550/5.1.1")


def test_a_hard_bounce_that_may_pass_suppresses_for_a_while() -> None:
    made = suppression(Outcome(kind="target_invalid", code="556/5.1.10", suppress_seconds=604_800))
    assert made.expires_at == NOW + timedelta(days=7)


def test_a_complaint_is_for_all_and_a_wish_for_its_category() -> None:
    assert [(one.reason, one.scope) for one in (
        suppression(Outcome(kind="opted_out", code="complaint")),
        suppression(Outcome(kind="opted_out", code="unsubscribe")),
        suppression(Outcome(kind="opted_out", code="unsubscribe"), category=""),
    )] == [("complaint", "all"), ("opted_out", "news"), ("opted_out", "all")]  # fmt: skip


@pytest.mark.parametrize("kind", ["ok", "transient", "throttled", "permanent", "config", "expired", "ambiguous"])
def test_nothing_else_suppresses_anybody(kind: Any) -> None:
    assert suppression(Outcome(kind=kind, code="x"), [NOW - timedelta(days=n) for n in range(10)]) is None


SOFT_BOUNCE = Outcome(kind="permanent", code="550", soft_bounce=True)


def test_soft_bounces_suppress_when_they_are_too_many_on_different_days() -> None:
    days = [NOW - timedelta(days=n) for n in range(1, SOFT_BOUNCES_MAX)]
    made = suppression(SOFT_BOUNCE, days)
    assert (made.reason, made.expires_at) == ("soft_bounces", NOW + SOFT_SUPPRESSED)
    assert suppression(SOFT_BOUNCE, days[1:]) is None
    assert suppression(SOFT_BOUNCE, [NOW - timedelta(minutes=n) for n in range(60)]) is None, "one bad afternoon"
    assert suppression(SOFT_BOUNCE, [one - SOFT_WINDOW for one in days]) is None, "long ago"
    assert suppression(SOFT_BOUNCE, [NOW + timedelta(days=n) for n in range(1, 9)]) is None, "a clock that is wrong"
