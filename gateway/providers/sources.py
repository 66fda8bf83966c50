"""Who posts: a source knows what proves that a request is its provider's, and reads what it says. Nothing is read before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import parse_qs, parse_qsl, urlsplit

import msgspec

from engine.channels.aws import certificate_url, is_signed_by_sns
from engine.channels.email.callbacks import is_authorized, is_signed_by_sendgrid, of_postmark, of_sendgrid, of_ses
from engine.channels.references import TOKEN_CHARS_MAX
from engine.channels.reports import Report
from engine.channels.sms.callbacks import Inbound, inbound_of, inbound_of_sns, is_signed_by_twilio, report_of
from engine.channels.sms.twilio import REFERENCE
from gateway.providers.certificates import Certificates

PARAMETERS_MAX: Final = 200
"""Of a form. Twilio's have some 30."""


class Unproved(Exception):
    """It is not certain that the provider has sent this."""


class Unreadable(ValueError):
    """It is the provider's, and says nothing that can be read."""


class Posted(NamedTuple):
    """A request. `query`: as it came, without the question mark."""

    headers: Mapping[str, str]
    query: str
    body: bytes
    now: datetime


class Said(NamedTuple):
    """What a request says. `answer`: XML that the provider wants to hear."""

    reports: Sequence[Report] = ()
    inbound: Inbound | None = None
    answer: str = ""


class Source(Protocol):
    """A provider that posts. `channel`: what it reports of. `tenants`: whose texts an answer to it ends."""

    @property
    def channel(self) -> str: ...

    @property
    def tenants(self) -> Sequence[str]: ...

    async def read(self, posted: Posted) -> Said:
        """What a request says.

        Raises:
            Unproved: somebody else has sent it. Unreadable: it is no document of this provider's. Unfetched: that cannot be told
            now.
        """


class _Mail:
    channel = "email"
    tenants: Sequence[str] = ()


class FromSendGrid(_Mail):
    """SendGrid, by its keys."""

    def __init__(self, name: str, keys: Sequence[str]) -> None:
        self._name, self._keys = name, keys

    async def read(self, posted: Posted) -> Said:
        """See `Source`."""
        signature = posted.headers.get("X-Twilio-Email-Event-Webhook-Signature", "")
        timestamp = posted.headers.get("X-Twilio-Email-Event-Webhook-Timestamp", "")
        if not any(
            is_signed_by_sendgrid(posted.body, signature=signature, timestamp=timestamp, key=key, now=posted.now)
            for key in self._keys
        ):
            raise Unproved
        return Said(of_sendgrid(self._name, _json(posted.body)))


class FromPostmark(_Mail):
    """Postmark, by a login."""

    def __init__(self, name: str, logins: Sequence[tuple[str, str]]) -> None:
        self._name, self._logins = name, logins

    async def read(self, posted: Posted) -> Said:
        """See `Source`."""
        if not is_authorized(posted.headers.get("Authorization", ""), self._logins):
            raise Unproved
        return Said(of_postmark(self._name, _object(_json(posted.body))))


class _Sns:
    """A topic of Amazon SNS, by the certificate that it signs with."""

    def __init__(self, topic: str, certificates: Certificates) -> None:
        self._topic, self._certificates = topic, certificates
        self._hosts = {f"sns.{topic.split(':')[3]}.amazonaws.com{end}" for end in ("", ".cn")}

    async def message(self, posted: Posted) -> Mapping[str, Any] | None:
        """The notification; None: the topic asked whether we want to hear from it, and was told so.

        Raises:
            Unproved, Unreadable, Unfetched: as `Source.read`.
        """
        try:
            said = _object(msgspec.json.decode(posted.body))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, Unreadable) as error:
            raise Unproved from error
        # Before anything is fetched: a stranger must not have us ask Amazon whenever he likes.
        url = certificate_url(said)
        if said.get("TopicArn") != self._topic or url is None or urlsplit(url).netloc not in self._hosts:
            raise Unproved
        certificate = await self._certificates.get(url)
        if not is_signed_by_sns(said, certificate, topic=self._topic, now=posted.now):
            raise Unproved
        if said["Type"] == "SubscriptionConfirmation":
            await self._confirm(said.get("SubscribeURL"))
        return said if said["Type"] == "Notification" else None

    async def _confirm(self, url: object) -> None:
        try:
            parts = urlsplit(url if isinstance(url, str) else "")
        except ValueError as error:
            raise Unreadable("`SubscribeURL` is no address") from error
        if parts.scheme != "https" or parts.netloc not in self._hosts:
            raise Unreadable("`SubscribeURL` is none of Amazon SNS in the topic's region")
        await self._certificates.confirm(parts.geturl())


class FromSes(_Mail):
    """Amazon SES, which publishes to a topic of SNS."""

    def __init__(self, name: str, topic: str, certificates: Certificates) -> None:
        self._name, self._sns = name, _Sns(topic, certificates)

    async def read(self, posted: Posted) -> Said:
        """See `Source`."""
        message = await self._sns.message(posted)
        return Said() if message is None else Said(of_ses(self._name, _object(_json(_text(message)))))


class FromSnsTexts:
    """Answers to texts, which Amazon publishes to a topic of SNS. How texts fare it tells nobody but its own log."""

    channel = "sms"

    def __init__(self, topic: str, certificates: Certificates, tenants: Sequence[str]) -> None:
        self.tenants = tenants
        self._sns = _Sns(topic, certificates)

    async def read(self, posted: Posted) -> Said:
        """See `Source`."""
        message = await self._sns.message(posted)
        if message is None:
            return Said()
        at = datetime.fromisoformat(str(message["Timestamp"]))  # it was checked with the signature
        return Said(inbound=inbound_of_sns(_object(_json(_text(message))), at))


class FromTwilio:
    """Twilio, by the account's auth token. It posts reports and answers to the same address."""

    channel = "sms"

    def __init__(self, name: str, url: str, tokens: Sequence[str], tenants: Sequence[str]) -> None:
        self.tenants = tenants
        self._name, self._url, self._tokens = name, url, tokens

    async def read(self, posted: Posted) -> Said:
        """See `Source`."""
        try:
            form = parse_qsl(posted.body.decode(), keep_blank_values=True, max_num_fields=PARAMETERS_MAX)
        except ValueError as error:
            raise Unproved from error
        url = f"{self._url}?{posted.query}" if posted.query else self._url
        if not is_signed_by_twilio(url, form, posted.headers.get("X-Twilio-Signature", ""), self._tokens):
            raise Unproved
        said, answer = dict(form), "<Response/>"  # nobody is answered
        if "MessageStatus" in said:
            reference = parse_qs(posted.query, max_num_fields=PARAMETERS_MAX).get(REFERENCE, [""])[0]
            report = report_of(self._name, said, posted.now, reference=reference[: TOKEN_CHARS_MAX + 1])
            return Said([report] if report is not None else [], answer=answer)
        return Said(inbound=inbound_of(said), answer=answer)


def _text(message: Mapping[str, Any]) -> bytes:
    text = message.get("Message")
    return text.encode("utf-8", "replace") if isinstance(text, str) else b""


def _json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable("it is not JSON") from error


def _object(said: Any) -> Mapping[str, Any]:
    if not isinstance(said, dict):
        raise Unreadable("it is not an object")
    return said
