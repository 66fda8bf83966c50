"""Sends pushes to Apple's devices over APNs (HTTP/2, one JWT for all workers)."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from engine.channels.channel import Outcome, Unsendable
from engine.channels.push.answers import renewed
from engine.channels.push.apns_answers import apns_outcome
from engine.channels.push.apns_connection import NotDone, Unknown
from engine.channels.push.apns_pool import ApnsPool
from engine.channels.push.message import PushMessage, PushTarget, fitted, short_name, with_data
from engine.channels.push.signing import ApnsToken
from engine.channels.retry_after import retry_after
from engine.channels.verdicts import PROVEN_SECONDS
from engine.directory.push_tokens import Environment, Platform

PAYLOAD_BYTES_MAX: Final = 4096
"""Of all pushes but VoIP ones (Apple, "Generating a remote notification")."""

COLLAPSE_ID_BYTES_MAX: Final = 64

SERVERS: Final[Mapping[Environment, str]] = {
    "production": "api.push.apple.com",
    "sandbox": "api.sandbox.push.apple.com",
}

_OTHER: Final[Mapping[Environment, Environment]] = {"production": "sandbox", "sandbox": "production"}

_NAMESPACE: Final = uuid.UUID("6f1b2f0e-3b8f-4c55-9a52-0f3a1ce0a0c7")
"""Makes a UUID of a job's key. Apple does not look whether one comes again; people who search for one do."""

_IN_OTHER_ENVIRONMENT: Final = "400/BadDeviceToken"


def apns_payload(message: PushMessage) -> bytes:
    """The JSON that the device gets, at most PAYLOAD_BYTES_MAX. Raises Unsendable: it cannot be made so short."""
    interruption = {"interruption-level": "time-sensitive"} if message.lane == "critical" else {}

    def build(title: str, body: str, data: Any) -> bytes:
        alert = ({"title": title} if title else {}) | ({"body": body} if body else {})
        aps: dict[str, Any] = {"alert": alert, "sound": "default", **interruption}
        if message.badge is not None:
            aps["badge"] = message.badge
        own = {"seamark": message.essentials()} | with_data(data)
        return msgspec.json.encode({"aps": aps, **own})

    return fitted(build, message, PAYLOAD_BYTES_MAX)


def apns_headers(message: PushMessage, topic: str, apns_id: str) -> list[tuple[str, str]]:
    """What Apple is told beside the payload: when to give up, how urgent it is, what it takes the place of."""
    return [
        ("apns-id", apns_id),
        ("apns-topic", topic),
        ("apns-push-type", "alert"),
        ("apns-priority", "5" if message.lane == "bulk" else "10"),
        ("apns-expiration", str(message.expires_at)),
        ("apns-collapse-id", short_name(message.replaces, COLLAPSE_ID_BYTES_MAX)),
    ]


OK: Final = 200


class ApnsSender:
    """Sends with one key of a developer account.

    Args:
        name: in the configuration.
        token: signs in with that key.
        apps: bundle ids the key is for; none: all.
        pools: where each environment is; by default Apple's.
        now: the clock that tokens are signed by.
    """

    platform: Platform = "apns"

    def __init__(
        self,
        name: str,
        token: ApnsToken,
        apps: frozenset[str] = frozenset(),
        pools: Mapping[Environment, ApnsPool] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.apps = apps
        self._token = token
        self._now = now
        self._taken_at = dict.fromkeys(SERVERS, -math.inf)
        self._pools = pools or {environment: ApnsPool(host) for environment, host in SERVERS.items()}

    async def send(self, message: PushMessage, target: PushTarget, *, key: str, deadline_seconds: float) -> Outcome:
        """Send to one token. One that its environment does not know is tried in the other, before it is called invalid.

        Apps register debug builds as production ones, and the other way round; Apple then says `BadDeviceToken`, as it does of
        garbage. Where the other environment takes it, the outcome names that, so that it is stored with the token.
        """
        until = asyncio.get_running_loop().time() + deadline_seconds
        outcome = await self._try(message, target, target.environment, key, until)
        if outcome.code != _IN_OTHER_ENVIRONMENT:
            return outcome
        other = _OTHER[target.environment]
        second = await self._try(message, target, other, key, until)
        if second.kind == "ok":
            return msgspec.structs.replace(second, environment=other)
        # What cannot be said now is asked again. A key that is for one environment only does not count as an answer.
        return second if second.kind in ("transient", "throttled", "ambiguous") else outcome

    async def _try(
        self, message: PushMessage, target: PushTarget, environment: Environment, key: str, until: float
    ) -> Outcome:
        pool, token = self._pools[environment], self._token.get(self._now())
        headers = [
            (":method", "POST"),
            (":scheme", "https"),
            (":authority", pool.host),
            (":path", f"/3/device/{target.token}"),
            ("authorization", f"bearer {token}"),
            *apns_headers(message, target.app, str(uuid.uuid5(_NAMESPACE, key))),
        ]
        try:
            body = apns_payload(message)
            answer = await pool.request(headers, body, until - asyncio.get_running_loop().time())
        except Unsendable as error:
            return msgspec.structs.replace(error.outcome, provider=self.name)
        except NotDone as error:
            return Outcome(kind="transient", provider=self.name, code=error.why)
        except Unknown as error:
            return Outcome(kind="ambiguous", provider=self.name, code=error.why)
        wait = retry_after(answer.retry_after, datetime.now(UTC))
        outcome = apns_outcome(self.name, answer.status, answer.body, answer.apns_id, wait)
        if answer.status == OK:
            self._taken_at[environment] = time.monotonic()
        elif (
            outcome.code == "403/InvalidProviderToken"
            and time.monotonic() - self._taken_at[environment] < PROVEN_SECONDS
        ):
            # Apple says it for the app of another team, too, and whoever registers a token chooses its app.
            return msgspec.structs.replace(outcome, scope="target", alarm=True)
        if outcome.code == "403/ExpiredProviderToken" and self._token.renew(token, self._now()):
            return renewed(outcome)
        return outcome

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.close()
