"""What Twilio posts to us: how a text fared, and what people answer. Nothing of a request is believed before its signature is checked.

Reports come late, twice and in any order. So states have a rank, and the highest one ever reported holds: that a phone has a text is
known only by its delivery, while `undelivered` may be said of a part, or before the carrier tried again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from engine.channels.channel import Outcome
from engine.channels.sms.keywords import Keyword, keyword_of
from engine.channels.sms.tables import TWILIO

State = Literal["sent", "failed", "delivered"]

_RANKS: Final[dict[State, int]] = {"sent": 0, "failed": 1, "delivered": 2}

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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How a text has fared.

    Args:
        provider_id: which one, as in the outcome of its sending.
        outcome: where it failed, what that means for the number: it may be none, or its owner may have opted out.
    """

    provider_id: str
    state: State
    outcome: Outcome | None = None


class Inbound(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody has answered. The text itself is not kept.

    Args:
        provider_id: of the answer; the same one may be posted again.
        number: whose.
        sender: which of our numbers it was sent to.
        keyword: what it asks for; None: nothing that we know.
    """

    provider_id: str
    number: str
    sender: str
    keyword: Keyword | None

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


def report_of(provider: str, form: Mapping[str, str]) -> Report | None:
    """What a status callback says; None: nothing that we could use."""
    state = _STATES.get(form.get("MessageStatus", ""))
    id = form.get("MessageSid", "")
    if state is None or not id:
        return None
    outcome = TWILIO.judged(provider, 0, form.get("ErrorCode", "")) if state == "failed" else None
    return Report(provider_id=id, state=state, outcome=outcome)


def inbound_of(form: Mapping[str, str]) -> Inbound | None:
    """What an incoming message says; None: it is none.

    Twilio says itself what it took for STOP or START (`OptOutType`), and has then already blocked the number, or freed it.
    """
    id, number, sender = (form.get(name, "") for name in ("MessageSid", "From", "To"))
    if not id or not number:
        return None
    said = form.get("OptOutType", "") or form.get("Body", "")
    return Inbound(provider_id=id, number=number, sender=sender, keyword=keyword_of(said))


def later_state(known: State | None, reported: State) -> State:
    """What holds when `reported` arrives and `known` was reported before; None: nothing was. The order of arrival changes nothing."""
    return reported if known is None else max(known, reported, key=_RANKS.__getitem__)
