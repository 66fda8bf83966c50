"""Mail by HTTP, in the shape of Amazon SES, SendGrid and Postmark.

None of them knows an idempotency key, so a request without an answer is ambiguous. All are given our Message-ID, by which a
person's program, and whoever looks into a mailbox, can tell a repetition.
"""

from __future__ import annotations

import abc
import base64
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
import msgspec

from engine.channels.aws import Credentials, signed_headers
from engine.channels.channel import Outcome, OutcomeKind
from engine.channels.email.message import BadAddress, Mail, ascii_address, headers_of, named, one_line, to_bytes
from engine.channels.email.provider import judged
from engine.channels.email.tables import POSTMARK, SENDGRID, SES
from engine.channels.exchange import Answer, Silence, exchange
from engine.channels.references import NAME, pieces
from engine.settings import Secret
from seamark.backoff import retry_after_seconds

SES_TAG_CHARS_MAX: Final = 256
"""https://docs.aws.amazon.com/ses/latest/APIReference-V2/API_MessageTag.html; its letters are those of our tokens."""

POSTMARK_FIELD_CHARS_MAX: Final = 80
"""https://postmarkapp.com/support/article/1125-custom-metadata-faq"""

_JSON: Final = {"Content-Type": "application/json", "Accept": "application/json"}
_CODE: Final = re.compile(r"[A-Za-z]{1,64}")


class Service(abc.ABC):
    """What the services have in common.

    Args:
        name: of the provider, in outcomes.
        http: of `engine.channels.exchange.open_http`; closed with this.
        url: of the API, without a slash at its end.
    """

    def __init__(self, name: str, http: aiohttp.ClientSession, url: str) -> None:
        self.name = name
        self._http = http
        self._url = url.rstrip("/")

    async def send(self, mail: Mail, recipient: str, *, deadline_seconds: float) -> Outcome:
        """Hand a mail over."""
        try:
            address = ascii_address(recipient)
        except BadAddress:
            return Outcome(kind="permanent", provider=self.name, code="address")
        path, body = self.request(mail, address)
        reply = await exchange(
            self._http, self._url + path, headers=self.headers(path, body), body=body, deadline_seconds=deadline_seconds
        )
        if isinstance(reply, Silence):
            kind: OutcomeKind = "ambiguous" if reply.left else "transient"
            return Outcome(kind=kind, provider=self.name, code=reply.why, elsewhere=not reply.left)
        outcome = self.judged(reply)
        if outcome.kind == "ok":
            return msgspec.structs.replace(outcome, provider_id=self.id_of(reply))
        return judged(outcome)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    @abc.abstractmethod
    def request(self, mail: Mail, recipient: str) -> tuple[str, bytes]:
        """Path and body."""

    @abc.abstractmethod
    def headers(self, path: str, body: bytes) -> Mapping[str, str]:
        """Of a request, with what proves who we are."""

    @abc.abstractmethod
    def judged(self, answer: Answer) -> Outcome:
        """What an answer means."""

    @abc.abstractmethod
    def id_of(self, answer: Answer) -> str:
        """What the service calls a mail that it has taken."""


class Ses(Service):
    """Amazon SES, API v2: https://docs.aws.amazon.com/ses/latest/APIReference-V2/API_SendEmail.html. It gets the mail as bytes.

    Args:
        region: as `eu-central-1`.
        credentials: may do `ses:SendRawEmail`, and nothing else.
        configuration_set: decides where reports are published; "": the default one.
        url: "": Amazon's in the region.
        clock: what time it is, with an offset.
    """

    def __init__(
        self,
        name: str,
        http: aiohttp.ClientSession,
        *,
        region: str,
        credentials: Credentials,
        configuration_set: str = "",
        url: str = "",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(name, http, url or f"https://email.{region}.amazonaws.com")
        self._region = region
        self._credentials = credentials
        self._set = configuration_set
        self._clock = clock

    def request(self, mail: Mail, recipient: str) -> tuple[str, bytes]:
        """Path and body."""
        body: dict[str, Any] = {
            "FromEmailAddress": named(mail.sender_name, mail.sender),
            "Destination": {"ToAddresses": [recipient]},
            "Content": {"Raw": {"Data": base64.b64encode(to_bytes(mail, recipient)).decode()}},
        }
        if self._set:
            body["ConfigurationSetName"] = self._set
        if tags := pieces(mail.reference, SES_TAG_CHARS_MAX):
            body["EmailTags"] = [{"Name": name, "Value": value} for name, value in tags.items()]
        return "/v2/email/outbound-emails", msgspec.json.encode(body)

    def headers(self, path: str, body: bytes) -> Mapping[str, str]:
        """Signed by Signature Version 4."""
        return signed_headers(
            self._credentials,
            url=self._url + path,
            headers=_JSON,
            body=body,
            region=self._region,
            service="ses",
            now=self._clock(),
        )

    def judged(self, answer: Answer) -> Outcome:
        """What an answer means. A header has the name of an error, sometimes with a URL behind it."""
        code = answer.headers.get("x-amzn-ErrorType", "").partition(":")[0].rpartition("#")[2].removesuffix("Exception")
        said = str(_members(answer).get("message", "")).lower()
        if code == "MessageRejected" and "not verified" in said:
            code = "MessageRejected/NotVerified"
        elif code == "TooManyRequests" and "quota" in said:
            code = "TooManyRequests/Quota"
        elif code == "BadRequest" and (
            "illegal address" in said or "missing final '@domain'" in said or "local address" in said
        ):
            code = "BadRequest/To"
        code = code if _CODE.fullmatch(code.replace("/", "")) else ""
        return SES.judged(self.name, answer.status, code, retry_after_seconds=retry_after_seconds(answer.headers))

    def id_of(self, answer: Answer) -> str:
        """What reports name."""
        return _id(_members(answer).get("MessageId"))


class SendGrid(Service):
    """SendGrid, API v3: https://www.twilio.com/docs/sendgrid/api-reference/mail-send/mail-send."""

    def __init__(
        self, name: str, http: aiohttp.ClientSession, *, key: Secret, url: str = "https://api.sendgrid.com"
    ) -> None:
        super().__init__(name, http, url)
        self._key = key

    def request(self, mail: Mail, recipient: str) -> tuple[str, bytes]:
        """Path and body. Nothing is tracked: links stay what they are, and DKIM covers them."""
        body: dict[str, Any] = {
            "personalizations": [{"to": [{"email": recipient}]}],
            "from": {"email": mail.sender, "name": one_line(mail.sender_name)},
            "subject": one_line(mail.subject),
            "content": [{"type": "text/plain", "value": mail.text}, {"type": "text/html", "value": mail.html}],
            "headers": headers_of(mail),
            "tracking_settings": {"click_tracking": {"enable": False}, "open_tracking": {"enable": False}},
        }
        if mail.reference:
            body["custom_args"] = {NAME: mail.reference}
        if mail.reply_to:
            body["reply_to"] = {"email": mail.reply_to}
        return "/v3/mail/send", msgspec.json.encode(body)

    def headers(self, path: str, body: bytes) -> Mapping[str, str]:
        """With the key."""
        return {**_JSON, "Authorization": f"Bearer {self._key.reveal()}"}

    def judged(self, answer: Answer) -> Outcome:
        """What an answer means."""
        errors = _members(answer).get("errors")
        first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
        field, said = str(first.get("field") or ""), str(first.get("message") or "").lower()
        if "credits exceeded" in said:
            code = "credits"
        elif re.fullmatch(r"personalizations\.\d+\.to(\.\d+\.email)?", field):
            code = "to"
        else:
            code = "from" if field.partition(".")[0] == "from" else ""
        return SENDGRID.judged(self.name, answer.status, code, retry_after_seconds=retry_after_seconds(answer.headers))

    def id_of(self, answer: Answer) -> str:
        """What reports name, before a dot."""
        return _id(answer.headers.get("X-Message-Id"))


class Postmark(Service):
    """Postmark: https://postmarkapp.com/developer/api/email-api.

    Args:
        key: the token of a server.
        stream: `outbound` for what people wait for; what goes to many needs one of type broadcast.
    """

    def __init__(
        self,
        name: str,
        http: aiohttp.ClientSession,
        *,
        key: Secret,
        stream: str = "outbound",
        url: str = "https://api.postmarkapp.com",
    ) -> None:
        super().__init__(name, http, url)
        self._key = key
        self._stream = stream

    def request(self, mail: Mail, recipient: str) -> tuple[str, bytes]:
        """Path and body. `X-PM-KeepID` has it keep our Message-ID."""
        headers = {**headers_of(mail), "X-PM-KeepID": "true"}
        body: dict[str, Any] = {
            "From": named(mail.sender_name, mail.sender),
            "To": recipient,
            "Subject": one_line(mail.subject),
            "TextBody": mail.text,
            "HtmlBody": mail.html,
            "Headers": [{"Name": name, "Value": value} for name, value in headers.items()],
            "MessageStream": self._stream,
            "TrackOpens": False,
            "TrackLinks": "None",
        }
        if metadata := pieces(mail.reference, POSTMARK_FIELD_CHARS_MAX):
            body["Metadata"] = metadata
        if mail.reply_to:
            body["ReplyTo"] = mail.reply_to
        return "/email", msgspec.json.encode(body)

    def headers(self, path: str, body: bytes) -> Mapping[str, str]:
        """With the token."""
        return {**_JSON, "X-Postmark-Server-Token": self._key.reveal()}

    def judged(self, answer: Answer) -> Outcome:
        """What an answer means."""
        said = _members(answer)
        number = said.get("ErrorCode")
        code = str(number) if isinstance(number, int) and number else ""
        if code == "300" and re.search(r"'To'", str(said.get("Message"))):
            code = "300/To"
        return POSTMARK.judged(self.name, answer.status, code, retry_after_seconds=retry_after_seconds(answer.headers))

    def id_of(self, answer: Answer) -> str:
        """What reports name."""
        return _id(_members(answer).get("MessageID"))


def _members(answer: Answer) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(answer.body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _id(said: object) -> str:
    return said if isinstance(said, str) and re.fullmatch(r"[\x21-\x7e]{1,200}", said) else ""
