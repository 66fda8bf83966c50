"""Simulated providers of text messages: Twilio's Messages API, and Publish of Amazon SNS."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

import aiohttp
from aiohttp import web

from engine.channels.sms.segments import segmented
from ops.dev.providers.acceptlog import KEPT_MAX
from ops.dev.providers.faults import Answers
from ops.dev.providers.httpsimulator import HttpSimulator

BODY_CHARS_MAX: Final = 1600
"""Twilio's limit (21617)."""

_NUMBER: Final = re.compile(r"\+[1-9][0-9]{6,14}", re.ASCII)

MAGIC: Final[Mapping[str, tuple[int, str]]] = {
    "+15005550001": (400, "21211"),
    "+15005550002": (400, "21612"),
    "+15005550003": (400, "21408"),
    "+15005550004": (400, "21610"),
    "+15005550009": (400, "21614"),
}
"""Numbers that Twilio itself refuses, each with its code: https://www.twilio.com/docs/iam/test-credentials."""

STOPS: Final = ("STOP", "STOPALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT")
STARTS: Final = ("START", "YES", "UNSTOP")


class _Sent(NamedTuple):
    """A text. `status_url`: where its reports are posted."""

    to: str
    sender: str
    status_url: str


class TwilioSimulator(HttpSimulator):
    """https://www.twilio.com/docs/messaging/api/message-resource, for one account.

    Args:
        account: its SID.
        secret: its auth token.
        inbound_url: where answers of people are posted to; "": nowhere.
    """

    def __init__(self, account: str, secret: str, *, inbound_url: str = "", **listening: Any) -> None:
        super().__init__(**listening)
        self.account, self.secret, self.inbound_url = account, secret, inbound_url
        self.opted_out: set[str] = set()
        self._sent: OrderedDict[str, _Sent] = OrderedDict()

    def routes(self) -> list[web.RouteDef]:
        """One."""
        return [web.post("/2010-04-01/Accounts/{account}/Messages.json", self._create)]

    def refusal(self, fault: Answers) -> web.Response:
        """As Twilio writes errors."""
        if not fault.code:
            return web.Response(status=fault.status, text=fault.text, headers=fault.headers)
        number = int(fault.code)
        more = f"https://www.twilio.com/docs/errors/{number}"
        body = {"code": number, "message": fault.text, "more_info": more, "status": fault.status}
        return web.json_response(body, status=fault.status, headers=fault.headers)

    async def _create(self, request: web.Request) -> web.Response:
        if not self._is_ours(request):
            return self.refusal(Answers(status=401, code="20003", text="Authentication Error"))
        form = await request.post()
        to, text = str(form.get("To", "")), str(form.get("Body", ""))
        sender = str(form.get("From") or form.get("MessagingServiceSid") or "")
        refused = self._refused(to, text, sender)
        if refused is not None:
            return self.refusal(refused)
        id = "SM" + secrets.token_hex(16)
        self._sent[id] = _Sent(to, sender, str(form.get("StatusCallback", "")))
        while len(self._sent) > KEPT_MAX:
            self._sent.popitem(last=False)
        shown = {"text": text, "from": sender}
        raw = {name: str(value) for name, value in form.items()}
        self.log.add(id=id, channel="sms", to=to, key=f"{to}\n{text}", shown=shown, raw=raw)
        counted = str(len(segmented(text).segments))
        body = {"sid": id, "status": "queued", "to": to, "body": text, "num_segments": counted, "error_code": None}
        return web.json_response(body, status=201)

    def _is_ours(self, request: web.Request) -> bool:
        right = base64.b64encode(f"{self.account}:{self.secret}".encode()).decode()
        given = request.headers.get("Authorization", "")
        return request.match_info["account"] == self.account and hmac.compare_digest(given, f"Basic {right}")

    def _refused(self, to: str, text: str, sender: str) -> Answers | None:
        if to in MAGIC:
            status, code = MAGIC[to]
            return Answers(status=status, code=code)
        if _NUMBER.fullmatch(to) is None:
            return Answers(status=400, code="21211", text="Invalid 'To' Phone Number")
        if to in self.opted_out:
            return Answers(status=400, code="21610", text="Attempt to send to unsubscribed recipient")
        if not sender:
            return Answers(status=400, code="21603", text="A 'From' phone number is required")
        if not text:
            return Answers(status=400, code="21602", text="Message body is required")
        if len(text) > BODY_CHARS_MAX:
            return Answers(status=400, code="21617", text="The concatenated message body exceeds the limit")
        return None

    async def report(self, id: str, status: str, error_code: str = "") -> int:
        """Post a status callback for a text that was accepted, to the address given with it; the answer's status.

        Raises:
            KeyError: it was not, or too long ago.
        """
        sent = self._sent[id]
        form = {
            "MessageSid": id,
            "MessageStatus": status,
            "AccountSid": self.account,
            "To": sent.to,
            "From": sent.sender,
        }
        if error_code:
            form["ErrorCode"] = error_code
        return await self._post(sent.status_url, form)

    async def answer(self, number: str, sender: str, text: str) -> int:
        """Somebody answers with a text: STOP and START act at once, and the text is posted to `inbound_url`; what that says."""
        word = text.strip().upper()
        kind = "STOP" if word in STOPS else "START" if word in STARTS else ""
        if kind == "STOP":
            self.opted_out.add(number)
        elif kind == "START":
            self.opted_out.discard(number)
        id = "SM" + secrets.token_hex(16)
        form = {"MessageSid": id, "From": number, "To": sender, "Body": text, "AccountSid": self.account}
        if kind:
            form["OptOutType"] = kind
        return await self._post(self.inbound_url, form)

    async def _post(self, url: str, form: dict[str, str]) -> int:
        signed = url + "".join(name + form[name] for name in sorted(form))
        signature = base64.b64encode(hmac.new(self.secret.encode(), signed.encode(), hashlib.sha1).digest()).decode()
        headers = {"X-Twilio-Signature": signature}
        timeout = aiohttp.ClientTimeout(total=15)  # Twilio's own
        async with aiohttp.ClientSession(timeout=timeout) as http, http.post(url, data=form, headers=headers) as reply:
            return reply.status


class SnsSimulator(HttpSimulator):
    """Action Publish to a phone number: https://docs.aws.amazon.com/sns/latest/api/API_Publish.html. The signature is checked.

    Args:
        key_id: of the one key that it knows.
        secret: of that key.
        region: whose it is.
    """

    def __init__(self, key_id: str, secret: str, region: str = "eu-central-1", **listening: Any) -> None:
        super().__init__(**listening)
        self.key_id, self.secret, self.region = key_id, secret, region
        self.opted_out: set[str] = set()

    def routes(self) -> list[web.RouteDef]:
        """One."""
        return [web.post("/", self._publish)]

    def refusal(self, fault: Answers) -> web.Response:
        """As Amazon's query services write errors."""
        kind = "Sender" if fault.status < 500 else "Receiver"
        body = (
            f'<ErrorResponse xmlns="http://sns.amazonaws.com/doc/2010-03-31/"><Error><Type>{kind}</Type>'
            f"<Code>{escape(fault.code)}</Code><Message>{escape(fault.text)}</Message></Error>"
            f"<RequestId>{secrets.token_hex(8)}</RequestId></ErrorResponse>"
        )
        text = body if fault.code else fault.text
        return web.Response(status=fault.status, text=text, content_type="text/xml", headers=fault.headers)

    async def _publish(self, request: web.Request) -> web.Response:
        body = await request.read()
        wrong = self._wrong_signature(request, body)
        if wrong:
            return self.refusal(Answers(status=403, code=wrong))
        form = dict(parse_qsl(body.decode()))
        to, text = form.get("PhoneNumber", ""), form.get("Message", "")
        if (form.get("Action"), form.get("Version")) != ("Publish", "2010-03-31"):
            return self.refusal(Answers(status=400, code="InvalidAction"))
        if _NUMBER.fullmatch(to) is None:
            text = "Invalid parameter: PhoneNumber Reason: it is not valid to publish to"
            return self.refusal(Answers(status=400, code="InvalidParameter", text=text))
        if not text:
            return self.refusal(Answers(status=400, code="InvalidParameter", text="Invalid parameter: Empty message"))
        if to in self.opted_out:
            return self.refusal(Answers(status=400, code="OptedOut", text="The phone number has opted out"))
        id = secrets.token_hex(16)
        self.log.add(id=id, channel="sms", to=to, key=f"{to}\n{text}", shown={"text": text}, raw=form)
        answer = (
            f'<PublishResponse xmlns="http://sns.amazonaws.com/doc/2010-03-31/"><PublishResult><MessageId>{id}</MessageId>'
            f"</PublishResult><ResponseMetadata><RequestId>{secrets.token_hex(8)}</RequestId></ResponseMetadata></PublishResponse>"
        )
        return web.Response(text=answer, content_type="text/xml")

    def _wrong_signature(self, request: web.Request, body: bytes) -> str:
        """The code of what is wrong with it; "": nothing. Written from Amazon's description, apart from the code that signs."""
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/sns/aws4_request, SignedHeaders=([a-z0-9;-]+), "
            r"Signature=([0-9a-f]{64})",
            request.headers.get("Authorization", ""),
        )
        if found is None:
            return "MissingAuthenticationToken"
        key_id, day, region, names, signature = found.groups()
        if key_id != self.key_id:
            return "InvalidClientTokenId"
        if region != self.region or "host" not in names.split(";"):
            return "SignatureDoesNotMatch"
        stamp = request.headers.get("X-Amz-Date", "")
        lines = [f"{name}:{request.headers.get(name, '').strip()}" for name in names.split(";")]
        canonical = "\n".join(["POST", "/", "", *lines, "", names, hashlib.sha256(body).hexdigest()])
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{day}/{region}/sns/aws4_request\n{digest}"
        key = ("AWS4" + self.secret).encode()
        for part in (day, region, "sns", "aws4_request", text):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        return "" if hmac.compare_digest(key.hex(), signature) and stamp.startswith(day) else "SignatureDoesNotMatch"
