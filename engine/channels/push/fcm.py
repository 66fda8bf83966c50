"""Sends pushes over Firebase Cloud Messaging, HTTP v1: to Android, and to Apple's devices whose apps use Firebase."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Final

import msgspec

from engine.channels.channel import Outcome, Unsendable
from engine.channels.exchange import Answer, Silence, exchange, open_http
from engine.channels.push.answers import renewed, silent
from engine.channels.push.fcm_answers import fcm_outcome
from engine.channels.push.message import PushMessage, PushTarget, fitted, short_name, with_data
from engine.channels.push.oauth import AccessTokens, NoToken, ServiceAccount
from engine.directory.push_tokens import Platform

SERVER: Final = "https://fcm.googleapis.com"

PAYLOAD_BYTES_MAX: Final = 4096
"""Of the message's content, to devices. What else stands in the request is counted in here: to be too careful by 200 bytes
hurts nobody."""

TAG_BYTES_MAX: Final = 64

CONNECTIONS_MAX: Final = 200
"""HTTP/1.1: one request each. At 100 ms an answer that is 2000 sends a second, a fifth of a project's quota (600 000 a
minute)."""


def fcm_message(message: PushMessage) -> bytes:
    """The `message` of the request, as JSON, without its token. Raises Unsendable: it cannot be made to fit.

    What replaces what: `tag` is the place in the notification drawer, so that a push sent twice is shown once. `collapse_key`
    is used only where the notification has one: FCM keeps four of them for each device that is off, and drops what is beyond.
    """
    high = message.lane != "bulk"
    tag = short_name(message.replaces, TAG_BYTES_MAX)
    shown: dict[str, Any] = {"tag": tag}
    aps: dict[str, Any] = {"sound": "default"}
    if message.badge is not None:
        shown["notification_count"] = message.badge
        aps["badge"] = message.badge
    android: dict[str, Any] = {"priority": "HIGH" if high else "NORMAL", "ttl": f"{message.ttl_seconds}s"}
    if message.collapse_key:
        android["collapse_key"] = tag
    apple = {
        "apns-priority": "10" if high else "5",
        "apns-expiration": str(message.expires_at),
        "apns-collapse-id": tag,
    }

    def build(title: str, body: str, data: Any) -> bytes:
        # FCM's data are strings by strings.
        own = {"seamark": message.essentials()} | with_data(data)
        return msgspec.json.encode(
            {
                "notification": ({"title": title} if title else {}) | ({"body": body} if body else {}),
                "data": {name: msgspec.json.encode(value).decode() for name, value in own.items()},
                "android": android | {"notification": shown},
                "apns": {"headers": apple, "payload": {"aps": aps}},
            }
        )

    return fitted(build, message, PAYLOAD_BYTES_MAX)


class FcmSender:
    """Sends with one service account, to the devices of its project.

    Args:
        name: in the configuration.
        account: the service account.
        apps: packages of the project; none: all.
        server: where FCM is.
        tls: whom to trust; by default the system's authorities.
    """

    platform: Platform = "fcm"

    def __init__(
        self,
        name: str,
        account: ServiceAccount,
        apps: frozenset[str] = frozenset(),
        *,
        server: str = SERVER,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self.apps = apps
        self._url = f"{server}/v1/projects/{account.project_id}/messages:send"
        self._http = open_http(connections_max=CONNECTIONS_MAX, tls=tls)
        self._tokens = AccessTokens(account, self._http)

    async def send(self, message: PushMessage, target: PushTarget, *, key: str, deadline_seconds: float) -> Outcome:
        """Send to one token. FCM asks for at least 10 s before it is given up: `deadline_seconds` should be more."""
        until = asyncio.get_running_loop().time() + deadline_seconds
        try:
            body = b'{"message":{"token":' + msgspec.json.encode(target.token) + b"," + fcm_message(message)[1:] + b"}"
            async with asyncio.timeout_at(until):
                token = await self._tokens.get()
        except Unsendable as error:
            return msgspec.structs.replace(error.outcome, provider=self.name)
        except NoToken as error:
            return error.outcome(self.name)
        except TimeoutError:
            return Outcome(kind="transient", provider=self.name, code="oauth/timeout")
        answer = await exchange(
            self._http,
            self._url,
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            body=body,
            deadline_seconds=until - asyncio.get_running_loop().time(),
        )
        if isinstance(answer, Silence):
            return silent(self.name, answer)
        wait = answer.retry_after_seconds
        outcome = fcm_outcome(self.name, answer.status, answer.body, cut_off=_cut_off(answer), retry_after_seconds=wait)
        if outcome.code == "401" and self._tokens.refused(token):
            return renewed(outcome)
        return outcome

    async def close(self) -> None:
        """Close all connections."""
        await self._tokens.close()
        await self._http.close()


def _cut_off(answer: Answer) -> bool:
    """Whether the body broke off: less of it came than was announced, or its end did not."""
    announced = answer.headers.get("Content-Length", "")
    if announced.isascii() and announced.isdigit():
        return len(answer.body) < int(announced)
    return answer.body[:1] == b"{" and answer.body.rstrip()[-1:] != b"}"
