"""Notification types of a tenant: by which channels each goes, and how."""

from __future__ import annotations

from typing import Final

import msgspec

from engine.directory.types import delete_type, find_type, page_of_types, put_type
from engine.plan.patterns import check_pattern
from engine.plan.rules import Rule, TypeRule
from gateway.access.principals import Scope, Service
from gateway.api.configuring import PLACES, Deletion, rules_changing
from gateway.api.directory import Version, reading
from gateway.api.pages import PageQuery, begin_of, cut
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import LIMIT_REACHED, NOT_FOUND, VERSION_CONFLICT, Problem

_CHANGES: Final = (VERSION_CONFLICT, LIMIT_REACHED)


class PatternQuery(msgspec.Struct, frozen=True):
    """`pattern`: a type (`order.shipped`), all that begin with some words (`order.*`), or `*`."""

    pattern: str

    def __post_init__(self) -> None:
        """Raise ValueError where it is none."""
        try:
            check_pattern(self.pattern)
        except ValueError as error:
            raise ValueError(f"`pattern`: {error}") from error


class PatternVersionQuery(PatternQuery, frozen=True, kw_only=True):
    """Which rule; and `version`, as everywhere."""

    version: Version | None = None


class TypesPage(msgspec.Struct):
    """In the order of the patterns. `next`: the `cursor` of the following page; null behind the last."""

    items: list[TypeRule]
    next: str | None


@Endpoint("GET", "/v1/types", scope=Scope.CONFIG_READ, places=PLACES)
async def list_types(call: Call[Service, PageQuery, None]) -> TypesPage:
    """The rules of the tenant, by pattern."""
    [after], limit = begin_of(call.query), call.query.limit
    async with reading(call.context) as connection:
        found = await page_of_types(connection, call.principal.tenant, after, limit + 1)
    return TypesPage(*cut(found, limit, lambda rule: (rule.pattern,)))


@Endpoint("GET", "/v1/types/{pattern}", scope=Scope.CONFIG_READ, places=PLACES, refuses=(NOT_FOUND,))
async def get_type(call: Call[Service, PatternQuery, None]) -> TypeRule:
    """The rule under exactly this pattern."""
    async with reading(call.context) as connection:
        found = await find_type(connection, call.principal.tenant, call.query.pattern)
    if found is None:
        raise Problem(NOT_FOUND, "there is no rule under this pattern: GET /v1/types lists all", field="pattern")
    return found


@Endpoint("PUT", "/v1/types/{pattern}", scope=Scope.CONFIG_WRITE, places=PLACES, refuses=_CHANGES)
async def replace_type(call: Call[Service, PatternVersionQuery, Rule]) -> TypeRule:
    """Put a rule in place of what is under this pattern. It holds for all notifications planned a second later."""
    rule = TypeRule(pattern=call.query.pattern, **msgspec.structs.asdict(call.body))
    async with rules_changing(call.context, call.principal.tenant) as change:
        return await put_type(change, rule, call.query.version)


@Endpoint("DELETE", "/v1/types/{pattern}", scope=Scope.CONFIG_WRITE, places=PLACES, refuses=_CHANGES)
async def remove_type(call: Call[Service, PatternVersionQuery, None]) -> Deletion:
    """Delete the rule under this pattern. Its types fall under the next pattern that matches them, or go in the app only."""
    async with rules_changing(call.context, call.principal.tenant) as change:
        return Deletion(await delete_type(change, call.query.pattern, call.query.version))
