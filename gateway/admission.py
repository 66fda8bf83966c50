"""Whether a device's connection is taken at all: origin, draining, room in the process, handshakes of one address."""

from __future__ import annotations

import structlog
from aiohttp import web

from engine import metrics
from gateway.auth import Claims, Refused, bearer
from gateway.buckets import Buckets
from gateway.context import Context
from gateway.limits import RETRY_AFTER_SECONDS
from gateway.problems import Problem

_log = structlog.get_logger("seamark.admission")


class Handshakes(Buckets):
    """Handshakes one address may make in a minute; no bound behind a proxy, where all come from one address."""


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
    _log.info("handshake_refused", reason=reason, path=_place(request), **facts)


def _place(request: web.BaseRequest) -> str:
    """The first words of the path: what follows may name a notification, and a notification a person."""
    return "/".join(request.path.split("/")[:3])


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
        _log.info("token_refused", reason=refused.reason, path=_place(request))
        if refused.reason == "keys_unavailable":
            raise Problem(503, "keys_unavailable", str(refused), retry_after_seconds=RETRY_AFTER_SECONDS) from refused
        raise Problem(401, "unauthenticated", str(refused)) from refused
