"""Webhook endpoints of a tenant, or of one of its users: where notifications are posted to, and by which secrets they are signed.

A secret is told to its owner once, when it is made, and never again. While it is replaced, both are good. Only the tenant's own
endpoints are part of its rules: those of users are facts about a user, as a push token is.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from engine.directory.changes import Change
from engine.directory.changing import check_version
from engine.directory.sealing import PLAIN, Seal
from engine.directory.users import checked_user_id
from engine.directory.webhook_urls import check_url
from engine.errors import LimitReached, StoreBroken
from engine.limits import WEBHOOKS_PER_TENANT, WEBHOOKS_PER_USER
from engine.plan.patterns import check_pattern
from engine.postgres import Connection, Pool, asking
from seamark.protocol.limits import EVENT_TYPE_BYTES_MAX

PREFIX: Final = "whsec_"
"""As Standard Webhooks writes a secret: this, and 24 to 64 bytes in base64."""

SECRET_BYTES: Final = 32

State = Literal["active", "disabled"]

Pattern = Annotated[str, msgspec.Meta(max_length=EVENT_TYPE_BYTES_MAX)]
Patterns = Annotated[tuple[Pattern, ...], msgspec.Meta(min_length=1, max_length=100)]


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be changed of an endpoint.

    Args:
        url: https, on a public server.
        types: types and patterns that are posted to it; none named: all.
        state: a disabled one gets nothing.
    """

    url: str
    types: Patterns = ("*",)
    state: State = "active"

    def __post_init__(self) -> None:
        """Raise ValueError where the address or a pattern cannot be."""
        check_url(self.url)
        try:
            for pattern in self.types:
                check_pattern(pattern)
        except ValueError as error:
            raise ValueError(f"`types`: {error}") from error


class NewEndpoint(EndpointSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An endpoint to be made.

    Args:
        user: whose notifications it gets; none: those of all users of the tenant.
        secret: `whsec_` and 24 to 64 bytes in base64; none: one is made.
    """

    user: str | None = None
    secret: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a member cannot be. A secret is not repeated."""
        EndpointSettings.__post_init__(self)
        if self.user is not None:
            checked_user_id(self.user, "user")
        if self.secret is not None:
            check_secret(self.secret)


class WebhookEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as its owner sees it, without its secrets.

    Args:
        secrets: how many are good.
        failing_since: nothing that was posted to it since then has arrived; null: the last has, or nothing was posted.
        disabled_because: `gone` (it answered 410) or `failing` (for five days nothing else); null: its owner did, or nobody.
    """

    id: str
    user: str | None
    url: str
    types: tuple[str, ...]
    state: State
    secrets: int
    failing_since: datetime | None
    disabled_because: Literal["gone", "failing"] | None
    version: int
    created_at: datetime
    changed_at: datetime


def check_secret(secret: str) -> str:
    """`secret` itself, if it is one of Standard Webhooks.

    Raises:
        ValueError: it is none. The text does not repeat it.
    """
    try:
        size = len(base64.b64decode(secret.removeprefix(PREFIX), validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if not secret.startswith(PREFIX) or not 24 <= size <= 64:
        raise ValueError(f"`secret` must be {PREFIX} and 24 to 64 bytes in base64; leave it out, and one is made")
    return secret


def make_secret() -> str:
    """A new one."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


_SECRETS: Final = "1 + (previous_secret IS NOT NULL)::integer AS secrets"
_HEALTH: Final = "(health->>'failing_since')::timestamptz AS failing_since, health->>'disabled' AS disabled_because"
_COLUMNS: Final = f'id, user_id AS "user", url, types, state, {_SECRETS}, {_HEALTH}, version, created_at, changed_at'
_COUNT: Final = "SELECT count(*) FROM webhook_endpoints WHERE tenant = $1 AND user_id IS NOT DISTINCT FROM $2"

_INSERT: Final = f"""
INSERT INTO webhook_endpoints (tenant, id, user_id, url, secret, types, state, version) VALUES ($1, $2, $3, $4, $5, $6, $7, 1)
RETURNING {_COLUMNS}
"""

FORMER_TYPES_MAX: Final = 50
"""How many changes of an endpoint's types are remembered. What came earlier is judged by the oldest types that are."""

# How it fared is forgotten with the address, and when its owner says that it works again.
_REPLACE: Final = f"""
UPDATE webhook_endpoints SET url = $3, types = $4, state = $5, version = version + 1, changed_at = now(),
    health = CASE WHEN url = $3 AND (state = $5 OR $5 = 'disabled') THEN health END,
    former_types = CASE WHEN types = $4 THEN former_types ELSE jsonb_path_query_array(
        former_types || jsonb_build_object('until', now(), 'types', types), '$[last - {FORMER_TYPES_MAX - 1} to last]') END
WHERE tenant = $1 AND id = $2 RETURNING {_COLUMNS}
"""

_ROTATE: Final = f"""
UPDATE webhook_endpoints SET secret = $3, previous_secret = secret, version = version + 1, changed_at = now()
WHERE tenant = $1 AND id = $2 RETURNING {_COLUMNS}
"""

_RETIRE: Final = f"""
UPDATE webhook_endpoints SET previous_secret = NULL, version = version + 1, changed_at = now()
WHERE tenant = $1 AND id = $2 RETURNING {_COLUMNS}
"""

_PAGE: Final = f"""
SELECT {_COLUMNS} FROM webhook_endpoints WHERE tenant = $1 AND id > $2 AND ($4::text IS NULL OR user_id = $4)
ORDER BY id LIMIT $3
"""


SECRETS_AT_ONCE: Final = 200
"""Rows that are held while their secrets are sealed anew: some milliseconds."""

_SECRETS_PAGE: Final = """
SELECT tenant, id, secret, previous_secret FROM webhook_endpoints WHERE (tenant, id) > ($1, $2)
ORDER BY tenant, id LIMIT $3 FOR UPDATE
"""

_SEAL_ANEW: Final = "UPDATE webhook_endpoints SET secret = $3, previous_secret = $4 WHERE tenant = $1 AND id = $2"


async def find_endpoint(connection: Connection, tenant: str, id: str) -> WebhookEndpoint | None:
    """The endpoint of this id."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM webhook_endpoints WHERE tenant = $1 AND id = $2", tenant, id
    )
    return None if row is None else _endpoint(row)


async def page_of_endpoints(
    connection: Connection, tenant: str, after: str, limit: int, user: str | None = None
) -> list[WebhookEndpoint]:
    """At most `limit` endpoints (of a user), in the order of their ids, behind the id `after`; `""` begins."""
    return [_endpoint(row) for row in await connection.fetch(_PAGE, tenant, after, limit, user)]


async def create_endpoint(change: Change, new: NewEndpoint, seal: Seal = PLAIN) -> tuple[WebhookEndpoint, str]:
    """Make an endpoint; it, and its secret, which is not told again, and stored as `seal` has it.

    Raises:
        LimitReached: the tenant, or the user, has as many as there may be.
    """
    most = WEBHOOKS_PER_TENANT if new.user is None else WEBHOOKS_PER_USER
    if await change.connection.fetchval(_COUNT, change.tenant, new.user) >= most:
        whose = "a tenant" if new.user is None else "a user"
        raise LimitReached(f"{whose} may have {most} webhook endpoints: delete one first")
    secret = new.secret or make_secret()
    id = f"wh_{secrets.token_hex(12)}"
    stored = seal.close(secret, change.tenant, id)
    args = change.tenant, id, new.user, new.url, stored, list(new.types), new.state
    made = _endpoint(await change.connection.fetchrow(_INSERT, *args))
    change.made |= new.user is None
    return made, secret


async def replace_endpoint(
    change: Change, id: str, settings: EndpointSettings, expected: int | None = None
) -> WebhookEndpoint | None:
    """Replace what can be changed; as it was, nothing is written. None: there is no such endpoint.

    Raises:
        VersionConflict: it has another version than `expected`.
    """
    there = await _expected(change, id, expected)
    if there is None or (there.url, there.types, there.state) == (settings.url, settings.types, settings.state):
        return there
    change.made |= there.user is None
    args = change.tenant, id, settings.url, list(settings.types), settings.state
    return _endpoint(await change.connection.fetchrow(_REPLACE, *args))


async def rotate_secret(
    change: Change, id: str, secret: str | None, expected: int | None = None, seal: Seal = PLAIN
) -> tuple[WebhookEndpoint, str] | None:
    """Make another secret the first one; the one before stays good until `retire_secret`. None: there is no such endpoint.

    Raises:
        VersionConflict: it has another version than `expected`.
    """
    if await _expected(change, id, expected) is None:
        return None
    new = secret or make_secret()
    row = await change.connection.fetchrow(_ROTATE, change.tenant, id, seal.close(new, change.tenant, id))
    return None if row is None else (_endpoint(row), new)  # its user may be being deleted


async def retire_secret(change: Change, id: str, expected: int | None = None) -> WebhookEndpoint | None:
    """Let the secret before the present one be good no more. None: there is no such endpoint.

    Raises:
        VersionConflict: it has another version than `expected`.
    """
    there = await _expected(change, id, expected)
    if there is None or there.secrets == 1:
        return there
    row = await change.connection.fetchrow(_RETIRE, change.tenant, id)
    return None if row is None else _endpoint(row)


async def delete_endpoint(change: Change, id: str, expected: int | None = None) -> WebhookEndpoint | None:
    """Delete an endpoint with its secrets, and say what it was; None: there is none of this id.

    Raises:
        VersionConflict: it has another version than `expected`.
    """
    there = await _expected(change, id, expected)
    if there is not None:
        await change.connection.execute(
            "DELETE FROM webhook_endpoints WHERE tenant = $1 AND id = $2", change.tenant, id
        )
        change.made |= there.user is None
    return there


class Sealed(NamedTuple):
    """What `seal_anew` has done: how many endpoints there are, and of how many a secret is stored otherwise now.

    `unopened`: secrets that no key opens, which stay as they are.
    """

    endpoints: int
    sealed: int
    unopened: list[StoreBroken]


async def seal_anew(pool: Pool, seal: Seal) -> Sealed:
    """Store all secrets as `seal` stores them now.

    Their versions stay: for receivers nothing changes. It may be ended and begun again at any moment.

    Raises:
        StoreUnavailable: PostgreSQL does not answer.
    """
    seen, changed, unopened = 0, 0, list[StoreBroken]()
    after = ("", "")
    while True:
        async with asking(pool) as connection, connection.transaction():
            rows = await connection.fetch(_SECRETS_PAGE, *after, SECRETS_AT_ONCE)
            for row in rows:
                after = (row["tenant"], row["id"])
                stored = [row["secret"], row["previous_secret"]]
                anew = [_sealed_anew(one, seal, after, unopened) for one in stored]
                if anew != stored:
                    await connection.execute(_SEAL_ANEW, *after, *anew)
                    changed += 1
        seen += len(rows)
        if len(rows) < SECRETS_AT_ONCE:
            return Sealed(seen, changed, unopened)


def _sealed_anew(stored: str | None, seal: Seal, of: tuple[str, str], unopened: list[StoreBroken]) -> str | None:
    if stored is None or seal.is_newest(stored):
        return stored
    try:
        return seal.close(seal.open(stored, *of), *of)
    except StoreBroken as error:
        unopened.append(error)
        return stored


async def _expected(change: Change, id: str, expected: int | None) -> WebhookEndpoint | None:
    there = await find_endpoint(change.connection, change.tenant, id)
    check_version(f"webhook {id}", expected, 0 if there is None else there.version)
    return there


def _endpoint(row: Any) -> WebhookEndpoint:
    return WebhookEndpoint(**{**dict(row), "types": tuple(row["types"])})
