"""Simulated mail services: SendEmail of Amazon SES (its signature is checked), Mail Send of SendGrid, Postmark's e-mail API."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from engine.channels.aws import Credentials, signed_headers
from ops.dev.providers.acceptlog import KEPT_MAX
from ops.dev.providers.faults import Answers
from ops.dev.providers.httpsimulator import HttpSimulator
from ops.dev.providers.smtp import shown_of

METADATA_CHARS_MAX: Final = 80
"""Of one value at Postmark."""

CLOCK_SECONDS_MAX: Final = 300.0
"""Amazon refuses what was signed earlier or later."""

EVENT_SECONDS: Final = 10.0
"""How long it waits for an answer to an event."""

_ADDRESS: Final = re.compile(r"[^@\s,<>]+@[A-Za-z0-9.-]+\.[A-Za-z0-9-]+", re.ASCII)
_AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<day>\d{8})/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request,"
    r" ?SignedHeaders=(?P<names>[a-z0-9;-]+), ?Signature=(?P<signature>[0-9a-f]{64})"
)


class MailService(HttpSimulator):
    """What they have in common: who bounces before a mail is taken, and how a mail is noted."""

    def __init__(self, **listening: Any) -> None:
        super().__init__(**listening)
        self.inactive: set[str] = set()
        """Recipients that the service sends nothing to any more."""

    def _note(self, id: str, to: str, shown: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
        self.log.add(id=id, channel="email", to=to, key=str(shown["message_id"]), shown=dict(shown), raw=dict(raw))


class SesSimulator(MailService):
    """One account in one region."""

    def __init__(self, credentials: Credentials, region: str = "eu-central-1", **listening: Any) -> None:
        super().__init__(**listening)
        self._credentials, self._region = credentials, region

    def routes(self) -> list[web.RouteDef]:
        """One."""
        return [web.post("/v2/email/outbound-emails", self._send)]

    def refusal(self, fault: Answers) -> web.Response:
        """As Amazon writes errors."""
        headers = {"x-amzn-ErrorType": fault.code, **fault.headers} if fault.code else fault.headers
        return web.json_response({"message": fault.text}, status=fault.status, headers=headers)

    async def _send(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not self._is_ours(request, body):
            return self.refusal(
                Answers(status=403, code="InvalidSignatureException", text="The signature does not match")
            )
        try:
            sent = msgspec.json.decode(body)
            (to,) = sent["Destination"]["ToAddresses"]
            raw = base64.b64decode(sent["Content"]["Raw"]["Data"], validate=True)
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError, binascii.Error):
            return self.refusal(Answers(status=400, code="BadRequestException", text="Invalid request"))
        if _ADDRESS.fullmatch(str(to)) is None:
            return self.refusal(Answers(status=400, code="BadRequestException", text="Illegal address"))
        id = f"0107{secrets.token_hex(20)}-000000"
        tags = {one["Name"]: one["Value"] for one in sent.get("EmailTags", [])}
        self._note(id, to, shown_of(raw), {"message": raw.decode("ascii", "replace"), "tags": tags})
        return web.json_response({"MessageId": id})

    def _is_ours(self, request: web.Request, body: bytes) -> bool:
        """Sign the request as it came, with what we know, and compare: a signature covers the headers that it names."""
        found = _AUTHORIZATION.fullmatch(request.headers.get("Authorization", ""))
        if found is None or found["key"] != self._credentials.key_id or found["region"] != self._region:
            return False
        try:
            at = datetime.strptime(request.headers.get("X-Amz-Date", ""), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        except ValueError:
            return False
        if abs((datetime.now(UTC) - at).total_seconds()) > CLOCK_SECONDS_MAX or found["service"] != "ses":
            return False
        added = {"host", "x-amz-date", "x-amz-security-token"}
        headers = {name: request.headers.get(name, "") for name in found["names"].split(";") if name not in added}
        right = signed_headers(
            self._credentials,
            url=f"http://{request.host}{request.path}",
            headers=headers,
            body=body,
            region=self._region,
            service="ses",
            now=at,
        )
        return right["Authorization"] == request.headers["Authorization"]


class _Sent(NamedTuple):
    """A mail that SendGrid has taken. `own`: the custom arguments that came with it; each event gives them back."""

    to: str
    own: Mapping[str, str]


class SendGridSimulator(MailService):
    """One account, whose senders are verified by their domain.

    Args:
        events_url: where events are posted to; "": nowhere.
        events_key: what they are signed with.
    """

    def __init__(
        self,
        key: str,
        domain: str = "example.org",
        *,
        events_url: str = "",
        events_key: ec.EllipticCurvePrivateKey | None = None,
        **listening: Any,
    ) -> None:
        super().__init__(**listening)
        self._key, self._domain = key, domain
        self._events_url, self._events_key = events_url, events_key or ec.generate_private_key(ec.SECP256R1())
        self._sent: OrderedDict[str, _Sent] = OrderedDict()

    def routes(self) -> list[web.RouteDef]:
        """One."""
        return [web.post("/v3/mail/send", self._send)]

    def refusal(self, fault: Answers) -> web.Response:
        """As SendGrid writes errors; `code` of the fault is the field."""
        body = {"errors": [{"message": fault.text, "field": fault.code or None, "help": None}]}
        return web.json_response(body, status=fault.status, headers=fault.headers)

    async def _send(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self._key}":
            return self.refusal(
                Answers(status=401, text="The provided authorization grant is invalid, expired, or revoked")
            )
        sent = await request.json()
        to = sent["personalizations"][0]["to"][0]["email"]
        if _ADDRESS.fullmatch(to) is None:
            said = "Does not contain a valid address."
            return self.refusal(Answers(status=400, code="personalizations.0.to.0.email", text=said))
        if not sent["from"]["email"].endswith(f"@{self._domain}"):
            said = "The from address does not match a verified Sender Identity."
            return self.refusal(Answers(status=403, code="from", text=said))
        id = secrets.token_urlsafe(16)
        texts = {content["type"]: content["value"] for content in sent["content"]}
        headers = sent["headers"]
        shown = {
            "subject": sent["subject"],
            "from": f"{sent['from'].get('name', '')} <{sent['from']['email']}>",
            "to": to,
            "text": texts["text/plain"],
            "html": texts["text/html"],
            "message_id": headers["Message-ID"],
            "headers": headers,
        }
        own = sent.get("custom_args", {})
        self._sent[id] = _Sent(to, own)
        while len(self._sent) > KEPT_MAX:
            self._sent.popitem(last=False)
        self._note(id, to, shown, {"custom_args": own})
        return web.Response(status=202, headers={"X-Message-Id": id})

    async def report(self, id: str, event: str, **members: str) -> int:
        """Post an event about a mail that was taken, signed (Signed Event Webhook); the answer's status.

        Args:
            event: as SendGrid calls it.
            members: what else it says.

        Raises:
            KeyError: it was not taken, or too long ago.
        """
        sent, now = self._sent[id], int(time.time())
        named = {"event": event, "email": sent.to, "timestamp": now, "sg_event_id": secrets.token_urlsafe(16)}
        body = msgspec.json.encode([{**sent.own, **named, "sg_message_id": f"{id}.recvd-0", **members}])
        signature = self._events_key.sign(str(now).encode() + body, ec.ECDSA(hashes.SHA256()))
        headers = {
            "Content-Type": "application/json",
            "X-Twilio-Email-Event-Webhook-Signature": base64.b64encode(signature).decode(),
            "X-Twilio-Email-Event-Webhook-Timestamp": str(now),
        }
        timeout = aiohttp.ClientTimeout(total=EVENT_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.post(self._events_url, data=body, headers=headers) as reply,
        ):
            return reply.status


class PostmarkSimulator(MailService):
    """One server."""

    def __init__(self, key: str, streams: frozenset[str] = frozenset({"outbound"}), **listening: Any) -> None:
        super().__init__(**listening)
        self._key, self._streams = key, streams

    def routes(self) -> list[web.RouteDef]:
        """One."""
        return [web.post("/email", self._send)]

    def refusal(self, fault: Answers) -> web.Response:
        """As Postmark writes errors."""
        if not fault.code:
            return web.Response(status=fault.status, text=fault.text, headers=fault.headers)
        body = {"ErrorCode": int(fault.code), "Message": fault.text}
        return web.json_response(body, status=fault.status, headers=fault.headers)

    async def _send(self, request: web.Request) -> web.Response:
        if request.headers.get("X-Postmark-Server-Token") != self._key:
            return self.refusal(Answers(status=401, code="10", text="The Server Token you provided is invalid"))
        sent = await request.json()
        to = sent["To"]
        if _ADDRESS.fullmatch(to) is None:
            return self.refusal(
                Answers(status=422, code="300", text=f"Error parsing 'To': Illegal email address '{to}'")
            )
        if to in self.inactive:
            said = f"You tried to send to a recipient that has been marked as inactive. Found inactive addresses: {to}."
            return self.refusal(Answers(status=422, code="406", text=said))
        if sent["MessageStream"] not in self._streams:
            return self.refusal(Answers(status=422, code="1235", text="The provided MessageStream does not exist"))
        headers = {one["Name"]: one["Value"] for one in sent["Headers"]}
        own = headers.get("X-PM-KeepID") == "true"
        digest = hashlib.sha256(secrets.token_bytes(16)).hexdigest()
        id = f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"
        shown = {
            "subject": sent["Subject"],
            "from": sent["From"],
            "to": to,
            "text": sent["TextBody"],
            "html": sent["HtmlBody"],
            "message_id": headers["Message-ID"] if own else f"<{id}@mtasv.net>",
            "headers": headers,
        }
        metadata = sent.get("Metadata", {})
        if any(len(value) > METADATA_CHARS_MAX for value in metadata.values()):
            return self.refusal(Answers(status=422, code="300", text="Metadata value exceeds the limit"))
        self._note(id, to, shown, {"metadata": metadata})
        taken = {"To": to, "SubmittedAt": datetime.now(UTC).isoformat(), "MessageID": id}
        return web.json_response({**taken, "ErrorCode": 0, "Message": "OK"})
