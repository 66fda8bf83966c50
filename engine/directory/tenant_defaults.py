"""What holds for users of a tenant who have said nothing: one document, in the table `tenant_defaults`."""

from __future__ import annotations

from typing import Final

import msgspec

from engine.directory.changes import Change
from engine.directory.changing import check_version
from engine.directory.contacts import checked_locale, checked_timezone
from engine.plan.patterns import check_pattern
from engine.plan.preferences import TenantDefaults, check_choices
from engine.postgres import Connection

_PUT: Final = """
INSERT INTO tenant_defaults (tenant, document, version) VALUES ($1, $2, $3)
ON CONFLICT (tenant) DO UPDATE SET document = excluded.document, version = excluded.version, changed_at = now()
"""

_NOTHING: Final = TenantDefaults()

_decode: Final = msgspec.json.Decoder(TenantDefaults).decode


def checked_defaults(document: TenantDefaults) -> TenantDefaults:
    """A document that may be kept: the same, with its language tag in the usual letters. What is kept is not looked at again.

    Raises:
        ValueError: a member says what nobody can obey, such as a time zone that there is not; the message names the member.
    """
    for pattern in document.types:
        check_pattern(pattern)
    check_choices(document)
    if document.timezone is not None:
        checked_timezone(document.timezone)
    locale = None if document.locale is None else checked_locale(document.locale)
    return msgspec.structs.replace(document, locale=locale)


async def find_defaults(connection: Connection, tenant: str) -> TenantDefaults:
    """The document; an empty one of version 0 where there is none."""
    row = await connection.fetchrow("SELECT document, version FROM tenant_defaults WHERE tenant = $1", tenant)
    return _NOTHING if row is None else defaults_of(row["document"], row["version"])


async def put_defaults(change: Change, document: TenantDefaults, expected: int | None = None) -> TenantDefaults:
    """Keep a document; as it was, nothing is written. Returns what is kept.

    Raises:
        VersionConflict: the document there has another version than `expected`.
    """
    there = await find_defaults(change.connection, change.tenant)
    check_version("the document of defaults", expected, there.version)
    if there.version and msgspec.structs.replace(document, version=there.version) == there:
        return there
    written = msgspec.structs.replace(document, version=0)
    await change.connection.execute(_PUT, change.tenant, msgspec.json.encode(written).decode(), change.version)
    change.made = True
    return msgspec.structs.replace(document, version=change.version)


async def delete_defaults(change: Change, expected: int | None = None) -> bool:
    """Delete the document; False: there is none.

    Raises:
        VersionConflict: it has another version than `expected`.
    """
    there = await find_defaults(change.connection, change.tenant)
    check_version("the document of defaults", expected, there.version)
    if not there.version:
        return False
    await change.connection.execute("DELETE FROM tenant_defaults WHERE tenant = $1", change.tenant)
    change.made = True
    return True


def defaults_of(stored: str, version: int) -> TenantDefaults:
    """A document as the table has it."""
    return msgspec.structs.replace(_decode(stored), version=version)
