"""Users whom earlier versions let be called as nobody may be any more: they can be read and taken away, and nothing else."""

import asyncpg

from engine.directory import topics, users
from engine.directory.push_tokens import NewToken, register_token
from engine.directory.users import UserFields
from engine.postgres import transaction
from tests.integration.test_directory import APNS, ask, changing, house
from tests.support.gateways import TestGateway

__all__ = ["house"]


async def test_a_user_who_could_not_be_called_so_any_more_is_read_and_taken_away_but_not_changed(
    house: TestGateway, pool: asyncpg.Pool
) -> None:
    user, apns = "/v1/users/segment:x", NewToken(**APNS)  # type: ignore[arg-type]
    async with changing(pool, "segment:x") as change:  # as an earlier version let him be
        await users.put_user(change, "segment:x", UserFields(email="x@example.com"))
        await register_token(change, "segment:x", "phone", apns)
        await register_token(change, "segment:x", "tablet", NewToken(**{**APNS, "token": "cd" * 32}))  # type: ignore[arg-type]
    async with transaction(pool) as connection:
        for topic in ("news", "sport"):
            await topics.add_members(connection, "acme", topic, ["segment:x", "bob"])
    changes = (
        ("PUT", user, {"email": "y@example.com"}),
        ("PATCH", user, {"email": "y@example.com"}),
        ("PATCH", f"{user}/preferences", {"mute": {}}),
        ("PUT", f"{user}/devices/watch", APNS),
        ("PUT", "/v1/topics/news/members", {"users": ["segment:x"]}),
    )
    for method, path, body in changes:
        status, problem = await ask(house, method, path, body)
        assert (status, "kept for topics and segments" in problem["detail"]) == (400, True), (path, problem)
    assert (await ask(house, "GET", user))[1]["email"] == "x@example.com"
    assert (await ask(house, "GET", f"{user}/preferences"))[0] == 200
    assert [token["id"] for token in (await ask(house, "GET", f"{user}/devices"))[1]["items"]] == ["phone", "tablet"]
    assert await ask(house, "GET", "/v1/webhooks?user=segment:x") == (200, {"items": [], "next": None})
    assert await ask(house, "DELETE", f"{user}/devices/phone") == (200, {"removed": True})
    left = await ask(house, "DELETE", "/v1/topics/news/members", {"users": ["segment:x"]})
    assert left == (200, {"members": 1})
    assert (await ask(house, "DELETE", user))[0] == 202
    assert (await ask(house, "GET", user))[0] == 404
    assert (await ask(house, "GET", "/v1/topics/sport"))[1]["members"] == 1
    assert (await ask(house, "DELETE", f"/v1/users/{'x' * 129}"))[0] == 400
