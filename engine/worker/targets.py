"""Where a job goes: the address, token or endpoint that its user has now, and whether that may be written to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import msgspec
import structlog

from engine.channels.channel import Job
from engine.channels.email.message import domain_of
from engine.channels.push.message import PushTarget
from engine.channels.webhook.endpoints import endpoint_of, targets_of
from engine.directory.contacts import Addressed
from engine.directory.push_tokens import WebPushKeys
from engine.directory.sealing import PLAIN, Seal
from engine.errors import StoreBroken
from engine.limits import JOBS_TURNS
from engine.plan.profile import OPTED_OUT, Suppression
from engine.postgres import Connection, Pool, asking, transposed
from engine.questions import Questions

_log = structlog.get_logger("seamark.worker")

FINGERPRINT_BYTES: Final = 8
"""Of a hash: enough to tell the few addresses that a user may have had from each other, and nothing that is the address."""

# Each is asked for all jobs that ask at the same time; `place` says which of them a row is for.
# The hash is that of `contacts.address_hash`: what an address is suppressed by is found in the same look as the address.
_ADDRESS: Final = """
SELECT a.place, u.address, u.hash, s.channel, s.reason, s.scope, s.expires_at
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS a (tenant, user_id, place)
    JOIN (SELECT tenant, user_id, {address} AS address, {hash} AS hash FROM users) AS u USING (tenant, user_id)
    LEFT JOIN suppressions s ON s.tenant = u.tenant AND s.address_hash = u.hash
"""

_ADDRESSES: Final[dict[Addressed, str]] = {
    "email": _ADDRESS.format(address="email", hash="email_hash"),
    "sms": _ADDRESS.format(address="phone", hash=r"sha256(convert_to(E'sms\n' || phone, 'UTF8'))"),
}

_TOKENS: Final = """
SELECT a.place, t.token_id
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS a (tenant, user_id, place) JOIN push_tokens t USING (tenant, user_id)
WHERE t.retired_at IS NULL ORDER BY t.token_id
"""

_TOKEN: Final = """
SELECT a.place, t.token_id, t.platform, t.token, t.app, t.environment, t.keys, t.token_hash
FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS a (tenant, user_id, token_id, place)
    JOIN push_tokens t USING (tenant, user_id, token_id)
WHERE t.retired_at IS NULL
"""

ASKED_MAX: Final = 256
"""Jobs of one statement: below a millisecond of PostgreSQL's time."""

Rows = Sequence[asyncpg.Record]


class Target(NamedTuple):
    """One target.

    Args:
        of_channel: what the channel's `send` takes.
        key: of the gate it goes through; "": that of its provider.
        fingerprint: see `Outcome.target_digest`.
    """

    of_channel: object
    key: str = ""
    fingerprint: str = ""


class Several(NamedTuple):
    """A job for each of these targets, by their ids."""

    ids: tuple[str, ...]


class Nowhere(NamedTuple):
    """There is no target. `why`: as decisions say it."""

    why: str


class Unusable(NamedTuple):
    """There is a target, and our set-up lacks what it takes to reach it. `code`: as outcomes say it."""

    code: str


class Targets:
    """Finds targets in PostgreSQL.

    Args:
        pool: the primary: a replica that lags would show what was retired or suppressed a moment ago as good.
        seal: opens the secrets of webhooks.
    """

    def __init__(self, pool: Pool, seal: Seal = PLAIN) -> None:
        self._pool = pool
        self._seal = seal
        self._addresses = {channel: self._of_all(f"{channel}-addresses", sql) for channel, sql in _ADDRESSES.items()}
        self._tokens, self._token = self._of_all("push-tokens", _TOKENS), self._of_all("push-token", _TOKEN)

    async def find(self, job: Job, category: str | None, now: datetime) -> Target | Several | Nowhere | Unusable:
        """The target of a job, or those that it is to be split for.

        An address is looked at together with what suppresses it: the profile that was decided from may have been that of another.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        match job.channel:
            case "email" | "sms":
                return _address(
                    await self._addresses[job.channel].answer((job.tenant, job.user)), job.channel, category, now
                )
            case "push" if job.target:
                return _token(await self._token.answer((job.tenant, job.user, job.target)))
            case "push":
                return _tokens(await self._tokens.answer((job.tenant, job.user)))
            case "webhook":
                async with asking(self._pool) as connection:
                    if job.target:
                        return await _endpoint(connection, job, self._seal)
                    return await _endpoints(connection, job)
        return Nowhere("no_address")

    async def has_other_token(self, job: Job) -> bool:
        """Whether the user has a live token beside the one of this job.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        rows = await self._tokens.answer((job.tenant, job.user))
        return any(row["token_id"] != job.target for row in rows)

    async def close(self) -> None:
        """Ask nothing more."""
        for questions in (*self._addresses.values(), self._tokens, self._token):
            await questions.close()

    def _of_all(self, name: str, sql: str) -> Questions[tuple[str, ...], Rows]:
        async def ask(asked: list[tuple[str, ...]]) -> list[Rows]:
            found: list[list[asyncpg.Record]] = [[] for _ in asked]
            async with asking(self._pool) as connection:
                for row in await connection.fetch(sql, *transposed(asked)):
                    found[row["place"] - 1].append(row)
            return list(found)

        return Questions(name, ask, most=ASKED_MAX, turns=JOBS_TURNS)


def _address(rows: Rows, channel: Addressed, category: str | None, now: datetime) -> Target | Nowhere:
    if not rows or rows[0]["address"] is None:
        return Nowhere("no_address")
    found = [
        Suppression(row["channel"], row["reason"], row["scope"], row["expires_at"])
        for row in rows
        if row["channel"] is not None
    ]
    held = [each.reason for each in found if each.holds(channel, category, now)]
    if held:
        return Nowhere(OPTED_OUT if OPTED_OUT in held else f"suppressed:{min(held)}")
    address = rows[0]["address"]
    # Servers of some recipients defer mails: those to others go on.
    key = domain_of(address) if channel == "email" else ""
    return Target(address, key=key, fingerprint=fingerprint_of(rows[0]["hash"]))


def _tokens(rows: Rows) -> Several | Nowhere:
    return Several(tuple(row["token_id"] for row in rows)) if rows else Nowhere("no_token")


def _token(rows: Rows) -> Target | Nowhere:
    if not rows:
        return Nowhere("no_token")
    [row] = rows
    keys = None if row["keys"] is None else msgspec.json.decode(row["keys"], type=WebPushKeys)
    target = PushTarget(
        id=row["token_id"],
        platform=row["platform"],
        token=row["token"],
        app=row["app"],
        environment=row["environment"],
        keys=keys,
    )
    # Whoever registers a subscription chooses its push service, perhaps one that is away: those of others go on.
    key = f"webpush/{_host_of(row['token'])}" if row["platform"] == "webpush" else ""
    return Target(target, key=key, fingerprint=fingerprint_of(row["token_hash"]))


def _host_of(url: str) -> str:
    """The name in an address; "" where it has none, of which whoever sends says what is wrong."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


async def _endpoints(connection: Connection, job: Job) -> Several | Nowhere:
    found = await targets_of(connection, job.tenant, job.user, job.type)
    return Several(tuple(found)) if found else Nowhere("no_address")


async def _endpoint(connection: Connection, job: Job, seal: Seal) -> Target | Nowhere | Unusable:
    try:
        found = await endpoint_of(connection, job.tenant, job.target, seal)
    except StoreBroken as error:
        # Whoever changes keys starts one process after the other: what was sealed by a key that this one lacks waits for it.
        _log.error("secret_not_opened", why=str(error), remedy=error.remedy)
        return Unusable("secret_sealed")
    return Nowhere("no_address") if found is None else Target(found, key=f"{job.tenant}/{found.id}")


def fingerprint_of(hash: bytes) -> str:
    """What `Outcome.target_digest` holds of the hash of an address or token."""
    return hash[:FINGERPRINT_BYTES].hex()
