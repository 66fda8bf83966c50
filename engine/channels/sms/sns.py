"""Texts through Amazon SNS, or whoever offers the same: https://docs.aws.amazon.com/sns/latest/api/API_Publish.html."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import urlencode

import aiohttp
import msgspec

from engine.channels.aws import Credentials, signed_headers
from engine.channels.channel import UNREPORTED, Outcome
from engine.channels.exchange import Answer, Silence, exchange
from engine.channels.sms.channel import unanswered
from engine.channels.sms.segments import Segmented
from engine.channels.sms.tables import SNS

VERSION: Final = "2010-03-31"

# Searched and not parsed: three known elements, of a stranger's XML at that.
_CODE: Final = re.compile(rb"<Code>\s*([A-Za-z.]{1,64})\s*</Code>")
_ID: Final = re.compile(rb"<MessageId>\s*([0-9A-Za-z-]{1,64})\s*</MessageId>")
_PARAMETER: Final = re.compile(rb"<Message>\s*Invalid parameter: (PhoneNumber)\b")


class SnsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an account is used.

    Args:
        name: of the provider, in receipts and metrics.
        region: as `eu-central-1`.
        credentials: may publish to phone numbers, and nothing else.
        sender: alphanumeric, or a number of ours; "": SNS chooses.
        type: what the texts are, which decides their route and price.
        price_usd_max: of one segment, as "0.10"; "": no bound.
        url: of the API; "": Amazon's in the region.
    """

    name: str = "sns"
    region: str
    credentials: Credentials
    sender: str = ""
    type: Literal["Transactional", "Promotional"] = "Transactional"
    price_usd_max: str = ""
    url: str = ""


class Sns:
    """Sends texts by one account.

    Args:
        settings: of the account.
        http: of `engine.channels.exchange.open_http`; closed with this.
        clock: what time it is, with an offset.
    """

    def __init__(
        self,
        settings: SnsSettings,
        http: aiohttp.ClientSession,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._http = http
        self._clock = clock
        self._url = (settings.url or f"https://sns.{settings.region}.amazonaws.com").rstrip("/") + "/"

    async def send(self, text: Segmented, number: str, *, deadline_seconds: float) -> Outcome:
        """Ask for one text to be sent."""
        body = urlencode(publish_form(self._settings, text.text, number)).encode()
        headers = signed_headers(
            self._settings.credentials,
            url=self._url,
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            body=body,
            region=self._settings.region,
            service="sns",
            now=self._clock(),
        )
        reply = await exchange(self._http, self._url, headers=headers, body=body, deadline_seconds=deadline_seconds)
        if isinstance(reply, Silence):
            return unanswered(self.name, reply)
        return judged(self.name, reply, len(text.segments))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


def publish_form(settings: SnsSettings, text: str, number: str) -> dict[str, str]:
    """The parameters of the action Publish."""
    attributes = {
        "AWS.SNS.SMS.SMSType": ("String", settings.type),
        "AWS.SNS.SMS.SenderID": ("String", settings.sender),
        "AWS.SNS.SMS.MaxPrice": ("Number", settings.price_usd_max),
    }
    if settings.sender.startswith("+"):
        attributes["AWS.MM.SMS.OriginationNumber"] = attributes.pop("AWS.SNS.SMS.SenderID")
    form = {"Action": "Publish", "Version": VERSION, "PhoneNumber": number, "Message": text}
    given = [(name, kind, value) for name, (kind, value) in attributes.items() if value]
    for index, (name, kind, value) in enumerate(given, start=1):
        entry = f"MessageAttributes.entry.{index}"
        form |= {f"{entry}.Name": name, f"{entry}.Value.DataType": kind, f"{entry}.Value.StringValue": value}
    return form


def judged(provider: str, answer: Answer, segments: int) -> Outcome:
    """What an answer means.

    Args:
        provider: its name in the configuration.
        answer: to the request for one text.
        segments: how many there are; SNS does not say.
    """
    found = _CODE.search(answer.body) if answer.status >= 300 else None
    code = found[1].decode().removesuffix("Exception") if found else ""
    if code == "InvalidParameter" and (parameter := _PARAMETER.search(answer.body)):
        code = f"{code}/{parameter[1].decode()}"
    outcome = SNS.judged(provider, answer.status, code, retry_after_seconds=answer.retry_after_seconds)
    if outcome.kind != "ok":
        return outcome
    id = _ID.search(answer.body)
    name, code = id[1].decode() if id else "", f"{outcome.code}/{UNREPORTED}"
    return msgspec.structs.replace(outcome, code=code, provider_id=name, segments=segments)
