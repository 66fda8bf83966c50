"""Sends pushes to browsers: Web Push (RFC 8030), encrypted (RFC 8291), signed by VAPID (RFC 8292)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import ssl
import time
from typing import Any, Final
from urllib.parse import urljoin

import msgspec

from engine.channels.channel import Outcome, Unsendable
from engine.channels.exchange import Answer, Silence, exchange, open_http
from engine.channels.push.answers import silent
from engine.channels.push.encryption import PLAINTEXT_BYTES_MAX, UnusableKeys, encrypt
from engine.channels.push.message import PushMessage, PushTarget, fitted, short_name, with_data
from engine.channels.push.signing import VapidTokens
from engine.channels.push.webpush_answers import Refusals, webpush_outcome
from engine.directory.push_tokens import Platform

HOSTS: Final = (
    "fcm.googleapis.com",
    "android.googleapis.com",
    "updates.push.services.mozilla.com",
    "*.push.services.mozilla.com",
    "web.push.apple.com",
    "*.push.apple.com",
    "*.notify.windows.com",
)
"""The push services of the browsers there are. An endpoint comes from a browser, so from anybody: whoever may register one
could else have us post to servers that only we can reach. Nobody but these companies decides where these names lead."""

TAG_BYTES_MAX: Final = 64

CONNECTIONS_MAX: Final = 200
"""As of FCM; three push services get nearly all."""

_ENDPOINT: Final = re.compile(
    r"https://(?P<host>[A-Za-z0-9.-]{1,253})(?::(?P<port>[0-9]{1,5}))?(?P<path>/[!-~]*)", re.ASCII
)


class Hosts:
    """Which hosts may be posted to. `*.` stands for one or more labels. A port may be named: `localhost:8443`."""

    def __init__(self, allowed: tuple[str, ...] = HOSTS) -> None:
        self._names = frozenset(name.lower() for name in allowed if not name.startswith("*."))
        self._endings = tuple(name[1:].lower() for name in allowed if name.startswith("*."))

    def origin(self, endpoint: str) -> str | None:
        """The origin of an endpoint that may be posted to (RFC 6454, 6.2), else None."""
        found = _ENDPOINT.fullmatch(endpoint)
        if found is None:
            return None
        host = found["host"].lower()
        if found["port"] not in (None, "443"):
            host = f"{host}:{found['port']}"
        return f"https://{host}" if host in self._names or host.endswith(self._endings) else None


def webpush_payload(message: PushMessage) -> bytes:
    """What the page's service worker gets, before it is encrypted, at most PLAINTEXT_BYTES_MAX. Raises Unsendable.

    `tag` is for `showNotification`: a push that was sent twice is shown once.
    """

    def build(title: str, body: str, data: Any) -> bytes:
        badge = {} if message.badge is None else {"badge": message.badge}
        texts = {"title": title, "body": body, "tag": short_name(message.replaces, TAG_BYTES_MAX)}
        return msgspec.json.encode(message.essentials() | texts | badge | with_data(data))

    return fitted(build, message, PLAINTEXT_BYTES_MAX)


def webpush_headers(message: PushMessage) -> dict[str, str]:
    """What the push service is told (RFC 8030, 5.2 to 5.4): when to give up, how urgent it is, what it takes the place of."""
    urgency = {"critical": "high", "normal": "normal", "bulk": "low"}[message.lane]
    topic = base64.urlsafe_b64encode(hashlib.sha256(message.replaces.encode()).digest()[:24]).decode()
    return {
        "TTL": str(message.ttl_seconds),
        "Urgency": urgency,
        "Topic": topic,  # 32 characters of base64url, the most there may be
        "Content-Encoding": "aes128gcm",
        "Content-Type": "application/octet-stream",
    }


class WebPushSender:
    """Sends with one VAPID key.

    Args:
        name: in the configuration.
        tokens: signs in with the key that the browsers subscribed with.
        apps: the sites whose browsers did; none: all.
        hosts: of push services.
        tls: whom to trust; by default the system's authorities.
    """

    platform: Platform = "webpush"

    def __init__(
        self,
        name: str,
        tokens: VapidTokens,
        apps: frozenset[str] = frozenset(),
        *,
        hosts: tuple[str, ...] = HOSTS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self.apps = apps
        self._tokens = tokens
        self._hosts = Hosts(hosts)
        self._refusals = Refusals()
        self._http = open_http(connections_max=CONNECTIONS_MAX, tls=tls)

    async def send(self, message: PushMessage, target: PushTarget, *, key: str, deadline_seconds: float) -> Outcome:
        """Send to one subscription. One of a host that is no known push service is left alone: it may be one by next year."""
        until = asyncio.get_running_loop().time() + deadline_seconds
        if (origin := self._hosts.origin(target.token)) is None:
            return Outcome(kind="config", provider=self.name, code="host", scope="target")
        if target.keys is None:
            return Outcome(kind="target_invalid", provider=self.name, code="keys")
        try:
            body = encrypt(webpush_payload(message), target.keys.p256dh, target.keys.auth)
        except Unsendable as error:
            return msgspec.structs.replace(error.outcome, provider=self.name)
        except UnusableKeys:
            return Outcome(kind="target_invalid", provider=self.name, code="keys")
        headers = webpush_headers(message)
        answer = await self._post(target.token, origin, headers, body, until)
        if isinstance(answer, Answer) and answer.status in (301, 307, 308):
            location = answer.headers.get("Location", "")
            moved = urljoin(target.token, location)
            if location and (new := self._hosts.origin(moved)) is not None:
                origin, answer = new, await self._post(moved, new, headers, body, until)
        if isinstance(answer, Silence):
            return silent(self.name, answer)
        return self._outcome(answer, origin, hashlib.sha256(target.token.encode()).digest()[:16])

    async def _post(
        self, endpoint: str, origin: str, headers: dict[str, str], body: bytes, until: float
    ) -> Answer | Silence:
        signed = headers | {"Authorization": self._tokens.authorization(origin, time.time())}
        left = until - asyncio.get_running_loop().time()
        return await exchange(self._http, endpoint, headers=signed, body=body, deadline_seconds=left)

    def _outcome(self, answer: Answer, origin: str, endpoint: bytes) -> Outcome:
        wait = answer.retry_after_seconds
        outcome = webpush_outcome(self.name, answer.status, answer.body, retry_after_seconds=wait)
        if outcome.kind == "ok":
            self._refusals.accepted(origin, endpoint)
            # `Location` names the message, and whoever has it can withdraw it: a hash is enough to tell two apart.
            location = answer.headers.get("Location", "")
            name = hashlib.sha256(location.encode()).hexdigest()[:32] if location else ""
            return msgspec.structs.replace(outcome, provider_id=name)
        if answer.status in (401, 403) and outcome.scope == "domain":
            return self._refusals.judged(outcome, origin, endpoint)
        return outcome

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()
