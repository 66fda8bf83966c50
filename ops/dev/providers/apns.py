"""Apple's push service, simulated: HTTP/2 over TLS, the JWT checked, one request at a time until the first was accepted."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from ops.dev.providers.acceptlog import AcceptLog
from ops.dev.providers.apns_connection import ApnsServerConnection, Refusal, Request
from ops.dev.providers.faults import Faults

PAYLOAD_BYTES_MAX: Final = 4096
TOKEN_SECONDS_MAX: Final = 3600
TOKEN_SECONDS_MIN: Final = 20 * 60
"""Tokens may not be replaced by ones that are younger by less. Apple does not say how it counts; here the times in them do."""

_TOPIC: Final = re.compile(r"[A-Za-z0-9.-]+", re.ASCII)
_DEVICE: Final = re.compile(r"(?:[0-9a-fA-F]{2}){8,100}", re.ASCII)
_PUSH_TYPES: Final = ("alert", "background", "voip", "complication", "fileprovider", "mdm", "liveactivity", "location")


class ApnsSimulator:
    """One environment of APNs. Use it as `async with`.

    Args:
        keys: public keys and the team each is of, by key id.
        topics: the apps that these keys may send to; none: all.
        tls: with the server's certificate.
        host, port: where it listens; 0: a free port.
        now: the clock that tokens are held against.
    """

    def __init__(
        self,
        keys: Mapping[str, tuple[EllipticCurvePublicKey, str]],
        tls: ssl.SSLContext,
        *,
        topics: frozenset[str] = frozenset(),
        host: str = "127.0.0.1",
        port: int = 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.log = AcceptLog()
        self.faults = Faults()
        self.gone: dict[str, int] = {}
        """Devices that have lost the app, and since when, in milliseconds since 1970."""
        self.foreign: set[str] = set()
        """Devices of the other environment."""
        self.tokens: dict[str, dict[str, int]] = {}
        """Every JWT that was accepted, by key id, with its `iat`."""
        self.connections: set[ApnsServerConnection] = set()
        self.connected = 0
        """How many connections there were in all."""
        self._keys, self._topics, self._now = keys, topics, now
        self._tls, self._host, self.port = tls, host, port
        self._server: asyncio.Server | None = None
        tls.set_alpn_protocols(["h2"])
        tls.sni_callback = self._greeted

    async def start(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: ApnsServerConnection(self), self._host, self.port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut off what is under way."""
        if self._server is None:
            return
        self._server.close()
        for connection in tuple(self.connections):
            connection.abort()
        await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _greeted(self, _socket: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> int | None:
        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR if self.faults.breaks_tls else None

    def take(self, request: Request) -> str:
        """Accept a push; its apns-id.

        Raises:
            Refusal: in Apple's words.
        """
        method, path = request.headers.get(":method"), request.headers.get(":path", "")
        if method != "POST":
            raise Refusal(405, "MethodNotAllowed")
        if not path.startswith("/3/device/"):
            raise Refusal(404, "BadPath")
        self._check_token(request.headers.get("authorization", ""))
        topic = self._check_headers(request.headers)
        payload = self._check_payload(request.body)
        self._check_device(path.removeprefix("/3/device/"))
        apns_id = request.headers.get("apns-id") or str(uuid.uuid4())
        alert = payload["aps"].get("alert") or {}
        self.log.add(
            id=apns_id,
            channel="push",
            to=path.removeprefix("/3/device/"),
            key=apns_id,
            shown={"app": topic, "badge": payload["aps"].get("badge"), **alert},
            raw={
                "payload": payload,
                **{name: text for name, text in request.headers.items() if name != "authorization"},
            },
        )
        return apns_id

    def _check_token(self, header: str) -> None:
        if not header.lower().startswith("bearer "):
            raise Refusal(403, "MissingProviderToken")
        token = header[7:]
        try:
            key_id = jwt.get_unverified_header(token).get("kid", "")
            key, team = self._keys[key_id]
            claims = jwt.decode(
                token, key, algorithms=["ES256"], options={"require": ["iss", "iat"], "verify_iat": False}
            )
        except (jwt.PyJWTError, KeyError) as error:
            raise Refusal(403, "InvalidProviderToken") from error
        age = self._now() - claims["iat"]
        if claims["iss"] != team or age < -60:
            raise Refusal(403, "InvalidProviderToken")
        if age > TOKEN_SECONDS_MAX:
            raise Refusal(403, "ExpiredProviderToken")
        seen = self.tokens.setdefault(key_id, {})
        if token not in seen:
            if any(abs(claims["iat"] - iat) < TOKEN_SECONDS_MIN for iat in seen.values()):
                raise Refusal(429, "TooManyProviderTokenUpdates")
            seen[token] = claims["iat"]

    def _check_headers(self, headers: Mapping[str, str]) -> str:
        topic = headers.get("apns-topic", "")
        if not topic:
            raise Refusal(400, "MissingTopic")
        if not _TOPIC.fullmatch(topic):
            raise Refusal(400, "BadTopic")
        if self._topics and topic not in self._topics:
            raise Refusal(400, "TopicDisallowed")
        if headers.get("apns-push-type", "alert") not in _PUSH_TYPES:
            raise Refusal(400, "InvalidPushType")
        if headers.get("apns-priority", "10") not in ("10", "5", "1"):
            raise Refusal(400, "BadPriority")
        if not headers.get("apns-expiration", "0").isdigit():
            raise Refusal(400, "BadExpirationDate")
        if len(headers.get("apns-collapse-id", "").encode()) > 64:
            raise Refusal(400, "BadCollapseId")
        try:
            uuid.UUID(headers.get("apns-id", "0" * 32))
        except ValueError as error:
            raise Refusal(400, "BadMessageId") from error
        return topic

    def _check_payload(self, body: bytes) -> dict[str, Any]:
        if not body:
            raise Refusal(400, "PayloadEmpty")
        if len(body) > PAYLOAD_BYTES_MAX:
            raise Refusal(413, "PayloadTooLarge")
        try:
            payload = json.loads(body)
            payload["aps"].get("alert")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(400, "PayloadEmpty") from error
        return dict(payload)

    def _check_device(self, device: str) -> None:
        if not device:
            raise Refusal(400, "MissingDeviceToken")
        if not _DEVICE.fullmatch(device) or device in self.foreign:
            raise Refusal(400, "BadDeviceToken")
        if device in self.gone:
            raise Refusal(410, "Unregistered", self.gone[device])
