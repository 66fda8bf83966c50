"""Texts through Twilio's Messages API, or whoever offers the same: https://www.twilio.com/docs/messaging/api/message-resource."""

from __future__ import annotations

import base64
import re
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp
import msgspec

from engine.channels.channel import Outcome
from engine.channels.exchange import Answer, Silence, exchange
from engine.channels.sms.channel import unanswered
from engine.channels.sms.segments import Segmented
from engine.channels.sms.tables import TWILIO

URL: Final = "https://api.twilio.com"

REFERENCE: Final = "ref"
"""The parameter of a status callback's address that names the try."""

CODE_BELOW: Final = 1_000_000
"""Codes have five digits. What else stands there is kept out of receipts and metrics."""

_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)

_SEGMENTS: Final = re.compile(r"[1-9][0-9]{0,2}", re.ASCII)
"""0 is said of texts that a messaging service has not looked at yet."""


class TwilioSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an account is used.

    Args:
        name: of the provider, in receipts and metrics.
        account: its SID, `AC…`.
        user: who signs in: the SID of an API key; "": the account itself.
        secret: of that user.
        sender: a number in the form of E.164, an alphanumeric sender, or the SID of a messaging service, `MG…`.
        status_url: where reports about each text are posted; "": nowhere.
        url: of the API.
    """

    name: str = "twilio"
    account: str
    user: str = ""
    secret: str
    sender: str
    status_url: str = ""
    url: str = URL

    def __repr__(self) -> str:
        """Without its secret."""
        return f"TwilioSettings(name={self.name!r}, account={self.account!r})"


class _Reply(msgspec.Struct):
    """A message, or an error. Anything may be missing, or be something else: a proxy may have answered."""

    sid: Any = None
    num_segments: Any = None
    error_code: Any = None
    code: Any = None


class Twilio:
    """Sends texts by one account.

    Args:
        settings: of the account.
        http: of `engine.channels.exchange.open_http`; closed with this.
    """

    def __init__(self, settings: TwilioSettings, http: aiohttp.ClientSession) -> None:
        self.name = settings.name
        self._settings = settings
        self._http = http
        self._url = f"{settings.url}/2010-04-01/Accounts/{settings.account}/Messages.json"
        user = settings.user or settings.account
        self._headers = {
            "Authorization": "Basic " + base64.b64encode(f"{user}:{settings.secret}".encode()).decode(),
            "Content-Type": "application/x-www-form-urlencoded",
            "Accept": "application/json",
        }

    async def send(self, text: Segmented, number: str, *, deadline_seconds: float) -> Outcome:
        """Ask for one text to be sent."""
        settings = self._settings
        sender = "MessagingServiceSid" if settings.sender.startswith("MG") else "From"
        form = {"To": number, sender: settings.sender, "Body": text.text}
        if settings.status_url:
            form["StatusCallback"] = with_reference(settings.status_url, text.reference)
        body = urlencode(form).encode()
        reply = await exchange(
            self._http, self._url, headers=self._headers, body=body, deadline_seconds=deadline_seconds
        )
        if isinstance(reply, Silence):
            return unanswered(self.name, reply)
        return judged(self.name, reply, len(text.segments))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


def with_reference(status_url: str, reference: str) -> str:
    """Where the reports of one text are posted. Their signature covers the query."""
    if not reference:
        return status_url
    return f"{status_url}{'&' if '?' in status_url else '?'}{REFERENCE}={reference}"


def judged(provider: str, answer: Answer, segments: int) -> Outcome:
    """What an answer means.

    Args:
        provider: its name in the configuration.
        answer: to the request for one text.
        segments: as we count; the price is for as many as Twilio says, where it already knows.
    """
    try:
        reply = msgspec.json.decode(answer.body, type=_Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        reply = _Reply()
    said = reply.error_code if answer.status < 300 else reply.code
    code = str(said) if type(said) is int and 0 < said < CODE_BELOW else ""
    outcome = TWILIO.judged(provider, answer.status, code, retry_after_seconds=answer.retry_after_seconds)
    if outcome.kind != "ok":
        return outcome
    counted, id = str(reply.num_segments), reply.sid if isinstance(reply.sid, str) else ""
    return msgspec.structs.replace(
        outcome,
        provider_id=id if _ID.fullmatch(id) else "",
        segments=int(counted) if _SEGMENTS.fullmatch(counted) else segments,
    )
