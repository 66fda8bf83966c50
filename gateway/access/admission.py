"""Whether a connection or request is taken at all: origin, draining, room for a session, how often one address or user asks."""

from __future__ import annotations

import math
from typing import Final

from aiohttp import web

from gateway import metrics
from gateway.access.api_keys import KeysAway, TooManyGuesses
from gateway.access.auth import Refused, bearer
from gateway.access.principals import Operator, Principal, Scope, Service, User
from gateway.context import Context
from gateway.http.problems import FORBIDDEN, UNAUTHENTICATED, UNAVAILABLE, Kind, Problem

ORIGIN: Final = Kind(403, "origin")
RESTARTING: Final = Kind(503, "restarting")
FULL: Final = Kind(503, "full")
TOO_MANY_HANDSHAKES: Final = Kind(429, "too_many_handshakes")
TOO_MANY_REQUESTS: Final = Kind(429, "too_many_requests")
TOO_MANY_KEYS: Final = Kind(429, "too_many_keys")
KEYS_UNAVAILABLE: Final = Kind(503, "keys_unavailable")

OF_DEVICES: Final = (ORIGIN, RESTARTING)
OF_SESSIONS: Final = (*OF_DEVICES, FULL, TOO_MANY_HANDSHAKES)
OF_TOKENS: Final = (*OF_DEVICES, UNAUTHENTICATED, KEYS_UNAVAILABLE, TOO_MANY_REQUESTS)
OF_KEYS: Final = (UNAUTHENTICATED, FORBIDDEN, TOO_MANY_KEYS, UNAVAILABLE)


def admit(request: web.BaseRequest, context: Context) -> None:
    """Pass what a device or page asks, whoever its user is.

    Raises:
        Problem: one of `OF_DEVICES`.
    """
    origin = request.headers.get("Origin")
    if not context.origins.allows(origin, request.headers.get("Host")):
        said = "this Origin may not use the gateway: if it should, add it to SEAMARK_ORIGINS"
        raise Problem(ORIGIN, said, origin=(origin or "")[:100])
    if context.draining:
        raise Problem(RESTARTING, "the gateway restarts")


def admit_session(request: web.BaseRequest, context: Context) -> None:
    """Pass a device's connection that may be opened.

    Raises:
        Problem: one of `OF_SESSIONS`.
    """
    admit(request, context)
    if context.sessions.full:
        raise Problem(FULL, "this gateway has no room for another session")
    if context.handshakes.bounded and not context.handshakes.take(context.proxies.client(request)):
        raise Problem(TOO_MANY_HANDSHAKES, "too many connections from this address", retry_after_seconds=60)


async def user_of(request: web.Request, context: Context) -> User:
    """The user that the request's token speaks for, who may make so many requests in a minute.

    Raises:
        Problem: one of `OF_TOKENS`.
    """
    token = bearer(request.headers.get("Authorization"))
    if token is None:
        raise Problem(UNAUTHENTICATED, "send the user's token as Authorization: Bearer …")
    try:
        user = await context.verifier.verify(token)
    except Refused as refused:
        metrics.gateway_refused_tokens.labels(refused.reason).inc()
        kind = KEYS_UNAVAILABLE if refused.passing else UNAUTHENTICATED
        raise Problem(kind, str(refused), reason=refused.reason) from refused
    whose = user.tenant, user.user
    if not context.requests.take(whose):
        wait = max(1, math.ceil(context.requests.wait_seconds(whose)))
        raise Problem(TOO_MANY_REQUESTS, "this user makes too many requests", retry_after_seconds=wait)
    return user


async def key_holder(request: web.Request, context: Context) -> Service | Operator:
    """Who holds the API key of the request.

    Raises:
        Problem: one of `OF_KEYS`.
    """
    presented = _key_in(request)
    if not presented:
        raise Problem(UNAUTHENTICATED, "send an API key as Authorization: Bearer …")
    if context.api_keys is None:
        raise Problem(UNAVAILABLE, "this gateway has no database: it knows no API keys")
    try:
        holder = await context.api_keys.find(presented, lambda: context.proxies.client(request))
    except TooManyGuesses as error:
        raise Problem(TOO_MANY_KEYS, f"{error}: check the API key", retry_after_seconds=60) from error
    except KeysAway as error:
        raise Problem(UNAVAILABLE, str(error)) from error
    if holder is None:
        raise Problem(UNAUTHENTICATED, "the API key is not known")
    return holder


def _key_in(request: web.Request) -> str | None:
    return bearer(request.headers.get("Authorization")) or request.headers.get("X-API-Key")


def has_key(request: web.Request) -> bool:
    """Whether the request carries an API key rather than a token, which has two dots in it."""
    presented = _key_in(request)
    return presented is not None and presented.count(".") != 2


def check_may(principal: Principal, kinds: tuple[type, ...], scope: Scope | None) -> None:
    """Pass a principal of one of `kinds`; a service needs `scope`.

    Raises:
        Problem: 403.
    """
    if not isinstance(principal, kinds):
        raise Problem(FORBIDDEN, f"this is not for {type(principal).__name__.lower()}s")
    if isinstance(principal, Service) and scope not in principal.scopes:
        raise Problem(FORBIDDEN, f"the API key lacks the scope {scope}")
