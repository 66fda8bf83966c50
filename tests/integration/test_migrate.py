"""The schema: made once, by whoever comes first; what a key in it is good for."""

import asyncio
import contextlib
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from engine.directory.contacts import address_hash
from engine.directory.suppressions import id_of
from engine.errors import Unavailable
from gateway.access import api_keys
from gateway.access.api_keys import ApiKeys, Holder, KeysAway, postgres_keys
from gateway.access.key_table import hash_of
from gateway.limits import API_KEY_SECONDS
from ops import migrate as migrate_module
from ops.dev.child import free_port
from ops.migrate import migrate
from tests.support.logs import eventually
from tests.support.network import bad_network

HASH = bytes(32)
NEWEST = max(path.name[:4] for path in (Path(migrate_module.__file__).parent / "migrations/versions").glob("[0-9]*.py"))


async def test_migrating_again_or_from_several_places_at_once_changes_nothing(empty_postgres: str) -> None:
    await asyncio.gather(*(migrate(empty_postgres) for _ in range(3)))
    await migrate(empty_postgres)
    connection = await asyncpg.connect(empty_postgres)
    try:
        assert [row[0] for row in await connection.fetch("SELECT version_num FROM alembic_version")] == [NEWEST]
    finally:
        await connection.close()


async def test_keys_are_looked_up_again_soon_where_a_reader_holds_a_migration_up(
    empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate_to("0003", empty_postgres, monkeypatch)
    backup = await asyncpg.connect(empty_postgres)
    try:
        await backup.execute("BEGIN; LOCK TABLE api_keys IN ACCESS SHARE MODE")
        async with asyncio.timeout(60):
            with pytest.raises(Unavailable, match="lock timeout"):
                await migrate(empty_postgres)
        await backup.execute("ROLLBACK")
    finally:
        await backup.close()
    assert await migrate(empty_postgres) == ("0003", NEWEST)


async def test_a_database_that_does_not_answer_is_said() -> None:
    with pytest.raises(Unavailable, match="PostgreSQL"):
        await migrate(f"postgresql://postgres@127.0.0.1:{free_port()}/postgres")


@pytest.mark.parametrize(
    ("column", "valid"),
    [
        ("expires_at = now() + interval '1 hour'", True),
        ("expires_at = now() - interval '1 second'", False),
        ("revoked_at = now()", False),
    ],
)
async def test_a_key_is_good_until_it_expires_or_is_revoked(
    postgres: str, column: str, valid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "API_KEY_QUERY_SECONDS", 20.0)
    connection = await asyncpg.connect(postgres)
    keys = await postgres_keys(postgres)
    try:
        await connection.execute("INSERT INTO api_keys (tenant, name, key_hash) VALUES ('acme', 'test', $1)", HASH)
        assert await keys.find(HASH) is not None
        await connection.execute(f"UPDATE api_keys SET {column}")
        assert (await keys.find(HASH) is not None) is valid
    finally:
        await keys.close()
        await connection.close()


async def test_a_look_up_of_a_silent_postgresql_ends_and_the_key_goes_on(postgres: str) -> None:
    connection = await asyncpg.connect(postgres)
    await connection.execute("INSERT INTO api_keys (tenant, name, key_hash) VALUES ('acme', 'test', $1)", hash_of("sk"))
    await connection.close()
    address = urlsplit(postgres)
    async with bad_network(address.port or 0) as network:
        through = postgres.replace(f":{address.port}/", f":{network.port}/")
        now = [0.0]
        keys = ApiKeys(await postgres_keys(through), now=lambda: now[0])

        async def known() -> Holder | None:
            with contextlib.suppress(KeysAway):  # a busy machine may take longer than a look-up may
                return await keys.find("sk")
            return None

        try:
            found = await eventually(known)
            network.blackhole()
            now[0] = API_KEY_SECONDS + 1
            async with asyncio.timeout(30):
                assert await keys.find("sk") == found
            network.restore()
        finally:
            await keys.close()


async def test_options_of_the_address_reach_the_driver(empty_postgres: str) -> None:
    first = await migrate(f"{empty_postgres}?sslmode=prefer&application_name=provisioner")
    assert first == (None, NEWEST)
    assert await migrate(empty_postgres) == (NEWEST, NEWEST)


async def test_addresses_stored_before_are_found_by_the_domain_that_mails_go_to(
    empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate_to("0016", empty_postgres, monkeypatch)
    connection = await asyncpg.connect(empty_postgres)
    there = "münchen.de", "example.com", "b_ü.de"
    try:
        for domain in there:
            await connection.execute(
                "INSERT INTO users (tenant, user_id, version, email, email_hash) VALUES ('acme', $1, 1, $2, $3)",
                *(domain, f"Ann@{domain}", plain_hash(f"ann@{domain}")),
            )
        for address, scope, reason, end in (
            ("ann@münchen.de", "all", "opted_out", None),
            ("ann@xn--mnchen-3ya.de", "all", "hard_bounce", None),
            ("bob@münchen.de", "all", "soft_bounces", datetime(2999, 1, 1, tzinfo=UTC)),
            ("bob@xn--mnchen-3ya.de", "all", "hard_bounce", None),
            ("cid@münchen.de", "news", "legal_hold", None),
            ("dan@münchen.de", "all", "opted_out", datetime(1999, 1, 1, tzinfo=UTC)),
            ("dan@xn--mnchen-3ya.de", "all", "complaint", None),
            ("ann@example.com", "all", "complaint", None),
        ):
            hash = plain_hash(address)
            await connection.execute(
                "INSERT INTO suppressions (tenant, id, address_hash, channel, address, scope, reason, source, expires_at)"
                " VALUES ('acme', $1, $2, 'email', $3, $4, $5, 'test', $6)",
                *(id_of(hash, scope), hash, address, scope, reason, end),
            )
        before = await connection.fetchrow("SELECT * FROM suppressions WHERE address = 'ann@example.com'")
        await migrate(empty_postgres)
        hashes = {row["user_id"]: row["email_hash"] for row in await connection.fetch("SELECT * FROM users")}
        assert hashes == {domain: address_hash("email", f"ann@{domain}") for domain in there}
        rows = await connection.fetch("SELECT * FROM suppressions ORDER BY address")
        assert [(row["address"], row["scope"], row["reason"]) for row in rows] == [
            ("ann@example.com", "all", "complaint"),
            ("ann@xn--mnchen-3ya.de", "all", "opted_out"),
            ("bob@xn--mnchen-3ya.de", "all", "hard_bounce"),
            ("cid@xn--mnchen-3ya.de", "news", "legal_hold"),
            ("dan@xn--mnchen-3ya.de", "all", "complaint"),
        ]
        assert before is not None
        assert dict(rows[0]) | dict(before) == dict(rows[0])
        for row in rows:
            hash = address_hash("email", row["address"])
            assert (row["address_hash"], row["id"]) == (hash, id_of(hash, row["scope"]))
    finally:
        await connection.close()


async def migrate_to(revision: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade = migrate_module.command.upgrade
    with monkeypatch.context() as patch:
        patch.setattr(migrate_module.command, "upgrade", lambda config, _: upgrade(config, revision))
        await migrate(url)


def plain_hash(email: str) -> bytes:
    """As addresses were looked for before."""
    return sha256(f"email\n{email}".encode()).digest()
