"""The preferences of a user in PostgreSQL: one JSON document, merged into by patches, with a version of its own."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine import merging
from engine.directory.changing import ProfileChange, check_version
from engine.directory.contacts import checked_locale, checked_timezone
from engine.errors import LimitReached
from engine.limits import PREFERENCES_BYTES_MAX
from engine.plan.patterns import check_pattern
from engine.plan.preferences import Preferences, check_choices
from engine.postgres import Connection
from seamark.protocol.errors import SeamarkError

_FIND: Final = "SELECT document, version FROM preferences WHERE tenant = $1 AND user_id = $2"

_STORE: Final = """
INSERT INTO preferences (tenant, user_id, document, version) VALUES ($1, $2, $3, $4)
ON CONFLICT (tenant, user_id) DO UPDATE SET document = excluded.document, version = excluded.version, changed_at = now()
"""

LEVELS: Final = 3
"""Of objects in a document: itself, its lines by type, the choices of a line."""


class NoDocument(SeamarkError, ValueError):
    """With this patch the document would be none; nothing was changed. The message names the member."""


class Stored(msgspec.Struct, frozen=True):
    """A document and its version; 0: nothing is stored, and the document is empty."""

    document: Preferences = Preferences()
    version: int = 0


async def find_preferences(connection: Connection, tenant: str, user: str) -> Stored:
    """What is stored of a user."""
    row = await connection.fetchrow(_FIND, tenant, user)
    return Stored() if row is None else Stored(preferences_of(row["document"]), row["version"])


def preferences_of(document: str) -> Preferences:
    """A document as it is stored."""
    return msgspec.json.decode(document, type=Preferences)


async def patch_preferences(
    change: ProfileChange, user: str, patch: dict[str, Any], expected: int | None = None
) -> Stored:
    """Merge a patch (RFC 7396) into the document: what is left out stays, null takes away, on every level.

    Raises:
        NoDocument: the result is no document. VersionConflict: it has another version than `expected`.
        LimitReached: it would be too large. UserDeleted: the user was deleted.
    """
    await change.check_there(user)
    before = await find_preferences(change.connection, change.tenant, user)
    check_version("the document of preferences", expected, before.version)
    try:
        document = merged(before.document, patch)
    except ValueError as error:
        # As one of ours: else each such patch would cost a connection, and leave the user marked for a minute.
        raise NoDocument(str(error)) from error
    if document == before.document:
        return before
    encoded = msgspec.json.encode(document)
    if len(encoded) > PREFERENCES_BYTES_MAX:
        said = f"preferences may have {PREFERENCES_BYTES_MAX} bytes, not {len(encoded)}"
        raise LimitReached(f"{said}: let a category or a pattern stand for many types")
    version = change.touch(user)
    await change.connection.execute(_STORE, change.tenant, user, encoded.decode(), version)
    return Stored(document, version)


def merged(document: Preferences, patch: dict[str, Any]) -> Preferences:
    """The document with a patch merged into it, checked in every respect.

    Raises:
        ValueError: the result is none; the message names the member.
    """
    merged = msgspec.convert(merging.merged(msgspec.to_builtins(document), patch, LEVELS), Preferences)
    for pattern in merged.types:
        check_pattern(pattern)
    check_choices(merged, document)
    for name, checked in (("timezone", checked_timezone), ("locale", checked_locale)):
        if (value := getattr(merged, name)) is not None:
            merged = msgspec.structs.replace(merged, **{name: checked(value)})
    return _without_empty_lines(merged)


def _without_empty_lines(document: Preferences) -> Preferences:
    return msgspec.structs.replace(
        document,
        categories={name: line for name, line in document.categories.items() if line},
        types={pattern: line for pattern, line in document.types.items() if line},
    )
