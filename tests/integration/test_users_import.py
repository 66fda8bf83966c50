"""Many users at once on a real PostgreSQL: all or none, the same again changes nothing, and what a race leaves."""

import asyncio

import asyncpg
import pytest

from engine.directory import changing
from engine.directory.bulk import ImportedUser, import_users
from engine.directory.changing import Directory
from engine.directory.contacts import Addressed
from engine.directory.suppressions import users_of
from engine.directory.users import UserFields, UserPatch, delete_user, find_user, merge_user, put_user
from engine.errors import StoreUnavailable

COUNT = 3000


def people(**fields: str) -> list[ImportedUser]:
    found = {"email": "x@example.com", "attributes": {"plan": "pro"}, **fields}
    return [ImportedUser(f"u{n:05}", UserFields(**found), frozenset(found)) for n in range(COUNT)]  # type: ignore[arg-type]


async def imported(directory: Directory, users: list[ImportedUser]) -> tuple[int, int, int, int]:
    done = await import_users(directory, "acme", users, lambda sent: None)
    return done.made, done.changed, done.unchanged, done.deleted


@pytest.fixture
def directory(pool: asyncpg.Pool) -> Directory:
    return Directory(pool)


async def test_the_same_again_changes_nothing_and_what_a_row_does_not_say_stays(directory: Directory) -> None:
    assert await imported(directory, people()) == (COUNT, 0, 0, 0)
    rows = await directory.pool.fetch("SELECT * FROM users ORDER BY user_id")
    assert await imported(directory, people()) == (0, 0, COUNT, 0)
    assert await directory.pool.fetch("SELECT * FROM users ORDER BY user_id") == rows
    locale = [ImportedUser("u00007", UserFields(locale="de"), frozenset({"locale"}))]
    assert await imported(directory, locale) == (0, 1, 0, 0)
    found = await find_user(directory.pool, "acme", "u00007")
    assert found is not None
    assert (found.locale, found.email, found.attributes, found.version) == ("de", "x@example.com", {"plan": "pro"}, 2)
    taken = [ImportedUser("u00007", UserFields(), frozenset({"email"}))]
    assert await imported(directory, taken) == (0, 1, 0, 0)
    found = await find_user(directory.pool, "acme", "u00007")
    assert found is not None
    assert (found.email, found.locale) == (None, "de")


async def test_an_import_that_fails_midway_leaves_nothing(directory: Directory) -> None:
    class Stopped(Exception):
        pass

    def stop(sent: int) -> None:
        if sent >= COUNT // 2:
            raise Stopped

    with pytest.raises(Stopped):
        await import_users(directory, "acme", people(), stop)
    assert await directory.pool.fetchval("SELECT count(*) FROM users") == 0
    assert await directory.pool.fetchval("SELECT count(*) FROM profiles") == 0
    assert await imported(directory, people()) == (COUNT, 0, 0, 0), "the connection is not left in pieces"


async def test_who_was_deleted_is_passed_over_also_when_it_happens_meanwhile(
    directory: Directory, postgres: str
) -> None:
    await imported(directory, people())
    async with directory.changing("acme", ["u00001"]) as change:
        await delete_user(change, "u00001")
    assert await imported(directory, people(locale="de")) == (0, COUNT - 1, 0, 1)

    class Marks:
        """Deletes a user between the look of the import and its locks."""

        async def pending(self, tenant: str, users: list[str], seconds: float) -> str:
            other = await asyncpg.connect(postgres)
            await other.execute("DELETE FROM users WHERE user_id = 'u00002'")
            await other.execute("UPDATE profiles SET deleted_at = now() WHERE user_id = 'u00002'")
            await other.close()
            return "token"

        async def settled(self, tenant: str, users: list[str], token: str) -> None:
            heard.append(len(users))

    heard: list[int] = []
    assert await imported(Directory(directory.pool, Marks()), people(locale="fr")) == (0, COUNT - 2, 0, 2)
    assert heard == [COUNT - 1]
    assert await find_user(directory.pool, "acme", "u00002") is None


async def test_changes_of_single_users_and_an_import_never_lose_each_other(directory: Directory) -> None:
    async def patch(number: int) -> None:
        async with directory.changing("acme", [f"u{number:05}"]) as change:
            await merge_user(change, f"u{number:05}", UserPatch(phone="+4366412345678"))

    await asyncio.gather(imported(directory, people()), *(patch(number) for number in range(0, COUNT, 300)))
    rows = await directory.pool.fetch("SELECT * FROM users WHERE phone IS NOT NULL AND email IS NOT NULL")
    assert len(rows) == COUNT // 300, "each field was said by one of the two"
    versions = "SELECT count(*) FROM users u JOIN profiles p USING (tenant, user_id) WHERE u.version <> p.version"
    assert await directory.pool.fetchval(versions) == 0


async def test_another_tenant_has_users_of_its_own(directory: Directory) -> None:
    async with directory.changing("other", ["u00001"]) as change:
        await put_user(change, "u00001", UserFields(locale="fr"))
    await imported(directory, people(locale="de"))
    found = await find_user(directory.pool, "other", "u00001")
    assert found is not None
    assert found.locale == "fr"


async def test_what_an_import_stores_of_an_address_is_found_by_suppressions(directory: Directory) -> None:
    await imported(directory, [ImportedUser("asa", UserFields(email="ÅSA@Example.com"), frozenset({"email"}))])
    asked: list[tuple[Addressed, str]] = [("email", "åsa@example.com")]
    assert await users_of(directory.pool, "acme", asked) == {"asa"}
    await imported(directory, [ImportedUser("asa", UserFields(locale="de"), frozenset({"locale"}))])
    assert await users_of(directory.pool, "acme", asked) == {"asa"}, "the address stays, and is found"
    await imported(directory, [ImportedUser("asa", UserFields(), frozenset({"email"}))])
    assert await users_of(directory.pool, "acme", asked) == set()


async def test_an_import_that_was_stopped_while_its_marks_ended_stores_nothing(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped between its marks and its commit must not commit when it goes on: readers trust old profiles."""

    class Marks:
        async def pending(self, tenant: str, users: list[str], seconds: float) -> str:
            monkeypatch.setattr(changing, "STOPPED_SECONDS", -seconds)  # so much time has gone by
            return ""

        async def settled(self, tenant: str, users: list[str], token: str) -> None:
            raise AssertionError("whether it is committed is unknown to others")

    with pytest.raises(StoreUnavailable, match="stopped for so long"):
        await imported(Directory(directory.pool, Marks()), people())
    assert await directory.pool.fetchval("SELECT count(*) FROM users") == 0
