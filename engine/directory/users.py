"""Users of a tenant: how they are reached, where they live, and what segments ask about them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from engine import merging
from engine.directory.changing import ProfileChange, check_version
from engine.directory.contacts import address_hash, checked_email, checked_locale, checked_phone, checked_timezone
from engine.limits import ATTRIBUTE_BYTES_MAX, ATTRIBUTE_DEPTH_MAX
from engine.postgres import Connection
from seamark.protocol.errors import InvalidToken, SeamarkError
from seamark.protocol.subjects import encode_token, encode_user

Attributes = dict[str, Any]

_COLUMNS: Final = "user_id AS id, email, phone, locale, timezone, attributes::text, version, created_at, updated_at"

_FIND: Final = f"SELECT {_COLUMNS} FROM users WHERE tenant = $1 AND user_id = $2"

_STORE: Final = f"""
INSERT INTO users (tenant, user_id, email, phone, locale, timezone, attributes, version, email_hash)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (tenant, user_id) DO UPDATE SET email = excluded.email, phone = excluded.phone, locale = excluded.locale,
    timezone = excluded.timezone, attributes = excluded.attributes, version = excluded.version, email_hash = excluded.email_hash,
    updated_at = now()
RETURNING {_COLUMNS}
"""

_PAGE: Final = f"SELECT {_COLUMNS} FROM users WHERE tenant = $1 AND user_id > $2 ORDER BY user_id LIMIT $3"

# In the order of names, as everybody takes them who holds several.
_LEAVE_TOPICS: Final = """
WITH held AS (
    SELECT tenant, name FROM topics
    WHERE tenant = $1 AND name IN (SELECT topic FROM topic_members WHERE tenant = $1 AND user_id = $2) ORDER BY name FOR UPDATE
), gone AS (
    DELETE FROM topic_members m USING held WHERE m.tenant = $1 AND m.user_id = $2 AND m.topic = held.name RETURNING m.topic
)
UPDATE topics SET members = members - 1 FROM gone WHERE tenant = $1 AND name = gone.topic
"""


class UserFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored of a user beside his id.

    Args:
        email: an e-mail address; the domain is kept in lower case.
        phone: in the form of E.164, as +4366412345678.
        locale: a language tag of BCP 47, as de-AT.
        timezone: of the IANA database, as Europe/Vienna.
        attributes: what segments ask about; at most 8 KiB of JSON, 8 levels deep.
    """

    email: str | None = None
    phone: str | None = None
    locale: str | None = None
    timezone: str | None = None
    attributes: Attributes = {}

    def __post_init__(self) -> None:
        """Bring each into its one form. Raise ValueError, which names the field and the remedy, where one is not valid."""
        for name, checked in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                msgspec.structs.force_setattr(self, name, checked(value))
        encoded_attributes(self.attributes)

    @property
    def email_hash(self) -> bytes | None:
        """What the address is found by."""
        return None if self.email is None else address_hash("email", self.email)


class UserPatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be changed of a user, as RFC 7396 merges it: a member that is left out stays, null takes it away."""

    email: str | UnsetType | None = UNSET
    phone: str | UnsetType | None = UNSET
    locale: str | UnsetType | None = UNSET
    timezone: str | UnsetType | None = UNSET
    attributes: Attributes | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        """Raise ValueError where attributes are nested so deep that merging them would not end well."""
        if isinstance(self.attributes, dict):
            _check_depth(self.attributes)


class User(msgspec.Struct, frozen=True, kw_only=True):
    """A user as his tenant sees him. `version` grows with each change of the user, and never comes again."""

    id: str
    email: str | None
    phone: str | None
    locale: str | None
    timezone: str | None
    attributes: Attributes
    version: int
    created_at: datetime
    updated_at: datetime

    def says(self, fields: UserFields) -> bool:
        """Whether this is what is stored. To Python `true` and `1` are the same, to a segment they are not."""
        return all(_same(getattr(self, name), getattr(fields, name)) for name in UserFields.__struct_fields__)


NUMBER_MAX: Final = 2**63 - 1
NUMBER_MIN: Final = 1e-15

_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""A NUL in a text of JSON, and no backslash before `u0000`."""

_CHECKS: Final = {
    "email": checked_email,
    "phone": checked_phone,
    "locale": checked_locale,
    "timezone": checked_timezone,
}


class InvalidUser(SeamarkError, ValueError):
    """What a change would make of a user is not valid. Nothing was changed."""


def checked_user_id(id: str, member: str = "id") -> str:
    """An id that a user may have. `member`: what has said it.

    Raises:
        ValueError: no subject or row can have it, or no user may be called so.
    """
    return _checked(encode_user, id, member)


def checked_stored_id(id: str, member: str = "id") -> str:
    """An id that a stored user may have: earlier versions let users be called as nobody may be any more.

    They can be read, deleted and taken out of topics, and nothing else.

    Raises:
        ValueError: no subject or row can have it.
    """
    return _checked(encode_token, id, member)


def _checked(encode: Callable[[str], str], id: str, member: str) -> str:
    try:
        encode(id)
    except InvalidToken as error:
        raise ValueError(f"`{member}`: {error}") from error
    return id


def encoded_attributes(attributes: Attributes) -> str:
    """Attributes as they are stored.

    Raises:
        ValueError: they are too large or too deep, or have text that cannot be stored.
    """
    _check_depth(attributes)
    _check_numbers(attributes)
    try:
        encoded = msgspec.json.encode(attributes)
    except UnicodeEncodeError as error:
        raise ValueError("`attributes` has text that is not valid Unicode (a lone surrogate)") from error
    if len(encoded) > ATTRIBUTE_BYTES_MAX:
        said = f"`attributes` may have {ATTRIBUTE_BYTES_MAX} bytes as JSON, not {len(encoded)}"
        raise ValueError(f"{said}: keep what notifications need, and the rest elsewhere")
    text = encoded.decode()
    if _NUL.search(text):
        raise ValueError("`attributes` has text with a NUL, which cannot be stored: leave it out")
    return text


def _check_depth(attributes: Attributes) -> None:
    if _depth(attributes) > ATTRIBUTE_DEPTH_MAX:
        raise ValueError(f"`attributes` may be nested {ATTRIBUTE_DEPTH_MAX} levels deep")


def _check_numbers(value: Any) -> None:
    """PostgreSQL writes numbers out: `1e300` comes back as 301 digits, so 8 KiB would become 400, and another number."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _check_numbers(one)
    elif isinstance(value, int | float) and value and not NUMBER_MIN <= abs(value) <= NUMBER_MAX:
        raise ValueError("`attributes` has a number beyond 2^63, or closer to 0 than 1e-15: write it as a text")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _depth(value: Any, left: int = ATTRIBUTE_DEPTH_MAX) -> int:
    """How deep a value is nested; it stops one level below what is allowed."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return 0
    return 1 if left < 0 else 1 + max((_depth(one, left - 1) for one in inner), default=0)


def merged(there: User | UserFields, patch: UserPatch) -> UserFields:
    """What is stored with a patch merged into it. Only the result is checked: a patch can mend what was valid once.

    Raises:
        InvalidUser: the result is not valid.
    """
    fields = {name: getattr(there, name) for name in UserFields.__struct_fields__}
    changes = {name: getattr(patch, name) for name in UserPatch.__struct_fields__}
    fields |= {name: value for name, value in changes.items() if value is not UNSET}
    if isinstance(patch.attributes, dict):
        fields["attributes"] = merging.merged(there.attributes, patch.attributes, ATTRIBUTE_DEPTH_MAX)
    elif patch.attributes is None:
        fields["attributes"] = {}
    try:
        return UserFields(**fields)
    except ValueError as error:
        raise InvalidUser(str(error)) from error


async def find_user(connection: Connection, tenant: str, id: str) -> User | None:
    """The user of this id."""
    row = await connection.fetchrow(_FIND, tenant, id)
    return None if row is None else _user(row)


async def page_of_users(connection: Connection, tenant: str, after: str, limit: int) -> list[User]:
    """At most `limit` users in the order of their ids, behind the id `after`; `""` begins."""
    return [_user(row) for row in await connection.fetch(_PAGE, tenant, after, limit)]


async def put_user(change: ProfileChange, id: str, fields: UserFields, expected: int | None = None) -> User:
    """Make the user so; as he was, nothing is written. One who was deleted, and of whom nothing is left, begins anew.

    Raises:
        VersionConflict: he has another version than `expected`. UserDeleted: what he had is still being erased.
    """
    await change.make_anew(id)
    there = await find_user(change.connection, change.tenant, id)
    check_version(f"user {id}", expected, there.version if there is not None else 0)
    if there is not None and there.says(fields):
        return there
    return await _store(change, id, fields)


async def patch_user(change: ProfileChange, id: str, patch: UserPatch, expected: int | None = None) -> User | None:
    """Merge a patch into what is stored of the user. None: there is no such user.

    Raises:
        InvalidUser: the result is not valid. VersionConflict: he has another version than `expected`.
    """
    there = await find_user(change.connection, change.tenant, id)
    check_version(f"user {id}", expected, there.version if there is not None else 0)
    if there is None:
        return None
    fields = merged(there, patch)
    return there if there.says(fields) else await _store(change, id, fields)


async def merge_user(change: ProfileChange, id: str, patch: UserPatch) -> User:
    """Merge a patch into a user, who is made if there is none.

    Raises:
        InvalidUser: the result is not valid. UserDeleted: what he had is still being erased.
    """
    await change.make_anew(id)
    there = await patch_user(change, id, patch)
    return there if there is not None else await _store(change, id, merged(UserFields(), patch))


async def ensure_user(change: ProfileChange, id: str) -> None:
    """Have a row of the user, whatever it says.

    Raises:
        UserDeleted: he was deleted, and nobody has made him anew.
    """
    await change.check_there(id)
    if await find_user(change.connection, change.tenant, id) is None:
        await _store(change, id, UserFields())


async def delete_user(change: ProfileChange, id: str, expected: int | None = None) -> datetime:
    """Take all that the directory has of a user, and leave a tombstone; when he was deleted, now or before.

    It needs no row: a user who is in no directory has a log all the same, which is erased.

    Raises:
        VersionConflict: he has another version than `expected`.
    """
    if expected is not None:
        there = await find_user(change.connection, change.tenant, id)
        check_version(f"user {id}", expected, there.version if there is not None else 0)
    at = await change.delete(id)
    await forget_user(change.connection, change.tenant, id)
    return at


async def forget_user(connection: Connection, tenant: str, id: str) -> int:
    """Delete every row that the directory has of a user; how many users, tokens and webhook endpoints these were."""
    gone = 0
    for statement in (
        "DELETE FROM push_tokens WHERE tenant = $1 AND user_id = $2",
        "DELETE FROM preferences WHERE tenant = $1 AND user_id = $2",
        "DELETE FROM webhook_endpoints WHERE tenant = $1 AND user_id = $2",
        "DELETE FROM users WHERE tenant = $1 AND user_id = $2",
    ):
        gone += int((await connection.execute(statement, tenant, id)).rpartition(" ")[2])
    await connection.execute(_LEAVE_TOPICS, tenant, id)
    return gone


async def _store(change: ProfileChange, id: str, fields: UserFields) -> User:
    attributes = encoded_attributes(fields.attributes)
    args = fields.email, fields.phone, fields.locale, fields.timezone, attributes, change.touch(id), fields.email_hash
    return _user(await change.connection.fetchrow(_STORE, change.tenant, id, *args))


def _user(row: Any) -> User:
    return User(**{**dict(row), "attributes": msgspec.json.decode(row["attributes"])})
