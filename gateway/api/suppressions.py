"""Suppressions of a tenant: addresses that a channel sends nothing to. No address is in a path or query: logs would have it."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from engine.directory.contacts import Addressed
from engine.directory.suppressing import changing_suppressions, lift_some
from engine.directory.suppressions import (
    Chosen,
    NewSuppression,
    Reason,
    StoredSuppression,
    find_suppression,
    find_suppressions,
    lift_suppression,
    page_of_suppressions,
    put_suppressions,
)
from engine.limits import SUPPRESSIONS_PER_REQUEST
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES, Deletion
from gateway.api.directory import directory_of, reading
from gateway.api.pages import PageQuery, begin_of, cut, invalid_cursor
from gateway.http.endpoint import Call, Endpoint
from gateway.limits import DIRECTORY_SECONDS

BODY_BYTES: Final = 1 << 20
"""A thousand suppressions, each with the longest address and words."""


class SuppressionsBody(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be suppressed: all of it, or nothing where one of them cannot be."""

    suppressions: Annotated[list[NewSuppression], Meta(min_length=1, max_length=SUPPRESSIONS_PER_REQUEST)]


class Suppressed(msgspec.Struct):
    """The ids, in the order of the request."""

    ids: list[str]


class SuppressionsQuery(PageQuery, frozen=True):
    """Which of them, and how many."""

    channel: Addressed | None = None
    reason: Reason | None = None


class SearchBody(msgspec.Struct, forbid_unknown_fields=True):
    """An address: its suppressions are asked for."""

    channel: Addressed
    address: Annotated[str, Meta(max_length=320)]


class SuppressionsPage(msgspec.Struct):
    """In no order that means something. `next`: the `cursor` of the following page; null behind the last."""

    items: list[StoredSuppression]
    next: str | None


class LiftBody(Chosen, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which suppressions are lifted. Legal opt-outs (`opted_out`) never are in this way.

    `source`: the beginning of it. `since`, `until`: when they were made.
    """


class Lifted(msgspec.Struct):
    """How many. `more`: there are others; ask again."""

    lifted: int
    more: bool


class IdQuery(msgspec.Struct, frozen=True):
    """`id`: as lists and searches give it."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]


@Endpoint("POST", "/v1/suppressions", scope=Scope.SUPPRESSIONS_WRITE, places=PLACES, body_bytes=BODY_BYTES)
async def suppress(call: Call[Service, None, SuppressionsBody]) -> Suppressed:
    """Suppress addresses. What is suppressed already gets the new reason and end; only a legal opt-out (`opted_out`) stays."""
    new, tenant = call.body.suppressions, call.principal.tenant
    addresses = [(one.channel, one.address) for one in new]
    async with changing_suppressions(directory_of(call.context), tenant, addresses, DIRECTORY_SECONDS) as connection:
        return Suppressed(await put_suppressions(connection, tenant, new))


@Endpoint("GET", "/v1/suppressions", scope=Scope.SUPPRESSIONS_READ, places=PLACES)
async def list_suppressions(call: Call[Service, SuppressionsQuery, None]) -> SuppressionsPage:
    """The suppressions of the tenant that count now."""
    query = call.query
    [after] = begin_of(query)
    if query.cursor is not None and not _is_id(after):
        raise invalid_cursor()
    async with reading(call.context) as connection:
        found = await page_of_suppressions(
            connection, call.principal.tenant, after, query.limit + 1, channel=query.channel, reason=query.reason
        )
    return SuppressionsPage(*cut(found, query.limit, lambda one: (one.id,)))


@Endpoint("POST", "/v1/suppressions/search", scope=Scope.SUPPRESSIONS_READ, places=PLACES)
async def search_suppressions(call: Call[Service, None, SearchBody]) -> SuppressionsPage:
    """The suppressions of one address that count now. A request with a body, so that the address is in no log."""
    body = call.body
    async with reading(call.context) as connection:
        found = await find_suppressions(connection, call.principal.tenant, {body.channel: body.address})
    return SuppressionsPage(found, None)


@Endpoint("DELETE", "/v1/suppressions/{id}", scope=Scope.SUPPRESSIONS_WRITE, places=PLACES)
async def lift(call: Call[Service, IdQuery, None]) -> Deletion:
    """Lift a suppression."""
    tenant, id = call.principal.tenant, call.query.id
    async with reading(call.context) as connection:
        found = await find_suppression(connection, tenant, id)
    if found is None:
        return Deletion(False)
    addresses = [(found.channel, found.address)]
    async with changing_suppressions(directory_of(call.context), tenant, addresses, DIRECTORY_SECONDS) as connection:
        return Deletion(await lift_suppression(connection, tenant, id) is not None)


@Endpoint("POST", "/v1/suppressions/lift", scope=Scope.SUPPRESSIONS_WRITE, places=PLACES)
async def lift_many(call: Call[Service, None, LiftBody]) -> Lifted:
    """Lift the suppressions that have something in common, up to a thousand at once: a provider has called good addresses bad."""
    lifted, more = await lift_some(directory_of(call.context), call.principal.tenant, call.body, DIRECTORY_SECONDS)
    return Lifted(lifted, more)


def _is_id(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
