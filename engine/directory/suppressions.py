"""Suppressions of a tenant: addresses that a channel sends nothing to, for a reason, until somebody lifts it or it ends.

An address is personal data. It stands in a column that no index, key or check knows, since PostgreSQL repeats the values of those
in errors and in its log; what is looked for is its hash. A suppression is named by a hash, too, so no address gets into a URL.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import msgspec

from engine.directory.contacts import Addressed, address_hash, normalized
from engine.plan import profile
from engine.plan.profile import SCOPE_ALL
from engine.postgres import Connection, transposed
from seamark.protocol.limits import LABEL_CHARS_MAX
from seamark.protocol.moments import check_moment

REASON: Final = r"^[a-z][a-z0-9_]{0,63}$(?!\n)"
Reason = Annotated[str, msgspec.Meta(pattern=REASON)]
"""A word, which decisions repeat: `suppressed:hard_bounce`. A legal opt-out is `opted_out`."""

Source = Annotated[str, msgspec.Meta(min_length=1, max_length=LABEL_CHARS_MAX, pattern=r"^[^\u0000-\u001f\u007f]*$")]
Scope = Annotated[str, msgspec.Meta(min_length=1, max_length=LABEL_CHARS_MAX, pattern=r"^[^\u0000]*$")]

_FORMS: Final[Mapping[Addressed, tuple[re.Pattern[str], str]]] = {
    "email": (
        re.compile(r"[^\s@\x00-\x1f\x7f\ud800-\udfff]{1,64}@[^\s@\x00-\x1f\x7f\ud800-\udfff]{1,255}"),
        "alice@example.com",
    ),
    "sms": (re.compile(r"\+[1-9][0-9]{6,14}", re.ASCII), "+4366412345678"),
}

PURGED_AT_ONCE: Final = 100
"""Suppressions that have ended are deleted by those who write new ones, so many at a time: the table never grows by them."""


class NewSuppression(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be suppressed.

    Args:
        address: an e-mail address, or a phone number as `+4366412345678`.
        scope: `all`, or the category that it is about.
        source: who says so.
        expires_at: from then on it does not count.
    """

    channel: Addressed
    address: str
    reason: Reason
    scope: Scope = SCOPE_ALL
    source: Source = "api"
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where the address is none, without repeating it, or `expires_at` is no moment that can be stored."""
        form, example = _FORMS[self.channel]
        if form.fullmatch(normalized(self.channel, self.address)) is None:
            raise ValueError(f"`address` is none for {self.channel}: write it as in {example}")
        check_moment("expires_at", self.expires_at)


class StoredSuppression(msgspec.Struct, frozen=True, kw_only=True):
    """A suppression as its tenant sees it."""

    id: str
    channel: Addressed
    address: str
    scope: str
    reason: str
    source: str
    created_at: datetime
    expires_at: datetime | None


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """Which suppressions are meant; what is not said does not matter.

    Args:
        source: the beginning of it: `relay` means `relay 550/5.1.1`, too.
        since, until: when they were made: from then on, and before.
    """

    reason: Reason
    channel: Addressed | None = None
    source: Source | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where it means opt-outs, or a time is no moment that can be stored."""
        if self.reason == profile.OPTED_OUT:
            raise ValueError("`reason` is a legal opt-out: each of them is lifted by itself, by its id")
        check_moment("since", self.since)
        check_moment("until", self.until)


def id_of(hash: bytes, scope: str) -> bytes:
    """The name of the suppression of an address and scope."""
    return hashlib.sha256(hash + scope.encode()).digest()


_COLUMNS: Final = "id, channel, address, scope, reason, source, created_at, expires_at"
_SAID_AT: Final = "coalesce(suppressions.said_at, suppressions.created_at)"
_COUNTS: Final = "(expires_at IS NULL OR expires_at > now())"

# What a person wanted stays as it is: a bounce that comes later would end by itself, or be lifted with a provider's others. For
# the same reason a report replaces of the rest only what ends sooner; a person or a service may decide otherwise.
_PUT: Final = f"""
INSERT INTO suppressions (tenant, id, address_hash, channel, address, scope, reason, source, expires_at, said_at)
SELECT $1, *, $11
FROM unnest($2::bytea[], $3::bytea[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::timestamptz[])
ON CONFLICT (tenant, id) DO UPDATE SET reason = excluded.reason, source = excluded.source,
    expires_at = excluded.expires_at, created_at = now(), said_at = CASE suppressions.reason WHEN '{profile.OPTED_OUT}'
    THEN greatest({_SAID_AT}, coalesce(excluded.said_at, now())) ELSE excluded.said_at END
WHERE suppressions.expires_at <= now() OR excluded.reason = '{profile.OPTED_OUT}' OR CASE suppressions.reason
    WHEN '{profile.OPTED_OUT}' THEN false WHEN '{profile.COMPLAINT}' THEN excluded.reason = '{profile.COMPLAINT}'
    ELSE NOT $10 OR excluded.reason = '{profile.COMPLAINT}'
        OR coalesce(excluded.expires_at, 'infinity') > coalesce(suppressions.expires_at, 'infinity') END
"""

_PURGE: Final = """
DELETE FROM suppressions WHERE (tenant, id) IN (
    SELECT tenant, id FROM suppressions WHERE expires_at < now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
"""

_USERS: Final = """
SELECT user_id FROM users WHERE tenant = $1 AND email_hash = ANY($2)
UNION SELECT user_id FROM users WHERE tenant = $1 AND phone = ANY($3)
"""

_LIFT_OPT_OUTS: Final = f"""
DELETE FROM suppressions
WHERE tenant = $1 AND address_hash = $2 AND reason = '{profile.OPTED_OUT}' AND {_COUNTS} AND {_SAID_AT} <= $3
RETURNING id
"""

_PAGE: Final = f"""
SELECT {_COLUMNS} FROM suppressions WHERE tenant = $1 AND id > $2 AND {_COUNTS} AND ($4::text IS NULL OR channel = $4)
    AND ($5::text IS NULL OR reason = $5)
ORDER BY id LIMIT $3
"""

_CHOSEN: Final = f"""
{{verb}} FROM suppressions WHERE tenant = $1 AND {_COUNTS} AND reason = $2 AND ($3::text IS NULL OR channel = $3)
    AND ($4::text IS NULL OR starts_with(source, $4)) AND ($5::timestamptz IS NULL OR created_at >= $5)
    AND ($6::timestamptz IS NULL OR created_at < $6)
"""
_FIND_CHOSEN: Final = _CHOSEN.format(verb=f"SELECT {_COLUMNS}") + "ORDER BY id LIMIT $7"
_COUNT_CHOSEN: Final = _CHOSEN.format(verb="SELECT count(*)")
_LIFT_CHOSEN: Final = _CHOSEN.format(verb="DELETE") + "AND id = ANY($7) RETURNING id"

_OF_ADDRESSES: Final = f"""
SELECT {_COLUMNS} FROM suppressions WHERE tenant = $1 AND address_hash = ANY($2) AND {_COUNTS} ORDER BY scope
"""

# `place` says for whom; that a user's two addresses are suppressed is one answer.
_OF_USERS: Final = f"""
SELECT a.place, s.channel, s.reason, s.scope, s.expires_at
FROM unnest($1::int[], $2::text[], $3::bytea[]) AS a (place, tenant, address_hash)
    JOIN suppressions s USING (tenant, address_hash)
WHERE {_COUNTS} ORDER BY s.scope
"""


async def users_of(connection: Connection, tenant: str, addresses: Iterable[tuple[Addressed, str]]) -> set[str]:
    """The users who have one of these addresses: their profiles change with its suppressions."""
    forms = {(channel, normalized(channel, address)) for channel, address in addresses}
    emails = [address_hash(channel, address) for channel, address in forms if channel == "email"]
    phones = [address for channel, address in forms if channel == "sms"]
    return {row["user_id"] for row in await connection.fetch(_USERS, tenant, emails, phones)}


async def put_suppressions(
    connection: Connection,
    tenant: str,
    new: Sequence[NewSuppression],
    *,
    reported: bool = False,
    said_at: datetime | None = None,
) -> list[str]:
    """Suppress addresses; returns the ids, in this order. What is suppressed already gets the new reason and end.

    A legal opt-out is replaced by an opt-out only, a complaint by a complaint or an opt-out only. Of several about one address
    and scope the last one counts.

    Args:
        reported: nobody has decided this, it follows from what a provider says: what is suppressed for as long or longer stays.
            Opt-outs and complaints replace it nevertheless.
        said_at: when a person asked for it; None: now.
    """
    rows: dict[bytes, tuple[Any, ...]] = {}
    ids = []
    for one in new:
        hash = address_hash(one.channel, one.address)
        id = id_of(hash, one.scope)
        ids.append(id.hex())
        address = normalized(one.channel, one.address)
        rows[id] = (id, hash, one.channel, address, one.scope, one.reason, one.source, one.expires_at)
    # In one order for all, so that two who write the same addresses never wait for each other.
    columns = list(zip(*(rows[id] for id in sorted(rows)), strict=True)) or [()] * 8
    await connection.execute(_PUT, tenant, *columns, reported, said_at)
    await connection.execute(_PURGE, PURGED_AT_ONCE)
    return ids


async def page_of_suppressions(
    connection: Connection,
    tenant: str,
    after: str,
    limit: int,
    *,
    channel: Addressed | None = None,
    reason: str | None = None,
) -> list[StoredSuppression]:
    """At most `limit` suppressions that count now, in the order of their ids, behind the id `after`; `""` begins."""
    return [_stored(row) for row in await connection.fetch(_PAGE, tenant, bytes.fromhex(after), limit, channel, reason)]


async def find_suppressions(
    connection: Connection, tenant: str, addresses: Mapping[Addressed, str]
) -> list[StoredSuppression]:
    """Suppressions of these addresses that count now."""
    hashes = [address_hash(channel, address) for channel, address in addresses.items()]
    return [_stored(row) for row in await connection.fetch(_OF_ADDRESSES, tenant, hashes)]


async def of_users(
    connection: Connection, addresses: Sequence[tuple[int, str, bytes]]
) -> dict[int, tuple[profile.Suppression, ...]]:
    """Suppressions that count now, as profiles hold them.

    Args:
        addresses: whose each is, by a number; its tenant; its hash.

    Returns:
        those of each number that has some.
    """
    found: dict[int, tuple[profile.Suppression, ...]] = {}
    for row in await connection.fetch(_OF_USERS, *transposed(addresses)) if addresses else ():
        one = profile.Suppression(row["channel"], row["reason"], row["scope"], row["expires_at"])
        found[row["place"]] = (*found.get(row["place"], ()), one)
    return found


async def find_suppression(connection: Connection, tenant: str, id: str) -> StoredSuppression | None:
    """The suppression of this id."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM suppressions WHERE tenant = $1 AND id = $2", tenant, bytes.fromhex(id)
    )
    return None if row is None else _stored(row)


async def lift_suppression(connection: Connection, tenant: str, id: str) -> StoredSuppression | None:
    """Delete a suppression, and say what it was; None: there is none of this id."""
    row = await connection.fetchrow(
        f"DELETE FROM suppressions WHERE tenant = $1 AND id = $2 RETURNING {_COLUMNS}", tenant, bytes.fromhex(id)
    )
    return None if row is None else _stored(row)


async def lift_opt_outs(connection: Connection, tenant: str, channel: Addressed, address: str, until: datetime) -> int:
    """Lift the legal opt-outs of an address that were asked for until then; how many."""
    return len(await connection.fetch(_LIFT_OPT_OUTS, tenant, address_hash(channel, address), until))


async def find_chosen(connection: Connection, tenant: str, chosen: Chosen, limit: int) -> list[StoredSuppression]:
    """At most `limit` of the suppressions that are meant, and count now."""
    return [_stored(row) for row in await connection.fetch(_FIND_CHOSEN, tenant, *_said(chosen), limit)]


async def count_chosen(connection: Connection, tenant: str, chosen: Chosen) -> int:
    """How many suppressions are meant, and count now."""
    return int(await connection.fetchval(_COUNT_CHOSEN, tenant, *_said(chosen)))


async def lift_chosen(connection: Connection, tenant: str, chosen: Chosen, ids: Sequence[str]) -> int:
    """Delete those of these ids that are still what was meant; how many they were."""
    rows = await connection.fetch(_LIFT_CHOSEN, tenant, *_said(chosen), [bytes.fromhex(id) for id in ids])
    return len(rows)


def _said(chosen: Chosen) -> tuple[Any, ...]:
    return chosen.reason, chosen.channel, chosen.source, chosen.since, chosen.until


def _stored(row: Any) -> StoredSuppression:
    return StoredSuppression(**{**dict(row), "id": row["id"].hex()})
