"""`GET /v1/notifications/{id}/trace`: what became of a notification, for its user or an operator of the tenant."""

from __future__ import annotations

from typing import Final

import msgspec
from aiohttp import web

from gateway.access.admission import admit_user
from gateway.context import CONTEXT
from gateway.http.problems import Problem, unavailable
from projections.store import StoreUnavailable

OPERATOR: Final = "operator"
"""Scope of a token that may ask for every user of its tenant."""

_ID_CHARS: Final = 128

_encode = msgspec.json.Encoder().encode


async def trace(request: web.Request) -> web.StreamResponse:
    """`{"proofs": […]}`: one for each user the notification went to, at most 20; a user's own token sees its own only."""
    context = request.app[CONTEXT]
    claims = await admit_user(request, context)
    if context.tables is None:
        raise unavailable("there is no database to prove it from")
    id = request.match_info["id"]
    user = request.query.get("user")
    if OPERATOR not in claims.scopes:
        if user not in (None, claims.user):
            raise Problem(
                403, "forbidden", f"the token speaks for one user and lacks the scope {OPERATOR}", field="user"
            )
        user = claims.user
    try:
        proofs = await context.tables.proofs.of(claims.tenant, id, user) if len(id) <= _ID_CHARS else []
    except StoreUnavailable as error:
        raise unavailable("the projections do not answer: try again") from error
    if not proofs:
        raise Problem(404, "not_found", "no notification of this id is known (or it is not folded yet)")
    return web.Response(
        body=_encode({"proofs": proofs}), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
