"""`GET /v1/notifications/{id}/trace`: what became of a notification."""

from __future__ import annotations

import msgspec

from engine.traces.contexts import url_of
from gateway.access.principals import Operator, Scope, Service, User
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import FORBIDDEN, INVALID_QUERY, NOT_FOUND, UNAVAILABLE, Problem
from projections.proof import Proof
from projections.tries import receipts_in
from seamark.protocol.limits import EVENT_ID_BYTES_MAX


class TraceQuery(msgspec.Struct, frozen=True):
    """`user`: only this one. `tenant`: whose notification; only an operator has to say, and can."""

    id: str
    user: str | None = None
    tenant: str | None = None


class Trace(msgspec.Struct):
    """One proof for each user the notification went to, at most 20."""

    proofs: list[Proof]


@Endpoint("GET", "/v1/notifications/{id}/trace", scope=Scope.NOTIFICATIONS_READ, refuses=(NOT_FOUND,))
async def trace_notification(call: Call[User | Service | Operator, TraceQuery, None]) -> Trace:
    """What became of a notification. A user sees what is theirs, a service everybody of its tenant, an operator everything."""
    query, tables = call.query, call.context.tables
    if tables is None:
        raise Problem(UNAVAILABLE, "this gateway has no database: there is nothing to prove it from")
    tenant, user = _whose(call.principal, query)
    find = receipts_in(call.context.broker, len(call.context.partitions))
    known = len(query.id) <= EVENT_ID_BYTES_MAX
    proofs = await tables.proofs.of(tenant, query.id, user, find_told=find) if known else []
    if not proofs:
        raise Problem(NOT_FOUND, "no notification of this id is known (or it is not folded yet)")
    for proof in proofs:
        proof.trace_url = url_of(call.context.trace_url, proof.trace)
    return Trace(proofs)


def _whose(principal: User | Service | Operator, query: TraceQuery) -> tuple[str, str | None]:
    """The tenant, and the user if only one is asked for."""
    if isinstance(principal, Operator):
        if query.tenant is None:
            raise Problem(INVALID_QUERY, "`tenant` is missing: an operator belongs to none", field="tenant")
        return query.tenant, query.user
    if query.tenant not in (None, principal.tenant):
        raise Problem(FORBIDDEN, "`tenant` is another one: leave it out", field="tenant")
    if isinstance(principal, Service):
        return principal.tenant, query.user
    if query.user not in (None, principal.user):
        raise Problem(FORBIDDEN, "`user` is another one: the token speaks for one user", field="user")
    return principal.tenant, principal.user
