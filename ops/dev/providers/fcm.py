"""Firebase Cloud Messaging, simulated: the token endpoint of Google (RFC 7523) and messages:send of HTTP v1."""

from __future__ import annotations

import json
import re
import secrets
import time
from typing import Any, Final

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from ops.dev.providers.faults import Answers
from ops.dev.providers.httpsimulator import HttpSimulator

PAYLOAD_BYTES_MAX: Final = 4096
TTL_SECONDS_MAX: Final = 2_419_200
SCOPE: Final = "https://www.googleapis.com/auth/firebase.messaging"

_TOKEN: Final = re.compile(r"[A-Za-z0-9_:-]{20,}", re.ASCII)
_TTL: Final = re.compile(r"([0-9]+)(?:\.[0-9]{1,9})?s", re.ASCII)

_ERROR: Final = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
_FIELDS: Final = "type.googleapis.com/google.rpc.BadRequest"
_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}


class FcmSimulator(HttpSimulator):
    """One project. Faults hit messages:send and the token endpoint alike; `token_answers` are for the latter only.

    Args:
        project: its id. email, key: of the service account that may send: its address, and its public key.
        listening: as of HttpSimulator.
    """

    def __init__(self, project: str, email: str, key: RSAPublicKey, **listening: Any) -> None:
        super().__init__(**listening)
        self._project, self._email, self._key = project, email, key
        self.unregistered: set[str] = set()
        """Devices that have lost the app."""
        self.strangers: set[str] = set()
        """Devices of other senders."""
        self.granted: dict[str, float] = {}
        """Access tokens, and when each ends, in seconds since 1970."""
        self.expires_in: float = 3600.0
        self.token_answers: list[Answers] = []
        """What the next requests for a token are answered, instead of with one."""

    def routes(self) -> list[web.RouteDef]:
        """The token endpoint, and all projects."""
        return [web.post("/token", self._grant), web.post("/v1/projects/{project}/messages:send", self._send)]

    def refusal(self, fault: Answers) -> web.Response:
        """As FCM writes it. `code` is an FcmError; `text` the message."""
        if fault.body:
            return web.Response(
                status=fault.status, text=fault.body, content_type="application/json", headers=fault.headers
            )
        return _refusal(fault.status, fault.text, fault.code, headers=fault.headers)

    async def _grant(self, request: web.Request) -> web.Response:
        if self.token_answers:
            return self.refusal(self.token_answers.pop(0))
        form = await request.post()
        try:
            if form["grant_type"] != "urn:ietf:params:oauth:grant-type:jwt-bearer":
                return web.json_response({"error": "unsupported_grant_type"}, status=400)
            claims = jwt.decode(
                str(form["assertion"]),
                self._key,
                algorithms=["RS256"],
                audience=f"{self.url}/token",
                issuer=self._email,
                options={"require": ["iss", "aud", "iat", "exp", "scope"]},
            )
        except (jwt.PyJWTError, KeyError):
            return web.json_response({"error": "invalid_grant"}, status=400)
        if claims["exp"] - claims["iat"] > 3600 or SCOPE not in claims["scope"].split():
            return web.json_response({"error": "invalid_scope"}, status=400)
        token = secrets.token_urlsafe(32)
        self.granted[token] = time.time() + self.expires_in
        return web.json_response({"access_token": token, "expires_in": self.expires_in, "token_type": "Bearer"})

    async def _send(self, request: web.Request) -> web.Response:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.granted.get(token, 0.0) < time.time():
            return _refusal(401, "Request had invalid authentication credentials.")
        if request.match_info["project"] != self._project:
            return _refusal(404, "Requested entity was not found.")
        try:
            message = json.loads(await request.read())["message"]
            device = message["token"]
        except (ValueError, KeyError, TypeError):
            return _refusal(400, "Invalid JSON payload received.", fields=["message"])
        if (wrong := _wrong(message)) is not None:
            return _refusal(400, f"Invalid value at '{wrong}'", "INVALID_ARGUMENT", fields=[wrong])
        if not _TOKEN.fullmatch(device):
            text = "The registration token is not a valid FCM registration token"
            return _refusal(400, text, "INVALID_ARGUMENT")
        if device in self.strangers:
            return _refusal(403, "SenderId mismatch", "SENDER_ID_MISMATCH")
        if device in self.unregistered:
            return _refusal(404, "Requested entity was not found.", "UNREGISTERED")
        name = f"projects/{self._project}/messages/{secrets.token_hex(8)}"
        seamark = json.loads(message["data"]["seamark"])
        count = message["android"]["notification"].get("notification_count")
        self.log.add(
            id=name,
            channel="push",
            to=device,
            key=f"{seamark['id']}/{device}",
            shown={"badge": count, **message["notification"]},
            raw={"message": message},
        )
        return web.json_response({"name": name})


def _wrong(message: dict[str, Any]) -> str | None:
    """The first field that FCM would refuse."""
    content = {"notification": message.get("notification"), "data": message.get("data")}
    if len(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()) > PAYLOAD_BYTES_MAX:
        return "message"
    if not all(isinstance(value, str) for value in message.get("data", {}).values()):
        return "message.data"
    android = message.get("android", {})
    ttl = _TTL.fullmatch(android.get("ttl", "0s"))
    if ttl is None or int(ttl[1]) > TTL_SECONDS_MAX:
        return "message.android.ttl"
    if android.get("priority", "NORMAL") not in ("NORMAL", "HIGH"):
        return "message.android.priority"
    return None


def _refusal(
    status: int,
    text: str,
    code: str = "",
    *,
    fields: list[str] | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    details: list[dict[str, Any]] = [{"@type": _ERROR, "errorCode": code}] if code else []
    if fields:
        details.append({"@type": _FIELDS, "fieldViolations": [{"field": name, "description": text} for name in fields]})
    error = {"code": status, "message": text, "status": _STATUSES.get(status, "UNKNOWN"), "details": details}
    return web.json_response({"error": error}, status=status, headers=headers)
