"""Whether a device's connection is taken at all: origin, draining, room in the process, handshakes of one address."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from aiohttp import web

from engine import metrics
from gateway.auth import Claims, Refused, bearer
from gateway.context import Context
from gateway.limits import ADDRESSES_REMEMBERED, RETRY_AFTER_SECONDS
from gateway.problems import Problem

_log = structlog.get_logger("seamark.admission")


class Handshakes:
    """Handshakes one address may make in a minute: a token bucket per address, the whole minute as burst.

    Args:
        per_minute: 0 sets no bound (behind a proxy all connections come from one address).
        now: monotonic clock in seconds.
    """

    def __init__(self, per_minute: int = 0, *, now: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._now = now
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, address: str) -> bool:
        """Count one handshake; False when the address has none left."""
        if self._per_minute <= 0:
            return True
        now = self._now()
        left, at = self._buckets.pop(address, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - at) * self._per_minute / 60)
        if len(self._buckets) >= ADDRESSES_REMEMBERED:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[address] = (left - 1 if left >= 1 else left, now)
        return left >= 1


def admit(request: web.BaseRequest, context: Context) -> None:
    """Pass a device's connection that may be opened.

    Raises:
        Problem: 403 for a wrong Origin, 429 for too many handshakes, 503 when full or draining.
    """
    origin = request.headers.get("Origin")
    if not context.origins.allows(origin, request.headers.get("Host")):
        _refused(request, "origin", origin=(origin or "")[:100])
        raise Problem(403, "origin", "this Origin is not on the list of allowed origins")
    if context.draining:
        _refused(request, "draining")
        raise Problem(503, "restarting", "the gateway restarts", retry_after_seconds=RETRY_AFTER_SECONDS)
    if context.sessions.full:
        _refused(request, "full")
        raise Problem(
            503, "full", "this gateway has no room for another session", retry_after_seconds=RETRY_AFTER_SECONDS
        )
    if not context.handshakes.take(request.remote or ""):
        _refused(request, "rate")
        raise Problem(429, "too_many_handshakes", "too many connections from this address", retry_after_seconds=60)


def _refused(request: web.BaseRequest, reason: str, **facts: str) -> None:
    metrics.gateway_refused_handshakes.labels(reason).inc()
    _log.info("handshake_refused", reason=reason, path=request.path, **facts)


async def user_of(request: web.Request, context: Context) -> Claims:
    """Who the request's `Authorization: Bearer` token speaks for.

    Raises:
        Problem: 401 without a valid token, 503 when tokens cannot be checked.
    """
    token = bearer(request.headers.get("Authorization"))
    if token is None:
        raise Problem(401, "unauthenticated", "send the user's token as Authorization: Bearer …")
    try:
        return await context.verifier.verify(token)
    except Refused as refused:
        metrics.gateway_refused_tokens.labels(refused.reason).inc()
        _log.info("token_refused", reason=refused.reason, path=request.path)
        if refused.reason == "keys_unavailable":
            raise Problem(503, "keys_unavailable", str(refused), retry_after_seconds=RETRY_AFTER_SECONDS) from refused
        raise Problem(401, "unauthenticated", str(refused)) from refused
