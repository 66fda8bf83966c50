"""What providers post to us: how a text fared, and what people answer. Nothing is believed before the signature is checked.

Reports come late, twice and in any order. As receipts they have a rank (`projections.folds.deliveries`), and the highest
holds: that a phone has a text is known only by its delivery; `undelivered` may be said of a part, or before another try.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from engine.channels.reports import Report, State, report_id
from engine.channels.sms.keywords import Keyword, keyword_of
from engine.channels.sms.tables import TWILIO

_STATES: Final[Mapping[str, State]] = {
    "accepted": "sent",
    "scheduled": "sent",
    "queued": "sent",
    "sending": "sent",
    "sent": "sent",
    "canceled": "failed",
    "failed": "failed",
    "undelivered": "failed",
    "delivered": "delivered",
    "read": "delivered",
}
"""Twilio's words. One that is not here says nothing that we could use."""


class Inbound(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody has answered. The text itself is not kept.

    Args:
        provider_id: of the answer; the same one may be posted again.
        number: whose.
        sender: which of our numbers it was sent to.
        keyword: what it asks for; None: nothing that we know.
        at: when it was sent, where the provider says so.
    """

    provider_id: str
    number: str
    sender: str
    keyword: Keyword | None
    at: datetime | None = None

    def __repr__(self) -> str:
        """Without numbers."""
        return f"Inbound(provider_id={self.provider_id!r}, keyword={self.keyword!r})"


def is_signed_by_twilio(url: str, form: Sequence[tuple[str, str]], signature: str, secrets: Iterable[str]) -> bool:
    """Whether a request comes from Twilio: https://www.twilio.com/docs/usage/security#validating-requests.

    Args:
        url: as Twilio was given it, with its query; not as it arrived, which proxies change and strangers choose.
        form: the parameters of the body, decoded.
        signature: the header `X-Twilio-Signature`.
        secrets: auth tokens of the account, two while one is replaced.
    """
    text = url + "".join(name + value for name, value in sorted(set(form)))
    right = False
    for secret in secrets:
        made = base64.b64encode(hmac.new(secret.encode(), text.encode("utf-8", "surrogatepass"), hashlib.sha1).digest())
        right |= hmac.compare_digest(made, signature.encode("utf-8", "surrogatepass"))
    return right


def report_of(provider: str, form: Mapping[str, str], now: datetime, *, reference: str = "") -> Report | None:
    """What a status callback says; None: nothing that we could use.

    Args:
        form: the parameters of the body.
        now: Twilio does not say when it happened.
        reference: as the address has it that the callback was posted to.
    """
    said, code = form.get("MessageStatus", ""), form.get("ErrorCode", "")
    state = _STATES.get(said)
    id = form.get("MessageSid", "")
    if state is None or not id:
        return None
    return Report(
        id=report_id(id, said, code),
        provider_id=id,
        reference=reference,
        address=form.get("To", ""),
        state=state,
        outcome=TWILIO.judged(provider, 0, code) if state == "failed" else None,
        at=now,
    )


def inbound_of(form: Mapping[str, str]) -> Inbound | None:
    """What an incoming message says; None: it is none.

    Twilio says itself what it took for STOP or START (`OptOutType`), and has then already blocked the number, or freed it.
    """
    id, number, sender = (form.get(name, "") for name in ("MessageSid", "From", "To"))
    if not id or not number:
        return None
    said = form.get("OptOutType", "") or form.get("Body", "")
    return Inbound(provider_id=id, number=number, sender=sender, keyword=keyword_of(said))


def inbound_of_sns(said: Mapping[str, Any], at: datetime | None) -> Inbound | None:
    """What an incoming message says that Amazon publishes to a topic; None: it is none.

    https://docs.aws.amazon.com/sms-voice/latest/userguide/two-way-sms-payload.html

    Args:
        said: the text of the SNS message, decoded.
        at: its time.
    """
    id, number, sender, text = (
        said.get(name) for name in ("inboundMessageId", "originationNumber", "destinationNumber", "messageBody")
    )
    if not (isinstance(id, str) and id and isinstance(number, str) and number and isinstance(text, str)):
        return None
    sender = sender if isinstance(sender, str) else ""
    return Inbound(provider_id=id, number=number, sender=sender, keyword=keyword_of(text), at=at)
