"""What mail services report later: bounces, complaints, deliveries, wishes to get no more.

Nothing of a request is believed before its sender has proved who it is. Reports come late, twice and in any order; each has an
id of its own, by which a second one is recognised. A bounce is judged by the words of the server that refused, as if we had
heard them ourselves: services put refusals of our reputation among their "permanent" ones.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from engine.channels.bounces import COMPLAINED
from engine.channels.channel import Outcome, OutcomeKind
from engine.channels.email.replies import classify, parse
from engine.channels.references import NAME, joined
from engine.channels.reports import Report, State, report_id

REPORTS_MAX: Final = 1000
"""Of one request: SendGrid sends up to 768 KB, some 1000 reports."""

AGE_SECONDS_MAX: Final = 600.0
"""Of a signed request. SendGrid signs each attempt anew."""

_SAID: Final = re.compile(r"\b([45]\d\d)[ -](.*)", re.DOTALL)
_STATUS: Final = re.compile(r"^[45]\.\d{1,3}\.\d{1,3}$")


def is_signed_by_sendgrid(body: bytes, *, signature: str, timestamp: str, key: str, now: datetime) -> bool:
    """Whether a request comes from SendGrid, by its Signed Event Webhook.

    https://www.twilio.com/docs/sendgrid/for-developers/tracking-events/getting-started-event-webhook-security-features

    Args:
        body: as it came, to the byte.
        signature, timestamp: headers `X-Twilio-Email-Event-Webhook-Signature` and `…-Timestamp`.
        key: the verification key as SendGrid shows it.
        now: with an offset.
    """
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) < 12):
        return False
    if abs(now.timestamp() - int(timestamp)) > AGE_SECONDS_MAX:
        return False
    try:
        public = load_der_public_key(base64.b64decode(key, validate=True))
        if not isinstance(public, ec.EllipticCurvePublicKey):
            return False
        public.verify(base64.b64decode(signature, validate=True), timestamp.encode() + body, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, binascii.Error):
        return False
    return True


def is_authorized(header: str, logins: Iterable[tuple[str, str]]) -> bool:
    """Whether a request has one of our logins (HTTP Basic), which is all that Postmark can prove itself by.

    Args:
        header: `Authorization`.
        logins: user and password, two pairs while one is replaced.
    """
    right = False
    for user, password in logins:
        made = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        right |= hmac.compare_digest(made.encode(), header.encode("utf-8", "surrogatepass"))
    return right


def of_ses(provider: str, notification: Mapping[str, Any]) -> list[Report]:
    """The reports in a notification of SES, which is the text of a message of SNS: one for each recipient.

    https://docs.aws.amazon.com/ses/latest/dg/notification-contents.html and event-publishing-retrieving-sns-contents.html
    """
    kind = notification.get("eventType") or notification.get("notificationType")
    mail = _dict(notification.get("mail"))
    provider_id, reference = _text(mail.get("messageId")), joined(_dict(mail.get("tags")))
    said = _dict(notification.get(str(kind).lower()))
    at = _time(said.get("timestamp"))
    feedback = _text(said.get("feedbackId"))
    states: list[tuple[Any, State, Outcome | None]]
    if kind == "Delivery":
        states = [(one, "delivered", None) for one in _list(said.get("recipients"))]
    elif kind == "Complaint":
        meant = _FEEDBACK.get(_text(said.get("complaintFeedbackType")).lower(), _COMPLAINT)
        if meant is None:
            return []
        outcome = msgspec.structs.replace(meant, provider=provider)
        # SES may have sent nothing, as the person had complained before.
        whether: State = "failed" if _text(said.get("complaintSubType")) in _SES_SUPPRESSION_LISTS else "delivered"
        whom = _list(said.get("complainedRecipients"))
        states = [(_dict(one).get("emailAddress"), whether, outcome) for one in whom]
    elif kind == "Bounce":
        named = f"{said.get('bounceType')}/{said.get('bounceSubType')}"
        states = []
        for one in map(_dict, _list(said.get("bouncedRecipients"))):
            heard, status = one.get("diagnosticCode"), one.get("status")
            if named == _MAYBE_AWAY and not heard and not status:
                continue
            outcome = _diagnosed(provider, heard, status, _SES.get(named, _SES_NEW), named)
            states.append((one.get("emailAddress"), "failed", outcome))
    else:
        return []
    # Who has bounced or complained, SES takes from what a stranger's server sends back. A mail of ours has one recipient: what
    # comes back is about him, and nobody can have somebody else's address suppressed.
    sent_to = _list(mail.get("destination"))
    if len(sent_to) == 1:
        states = [(sent_to[0], state, outcome) for _, state, outcome in states[:1]]
    return _reports(provider_id, reference, at, [(f"{kind}/{feedback}", *state) for state in states])


def of_sendgrid(provider: str, events: object) -> list[Report]:
    """The reports in a request of SendGrid: https://www.twilio.com/docs/sendgrid/for-developers/tracking-events/event."""
    found: list[Report] = []
    for one in _list(events)[:REPORTS_MAX]:
        event = _dict(one)
        name, reason = event.get("event"), event.get("reason")
        state: State = "failed"
        outcome: Outcome | None
        if name == "delivered":
            state, outcome = "delivered", None
        elif name in ("spamreport", "unsubscribe", "group_unsubscribe"):
            state = "delivered"
            outcome = msgspec.structs.replace(_COMPLAINT if name == "spamreport" else _OPT_OUT, provider=provider)
        elif name == "bounce":
            type = _text(event.get("type")) or "bounce"
            otherwise = _SENDGRID.get(type, _UNKNOWN)
            outcome = _diagnosed(provider, reason, event.get("status"), otherwise, f"bounce/{type}")
        elif name == "dropped":
            outcome = _stated(provider, _DROPPED.get(_text(reason).lower(), _UNKNOWN), "dropped")
        else:
            continue  # processed, deferred, opened, clicked: nothing has ended
        id, provider_id = _text(event.get("sg_event_id")), _text(event.get("sg_message_id")).partition(".")[0]
        reference, at = _text(event.get(NAME)), _time(event.get("timestamp"))
        found += _reports(provider_id, reference, at, [(id, event.get("email"), state, outcome)])
    return found


def of_postmark(provider: str, said: Mapping[str, Any]) -> list[Report]:
    """The report in a request of Postmark, if it is one: https://postmarkapp.com/developer/webhooks/webhooks-overview."""
    kind, provider_id = said.get("RecordType"), _text(said.get("MessageID"))
    address = said.get("Email") or said.get("Recipient")
    at = _time(said.get("BouncedAt") or said.get("DeliveredAt") or said.get("ChangedAt"))
    state: State = "failed"
    outcome: Outcome | None
    if kind == "Delivery":
        state, outcome = "delivered", None
    elif kind == "SpamComplaint":
        state, outcome = "delivered", msgspec.structs.replace(_COMPLAINT, provider=provider)
    elif kind == "SubscriptionChange":
        if said.get("SuppressSending") is not True or said.get("SuppressionReason") != "ManualSuppression":
            return []  # a bounce or a complaint, which is reported by itself; or it may be sent to again
        if said.get("Origin") in ("Customer", "Admin"):
            return []  # somebody has put the address on Postmark's list; the person has wished nothing
        state, outcome = "delivered", msgspec.structs.replace(_OPT_OUT, provider=provider)
    elif kind == "Bounce":
        name = _text(said.get("Type"))
        meant = _POSTMARK.get(name, _UNKNOWN)
        if meant is None:
            return []
        if meant.kind == "opted_out":  # whoever answers a mail has it
            state, outcome = "delivered", msgspec.structs.replace(meant, provider=provider)
        else:
            outcome = _diagnosed(provider, said.get("Details"), None, meant, name)
    else:
        return []
    reference = joined(_dict(said.get("Metadata")))
    return _reports(provider_id, reference, at, [(f"{kind}/{said.get('ID', '')}", address, state, outcome)])


_GONE: Final = Outcome(kind="target_invalid")
_REFUSED: Final = Outcome(kind="permanent")
_SOFT: Final = Outcome(kind="permanent", soft_bounce=True)
"""The service has given up: for this message it is over, although for the address it may pass."""

_COMPLAINT: Final = Outcome(kind="opted_out", code=COMPLAINED)
_OPT_OUT: Final = Outcome(kind="opted_out", code="unsubscribe")

_UNKNOWN: Final = Outcome(kind="permanent", known=False)
"""A word that is not in the tables: it accuses nobody. Services call bounces what is none, as automatic answers."""

_SES: Final[Mapping[str, Outcome]] = {
    "Permanent/General": _GONE,
    "Permanent/NoEmail": _GONE,
    "Permanent/Suppressed": _GONE,
    "Permanent/OnAccountSuppressionList": _GONE,
    "Permanent/OnTenantSuppressionList": _GONE,
    "Permanent/EmailValidationSuppressed": _REFUSED,  # SES supposes so, and has asked nobody
    "Transient/General": _SOFT,
    "Transient/MailboxFull": _SOFT,
    "Transient/MessageTooLarge": _REFUSED,
    "Transient/ContentRejected": _REFUSED,
    "Transient/AttachmentRejected": _REFUSED,
    "Transient/CustomTimeoutExceeded": _REFUSED,  # we have given it too little time
    "Undetermined/Undetermined": _SOFT,
}
"""https://docs.aws.amazon.com/ses/latest/dg/notification-contents.html#bounce-types"""

_SES_NEW: Final = Outcome(kind="permanent", soft_bounce=True, known=False)
"""A bounce type that is not in the table. SES calls only undelivered mails bounces, and automatic answers (`_MAYBE_AWAY`)."""

_MAYBE_AWAY: Final = "Transient/General"
"""What SES calls the automatic answer of somebody who is away, too. That has neither a reply of a server nor a status."""

_SES_SUPPRESSION_LISTS: Final = frozenset({"OnAccountSuppressionList", "OnTenantSuppressionList"})

_FEEDBACK: Final[Mapping[str, Outcome | None]] = {
    "abuse": _COMPLAINT,
    "fraud": _COMPLAINT,
    "other": _COMPLAINT,
    "opt-out": _OPT_OUT,
    "opt-out-list": _OPT_OUT,
    "not-spam": None,
    "auth-failure": None,
    "virus": None,
}
"""Feedback-Type (RFC 5965, 6430, 6591; `opt-out` is of their drafts). `not-spam`, `auth-failure` and `virus` are no complaint of
a person. A missing or unknown type counts as a complaint."""

_SENDGRID: Final[Mapping[str, Outcome]] = {"bounce": _GONE, "blocked": _REFUSED}

_DROPPED: Final[Mapping[str, Outcome]] = {
    "bounced address": _GONE,
    "invalid": _GONE,
    "invalid smtpapi header": _REFUSED,
    "recipient list over package quota": _REFUSED,
    "spam reporting address": _COMPLAINT,
    "unsubscribed address": _OPT_OUT,
    "spam content (if spam checker app is enabled)": _REFUSED,
    "spam content": _REFUSED,
}

_POSTMARK: Final[Mapping[str, Outcome | None]] = {
    "HardBounce": _GONE,
    "BadEmailAddress": _GONE,
    "ManuallyDeactivated": _GONE,
    "SoftBounce": _SOFT,
    "Transient": _SOFT,
    "DnsError": _SOFT,
    "Unknown": _SOFT,
    "SpamComplaint": _COMPLAINT,
    "Unsubscribe": _OPT_OUT,
    "SpamNotification": _REFUSED,
    "VirusNotification": _REFUSED,
    "DMARCPolicy": Outcome(kind="permanent", alarm=True),
    "Blocked": _REFUSED,
    "SMTPApiError": _REFUSED,
    "TemplateRenderingFailed": _REFUSED,
    "Unconfirmed": _REFUSED,
    # Answers to a mail that has arrived, which nobody needs to act on, and mails that came by themselves.
    "AutoResponder": None,
    "AddressChange": None,
    "ChallengeVerification": None,
    "Subscribe": None,
    "OpenRelayTest": None,
    "InboundError": None,
}
"""https://postmarkapp.com/developer/api/bounce-api#bounce-types; None: it says neither that the mail has failed nor what its
reader wants."""


def _diagnosed(provider: str, diagnostic: object, status: object, otherwise: Outcome, name: str) -> Outcome:
    """What a bounce means: by the reply that the service has heard, else by its status, else by the service's own word for it."""
    text = _text(diagnostic)
    said = _SAID.search(text)
    if said is not None:
        # Amazon writes `550 4.4.7` where it gave up on a server that had never said no.
        heard = classify(parse(450 if said[2].startswith("4.") else int(said[1]), said[2]), "end")
    elif _STATUS.fullmatch(_text(status)) and not _text(status).endswith("0.0"):
        heard = classify(parse(550 if _text(status)[0] == "5" else 450, f"{status} {text}"), "end")
    else:
        return _stated(provider, otherwise, name)
    if not heard.known and otherwise.known:
        return _stated(provider, otherwise, name)
    # The service has tried for as long as it does. What may pass by itself has not passed, and how fast we were is its business.
    soft = heard.soft_bounce or heard.kind == "transient"
    kind: OutcomeKind = "permanent" if heard.kind in ("transient", "throttled", "config") else heard.kind
    return Outcome(
        kind=kind,
        provider=provider,
        code=heard.code,
        suppress_seconds=heard.suppress_seconds,
        soft_bounce=soft,
        alarm=heard.kind == "config",  # our domain's records are wrong: somebody must mend them
        known=heard.known,
    )


def _stated(provider: str, outcome: Outcome, name: str) -> Outcome:
    return msgspec.structs.replace(outcome, provider=provider, code=outcome.code or name[:64])


def _reports(
    provider_id: str, reference: str, at: datetime, said: list[tuple[str, Any, State, Outcome | None]]
) -> list[Report]:
    """Reports of those that name a mail and an address, with an id each: made of what they say, the service's own id included."""
    found = []
    for id, address, state, outcome in said[:REPORTS_MAX]:
        whom = _text(address)
        if not provider_id or not whom:
            continue
        found.append(
            Report(
                id=report_id(provider_id, id, whom, state, at.isoformat()),
                provider_id=provider_id,
                reference=reference,
                address=whom,
                state=state,
                outcome=outcome,
                at=at,
            )
        )
    return found


def _time(value: object) -> datetime:
    """When it happened. Who does not say so, or says nonsense, gets the beginning of time, and is overtaken by everybody."""
    try:
        if isinstance(value, (int, float)):
            return datetime.fromtimestamp(value, UTC)
        at = datetime.fromisoformat(str(value))
        return at.astimezone(UTC) if at.tzinfo is not None else at.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)


def _text(value: object) -> str:
    return value[:2000] if isinstance(value, str) else ""


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
