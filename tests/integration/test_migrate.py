"""The schema: made once, by whoever comes first; what a key in it is good for."""

import asyncio
import contextlib
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

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
    upgrade = migrate_module.command.upgrade
    with monkeypatch.context() as patch:
        patch.setattr(migrate_module.command, "upgrade", lambda config, _: upgrade(config, "0003"))
        await migrate(empty_postgres)
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
