"""A push service of browsers, simulated with the browsers behind it: RFC 8030, and what RFC 8291 and 8292 have each side check.

Decrypting is written from the RFCs, apart from the code that encrypts: a mistake that both made would else not be seen.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import secrets
import time
from typing import Any, Final

import jwt
from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ops.dev.providers.faults import Answers
from ops.dev.providers.httpsimulator import HttpSimulator

BODY_BYTES_MAX: Final = 4096
TTL_SECONDS_MAX: Final = 2_592_000
"""Mozilla's: it keeps nothing for longer, and says so in the answer's own TTL."""

_TOPIC: Final = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
_VAPID: Final = re.compile(r"vapid t=([A-Za-z0-9_.-]+), ?k=([A-Za-z0-9_-]+)", re.ASCII)
_URGENCIES: Final = ("very-low", "low", "normal", "high")


class Browser:
    """A subscription with the keys that only the browser has.

    Args:
        endpoint: where pushes to it are posted.
        server_key: the `applicationServerKey` it was made with, in base64url.
        key, secret: its own, of an earlier life; none: new ones.
    """

    def __init__(
        self,
        endpoint: str,
        server_key: str,
        key: ec.EllipticCurvePrivateKey | None = None,
        secret: bytes | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.server_key = server_key
        self._key = key or ec.generate_private_key(ec.SECP256R1())
        self._secret = secret or secrets.token_bytes(16)
        self.p256dh = _encoded(_point(self._key.public_key()))
        self.auth = _encoded(self._secret)

    def decrypt(self, body: bytes) -> bytes:
        """What was meant for this browser (RFC 8188, 2 and RFC 8291, 3). Raises ValueError, InvalidTag."""
        salt, size, length = body[:16], int.from_bytes(body[16:20], "big"), body[20]
        sender, sealed = body[21 : 21 + length], body[21 + length :]
        if length != 65 or size < 18 or len(sealed) > size:
            raise ValueError("the header of aes128gcm is wrong")
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), sender)
        shared = self._key.exchange(ec.ECDH(), public)
        pseudo = _hmac(self._secret, shared)
        keying = _hmac(pseudo, b"WebPush: info\x00" + _point(self._key.public_key()) + sender + b"\x01")
        pseudo = _hmac(salt, keying)
        key = _hmac(pseudo, b"Content-Encoding: aes128gcm\x00\x01")[:16]
        nonce = _hmac(pseudo, b"Content-Encoding: nonce\x00\x01")[:12]
        padded = AESGCM(key).decrypt(nonce, sealed, None).rstrip(b"\x00")
        if padded[-1:] != b"\x02":
            raise ValueError("the last record must end its padding with 2")
        return padded[:-1]


class WebPushSimulator(HttpSimulator):
    """A push service. `listening`: as of HttpSimulator; browsers subscribe only with TLS, so give it some."""

    def __init__(self, **listening: Any) -> None:
        super().__init__(**listening)
        self.browsers: dict[str, Browser] = {}
        self.gone: set[str] = set()
        """Subscriptions that the browser has ended."""
        self.dead: set[str] = set()
        """Subscriptions that are over, and answered as Apple does: by 403."""

    @property
    def origin(self) -> str:
        """What senders must sign for."""
        return self.url

    def subscribe(
        self,
        server_key: bytes,
        name: str = "",
        key: ec.EllipticCurvePrivateKey | None = None,
        secret: bytes | None = None,
    ) -> Browser:
        """What `pushManager.subscribe()` does.

        Args:
            server_key: the public half of the sender's VAPID key, as a point.
            name: of the subscription, in its endpoint; "": a new one.
            key, secret: of a browser that has subscribed before.
        """
        name = name or secrets.token_urlsafe(24)
        browser = self.browsers[name] = Browser(f"{self.url}/push/{name}", _encoded(server_key), key, secret)
        return browser

    def routes(self) -> list[web.RouteDef]:
        """The endpoints of all subscriptions."""
        return [web.post("/push/{name}", self._push)]

    def refusal(self, fault: Answers) -> web.Response:
        """A status and a text, or what `body` says."""
        return web.Response(status=fault.status, text=fault.body or fault.text, headers=fault.headers)

    async def _push(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        browser = self.browsers.get(name)
        if browser is None:
            return web.Response(status=404, text="no such subscription")
        if browser.endpoint in self.gone:
            return web.Response(status=410, text="gone")
        body = await request.read()
        if len(body) > BODY_BYTES_MAX:
            return web.Response(status=413, text="too large")
        if wrong := _wrong_headers(request):
            return web.Response(status=400, text=wrong)
        status, wrong = self._wrong_signature(request.headers.get("Authorization", ""), browser)
        if wrong:
            return web.Response(status=status, text=wrong)
        if browser.endpoint in self.dead:
            return web.json_response({"reason": "Forbidden"}, status=403)
        try:
            shown = json.loads(browser.decrypt(body))
        except (ValueError, IndexError, InvalidTag):
            # The service cannot know; the browser would throw it away. Here it must not pass for accepted.
            return web.Response(status=400, text="the browser could not decrypt it")
        id = secrets.token_urlsafe(16)
        topic = request.headers.get("Topic", "")
        self.log.add(
            id=id,
            channel="push",
            to=browser.endpoint,
            key=f"{name}/{topic}" if topic else "",
            shown=shown,
            raw={head: request.headers.get(head, "") for head in ("TTL", "Urgency", "Topic")} | {"bytes": len(body)},
        )
        ttl = min(int(request.headers["TTL"]), TTL_SECONDS_MAX)
        return web.Response(status=201, headers={"Location": f"{self.url}/message/{id}", "TTL": str(ttl)})

    def _wrong_signature(self, header: str, browser: Browser) -> tuple[int, str]:
        """RFC 8292, 4.2: 401 without a signature, 403 with one that is not good for this subscription."""
        found = _VAPID.fullmatch(header)
        if found is None:
            return 401, "missing VAPID authorization"
        token, key = found[1], found[2]
        try:
            public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), _decoded(key))
            claims = jwt.decode(
                token, public, algorithms=["ES256"], audience=self.origin, options={"require": ["aud", "exp"]}
            )
        except (jwt.PyJWTError, ValueError):
            return 403, "the VAPID token is not valid"
        if claims["exp"] > time.time() + 86_400:
            return 403, "the VAPID token is valid for more than 24 h"
        if not str(claims.get("sub", "")).startswith(("mailto:", "https:")):
            return 403, "the VAPID token has no subject"
        if key != browser.server_key:
            return 403, "the VAPID credentials do not correspond to those of the subscription"
        return 200, ""


def _wrong_headers(request: web.Request) -> str:
    """What RFC 8030 or RFC 8291 forbids."""
    if not request.headers.get("TTL", "").isdigit():
        return "TTL is missing"
    if request.headers.get("Urgency", "normal") not in _URGENCIES:
        return "no such urgency"
    if "Topic" in request.headers and not _TOPIC.fullmatch(request.headers["Topic"]):
        return "the topic must have 1 to 32 characters of base64url"
    if request.headers.get("Content-Encoding") != "aes128gcm":
        return "the content encoding must be aes128gcm"
    return ""


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
