"""`seamark migrate` and `seamark api-key`, as an operator types them against a database of one's own."""

import json
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from gateway.access import api_keys
from gateway.access.api_keys import postgres_keys
from gateway.access.key_table import hash_of
from gateway.access.principals import Operator, Scope, Service
from ops.exitcode import MISCONFIGURED
from tests.support import commands
from tests.support.commands import ENV
from tests.support.forks import ROOT

pytestmark = pytest.mark.timeout(240)


def seamark(*words: str, url: str) -> subprocess.CompletedProcess[str]:
    return commands.seamark(*words, SEAMARK_POSTGRES_URL=url)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's look-up of a key gives up after two seconds, for which this machine may stand still."""
    monkeypatch.setattr(api_keys, "API_KEY_QUERY_SECONDS", 30.0)


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_database_is_migrated_once_and_then_left_as_it_is(empty_postgres: str) -> None:
    [first] = lines(seamark("migrate", "--json", url=empty_postgres))
    [again] = lines(seamark("migrate", "--json", url=empty_postgres))
    assert (first["before"], again["before"], again["after"]) == (None, first["after"], first["after"])
    assert "nothing to do" in seamark("migrate", url=empty_postgres).stdout
    password = empty_postgres.split(":")[2].partition("@")[0]
    assert password not in json.dumps([first, again])


def test_options_of_the_address_reach_the_driver(empty_postgres: str) -> None:
    assert seamark("migrate", url=f"{empty_postgres}?sslmode=prefer").returncode == 0
    done = seamark("migrate", url=f"{empty_postgres}?sslmode=require")  # the server of the tests has no certificate
    assert done.returncode == 1
    assert "SSL" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_a_key_is_shown_once_works_and_can_be_revoked(postgres: str) -> None:
    made = seamark("api-key", "create", "--tenant", "acme", "--name", "orders", url=postgres)
    key = made.stdout.strip()
    assert made.returncode == 0
    assert made.stdout == f"{key}\n"
    keys = await postgres_keys(postgres)
    try:
        found = await keys.find(hash_of(key))
        assert isinstance(found, Service)
        assert (found.tenant, found.scopes) == ("acme", set(Scope))
        lines(seamark("api-key", "create", "--tenant", "other", "--days", "1", "--json", url=postgres))
        [stored] = lines(seamark("api-key", "list", "--tenant", "acme", "--json", url=postgres))
        assert (stored["name"], stored["revoked_at"]) == ("orders", None)
        shown = seamark("api-key", "list", url=postgres).stdout
        assert len(shown.splitlines()) == 2
        assert key not in shown + json.dumps(stored)
        for _ in range(2):
            [revoked] = lines(seamark("api-key", "revoke", str(stored["id"]), "--json", url=postgres))
            assert revoked["revoked_at"] is not None
        assert await keys.find(hash_of(key)) is None
        unknown = seamark("api-key", "revoke", "4711", url=postgres)
        assert (unknown.returncode, unknown.stdout) == (2, "")
        assert "4711" in unknown.stderr
    finally:
        await keys.close()


async def test_a_key_is_made_for_a_tenant_or_for_an_operator(empty_postgres: str) -> None:
    lines(seamark("migrate", "--json", url=empty_postgres))
    [made] = lines(seamark("api-key", "create", "--operator", "--json", url=empty_postgres))
    assert (made["tenant"], made["scopes"]) == (None, [])
    keys = await postgres_keys(empty_postgres)
    try:
        assert await keys.find(hash_of(str(made["key"]))) == Operator(key=made["id"])
    finally:
        await keys.close()
    assert "operator" in seamark("api-key", "list", url=empty_postgres).stdout
    for wrong in ((), ("--operator", "--tenant", "acme"), ("--operator", "--scope", "events:write")):
        done = seamark("api-key", "create", *wrong, url=empty_postgres)
        assert (done.returncode, "--operator" in done.stderr) == (MISCONFIGURED, True)


async def test_what_has_to_be_changed_first_is_one_line_with_the_remedy(empty_postgres: str) -> None:
    done = seamark("api-key", "list", url=empty_postgres)
    assert (done.returncode, "run `seamark migrate`" in done.stderr) == (MISCONFIGURED, True)
    lines(seamark("migrate", "--json", url=empty_postgres))
    connection = await asyncpg.connect(empty_postgres)
    try:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
        newer = seamark("migrate", url=empty_postgres)
        assert (newer.returncode, "9999" in newer.stderr, "newer version" in newer.stderr) == (
            MISCONFIGURED,
            True,
            True,
        )
        await connection.execute("UPDATE alembic_version SET version_num = '0001'")
        done = seamark("migrate", url=empty_postgres)  # tables of 0002 are there already
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
    finally:
        await connection.close()


@pytest.mark.parametrize("words", ["migrate", "api-key list"])
def test_a_wrong_password_is_said_in_one_line(postgres: str, words: str) -> None:
    user, _, rest = postgres.partition("@")
    wrong = f"{user.rpartition(':')[0]}:wrong@{rest}"
    done = seamark(*words.split(), url=wrong)
    assert done.returncode == MISCONFIGURED
    assert "SEAMARK_POSTGRES_URL" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_package_that_only_migrations_need_is_named(postgres: str, tmp_path: Path) -> None:
    (tmp_path / "alembic").mkdir()
    (tmp_path / "alembic/__init__.py").write_text("raise ModuleNotFoundError(name='alembic')")
    done = subprocess.run(
        [sys.executable, "-m", "ops", "migrate"],
        env=ENV | {"SEAMARK_POSTGRES_URL": postgres, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == MISCONFIGURED
    assert "seamark-server[migrate]" in done.stderr
