"""Whether a connection or request is taken at all: origin, draining, room for a session, how often one address or user asks."""

from __future__ import annotations

import math

import structlog
from aiohttp import web

from engine import metrics
from gateway.access.auth import Claims, Refused, bearer
from gateway.context import Context
from gateway.http.problems import Problem
from gateway.limits import RETRY_AFTER_SECONDS

_log = structlog.get_logger("seamark.admission")


def admit(request: web.BaseRequest, context: Context) -> None:
    """Pass a device's connection that may be opened.

    Raises:
        Problem: 403 for a wrong Origin, 429 for too many handshakes, 503 when full or draining.
    """
    _admit_any(request, context)
    if context.sessions.full:
        _refused(request, "full")
        raise Problem(
            503, "full", "this gateway has no room for another session", retry_after_seconds=RETRY_AFTER_SECONDS
        )
    if context.handshakes.bounded and not context.handshakes.take(context.proxies.client(request)):
        _refused(request, "rate")
        raise Problem(429, "too_many_handshakes", "too many connections from this address", retry_after_seconds=60)


async def admit_user(request: web.Request, context: Context) -> Claims:
    """The user who makes a request that opens no session. It needs no room for one; its user may make so many a minute.

    Raises:
        Problem: 403 for a wrong Origin, 503 when draining, 429 for too many requests; as `user_of`.
    """
    _admit_any(request, context)
    claims = await user_of(request, context)
    count_request(request, context, claims)
    return claims


def count_request(request: web.BaseRequest, context: Context, claims: Claims) -> None:
    """Count a request for its user, who may make so many in a minute.

    Raises:
        Problem: 429 when there were too many.
    """
    user = claims.tenant, claims.user
    if not context.requests.take(user):
        _refused(request, "requests")
        wait = math.ceil(context.requests.wait_seconds(user))
        raise Problem(429, "too_many_requests", "this user makes too many requests", retry_after_seconds=max(1, wait))


def _admit_any(request: web.BaseRequest, context: Context) -> None:
    origin = request.headers.get("Origin")
    if not context.origins.allows(origin, request.headers.get("Host")):
        _refused(request, "origin", origin=(origin or "")[:100])
        raise Problem(403, "origin", "this Origin may not use the gateway: if it should, add it to SEAMARK_ORIGINS")
    if context.draining:
        _refused(request, "draining")
        raise Problem(503, "restarting", "the gateway restarts", retry_after_seconds=RETRY_AFTER_SECONDS)


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
