"""Notification types of a tenant, as the table `notification_types` keeps them: each pattern with its rule."""

from __future__ import annotations

from typing import Final

import msgspec

from engine.directory.changes import Change
from engine.directory.changing import check_version
from engine.plan.rules import TypeRule
from engine.postgres import Connection

_DELETE: Final = "DELETE FROM notification_types WHERE tenant = $1 AND pattern = $2"

_PUT: Final = """
INSERT INTO notification_types (tenant, pattern, rule, version) VALUES ($1, $2, $3, $4)
ON CONFLICT (tenant, pattern) DO UPDATE SET rule = excluded.rule, version = excluded.version, changed_at = now()
"""

_PAGE: Final = """
SELECT rule, version FROM notification_types WHERE tenant = $1 AND pattern > $2 ORDER BY pattern LIMIT $3
"""

_decode: Final = msgspec.json.Decoder(TypeRule).decode


async def find_type(connection: Connection, tenant: str, pattern: str) -> TypeRule | None:
    """The rule under exactly this pattern."""
    row = await connection.fetchrow(
        "SELECT rule, version FROM notification_types WHERE tenant = $1 AND pattern = $2", tenant, pattern
    )
    return None if row is None else rule_of(row["rule"], row["version"])


async def page_of_types(connection: Connection, tenant: str, after: str, limit: int) -> list[TypeRule]:
    """At most `limit` rules, in the order of their patterns, behind the pattern `after`; `""` begins."""
    rows = await connection.fetch(_PAGE, tenant, after, limit)
    return [rule_of(row["rule"], row["version"]) for row in rows]


async def put_type(change: Change, rule: TypeRule, expected: int | None = None) -> TypeRule:
    """Keep a rule under its pattern; as it was, nothing is written. Returns what is kept.

    Raises:
        VersionConflict: the rule there has another version than `expected`.
    """
    there = await find_type(change.connection, change.tenant, rule.pattern)
    check_version(f"type {rule.pattern}", expected, 0 if there is None else there.version)
    if there is not None and msgspec.structs.replace(rule, version=there.version) == there:
        return there
    written = msgspec.structs.replace(rule, version=0)
    await change.connection.execute(
        _PUT, change.tenant, rule.pattern, msgspec.json.encode(written).decode(), change.version
    )
    change.made = True
    return msgspec.structs.replace(rule, version=change.version)


async def delete_type(change: Change, pattern: str, expected: int | None = None) -> bool:
    """Delete the rule under a pattern; False: there is none.

    Raises:
        VersionConflict: it has another version than `expected`.
    """
    there = await find_type(change.connection, change.tenant, pattern)
    check_version(f"type {pattern}", expected, 0 if there is None else there.version)
    if there is None:
        return False
    await change.connection.execute(_DELETE, change.tenant, pattern)
    change.made = True
    return True


def rule_of(stored: str, version: int) -> TypeRule:
    """A rule as the table has it."""
    return msgspec.structs.replace(_decode(stored), version=version)
