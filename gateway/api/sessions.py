"""`/v1/users/{id}/sessions`: which devices are connected, over all gateways; ending them, and signing the user out."""

from __future__ import annotations

import time
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from engine.errors import BrokerError
from gateway.access.principals import Operator, Scope, Service
from gateway.access.shares import Shares
from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import FORBIDDEN, INVALID_QUERY, NOT_FOUND, UNAVAILABLE, Kind, Problem
from gateway.limits import TOKEN_LEEWAY_SECONDS
from gateway.presence.gateways import Connected, Gathered
from gateway.presence.limits import QUESTIONS_AT_A_TIME, QUESTIONS_AT_A_TIME_PER_TENANT, SIGN_OUTS_PER_TENANT
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import encode_token, encode_user

TOO_MANY_QUESTIONS: Final = Kind(429, "too_many_questions")
TOO_MANY_SIGN_OUTS: Final = Kind(429, "too_many_sign_outs")

_PLACES: Final = Shares(QUESTIONS_AT_A_TIME, QUESTIONS_AT_A_TIME_PER_TENANT)


class SessionsQuery(msgspec.Struct, frozen=True, kw_only=True):
    """`tenant`: whose user; only an operator has to say, and can."""

    id: str
    tenant: str | None = None


class EndQuery(SessionsQuery, frozen=True, kw_only=True):
    """How the sessions are ended.

    `sign_out`: tokens that were issued until now count for nothing; else the devices come back with the tokens they have.
    `issued_until`: instead of now, in Unix seconds, by the clock of whoever issues tokens.
    """

    sign_out: bool = True
    issued_until: Annotated[float, Meta(ge=0)] | None = None


class SessionQuery(SessionsQuery, frozen=True, kw_only=True):
    """`session`: the id of one."""

    session: str


class Found(msgspec.Struct):
    """Sessions of a user.

    Attributes:
        sessions: those connected, or those that were ended.
        silent: gateways that did not answer; what is connected to them is not in `sessions`.
        complete: every gateway that may have sessions has answered. False also for 90 s after the gateway that was asked has
            started, since others may have been cut off before that.
    """

    sessions: list[Connected]
    silent: list[str]
    complete: bool


@Endpoint("GET", "/v1/users/{id}/sessions", scope=Scope.SESSIONS_READ, places=_PLACES, refuses=(TOO_MANY_QUESTIONS,))
async def list_sessions(call: Call[Service | Operator, SessionsQuery, None]) -> Found:
    """Which devices of a user are connected at this moment, asked of all gateways; answered within a second."""
    tenant = _tenant(call.principal, call.query, call.context)
    try:
        return _found(await call.context.gateways.ask("sessions", tenant, call.query.id))
    except BrokerError as error:
        raise _away(error) from error


@Endpoint(
    "DELETE",
    "/v1/users/{id}/sessions",
    scope=Scope.SESSIONS_WRITE,
    places=_PLACES,
    refuses=(TOO_MANY_QUESTIONS, TOO_MANY_SIGN_OUTS),
)
async def end_sessions(call: Call[Service | Operator, EndQuery, None]) -> Found:
    """End all sessions of a user, and unless `sign_out=false` believe none of the user's tokens that were issued until now.

    Every gateway that has answered does so already. One in `silent` does as soon as it hears of it; while it is cut off it
    believes no token from 10 s on.
    """
    query, context = call.query, call.context
    tenant = _tenant(call.principal, query, context)
    try:
        if not query.sign_out:
            return _found(await context.gateways.ask("end", tenant, query.id))
        until = _until(tenant, query, context)
        before = await context.gateways.ask("sessions", tenant, query.id)
        seq = await context.sign_outs.sign_out(tenant, query.id, until)
        after = await context.gateways.ask("signed_out", tenant, query.id, seq=seq)
        left = {each.id for each in after.sessions}  # those of newer tokens
        return Found([each for each in before.sessions if each.id not in left], after.silent, after.complete)
    except BrokerError as error:
        raise _away(error) from error


@Endpoint(
    "DELETE",
    "/v1/users/{id}/sessions/{session}",
    scope=Scope.SESSIONS_WRITE,
    places=_PLACES,
    refuses=(TOO_MANY_QUESTIONS, NOT_FOUND),
)
async def end_session(call: Call[Service | Operator, SessionQuery, None]) -> Found:
    """End one session. Its device may come back: only signing the user out makes its token count for nothing."""
    query = call.query
    tenant = _tenant(call.principal, query, call.context)
    try:
        found = _found(await call.context.gateways.ask("end", tenant, query.id, session=query.session))
    except BrokerError as error:
        raise _away(error) from error
    if not found.sessions and not found.silent:
        raise Problem(NOT_FOUND, "the user has no session of this id")
    return found


def _tenant(principal: Service | Operator, query: SessionsQuery, context: Context) -> str:
    """Whose user is meant; counted, as each question is asked of all gateways.

    Raises:
        Problem: it is not said or must not be, the user can be none, or too much is asked.
    """
    if isinstance(principal, Service):
        if query.tenant not in (None, principal.tenant):
            raise Problem(FORBIDDEN, "`tenant` is another one: leave it out", field="tenant")
        tenant = principal.tenant
    elif query.tenant is None:
        raise Problem(INVALID_QUERY, "`tenant` is missing: an operator belongs to none", field="tenant")
    else:
        tenant = query.tenant
    try:
        encode_token(tenant)
    except InvalidToken as error:
        raise Problem(INVALID_QUERY, f"`tenant`: {error}", field="tenant") from error
    try:
        encode_user(query.id)
    except InvalidToken as error:
        raise Problem(INVALID_QUERY, f"`id`: {error}", field="id") from error
    if not context.questions.take(tenant):
        wait = int(context.questions.wait_seconds(tenant)) + 1
        raise Problem(TOO_MANY_QUESTIONS, "too many sessions are asked for", retry_after_seconds=wait)
    return tenant


def _until(tenant: str, query: EndQuery, context: Context) -> float:
    now = time.time()
    if query.issued_until is not None and query.issued_until > now + TOKEN_LEEWAY_SECONDS:
        said = "`issued_until` lies in the future: users could not sign in again"
        raise Problem(INVALID_QUERY, said, field="issued_until")
    full = context.sign_outs.of_tenant(tenant) >= SIGN_OUTS_PER_TENANT
    if full and not context.sign_outs.holds(tenant, query.id):
        said = f"{SIGN_OUTS_PER_TENANT} users of the tenant were signed out within 31 days: no more are remembered"
        raise Problem(TOO_MANY_SIGN_OUTS, said, retry_after_seconds=3_600)
    return now if query.issued_until is None else query.issued_until


def _found(gathered: Gathered) -> Found:
    return Found(*gathered)


def _away(error: BrokerError) -> Problem:
    return Problem(UNAVAILABLE, "the gateways cannot be asked now: try again", error=type(error).__name__)
