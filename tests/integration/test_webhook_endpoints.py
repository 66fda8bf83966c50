"""Endpoints of webhooks in PostgreSQL: which get what, and how one comes to be disabled and is enabled again."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from engine.channels.channel import Outcome
from engine.channels.webhook.endpoints import OK_NOTED_EVERY, disable, endpoint_of, note_attempt, targets_of
from engine.channels.webhook.health import Health
from engine.channels.webhook.schedule import TABLE
from engine.directory.changes import changing
from engine.directory.rules import read_rules
from engine.directory.sealing import PLAIN, Seal
from engine.directory.webhooks import (
    EndpointSettings,
    NewEndpoint,
    WebhookEndpoint,
    create_endpoint,
    find_endpoint,
    replace_endpoint,
    rotate_secret,
    seal_anew,
)
from engine.errors import StoreBroken
from engine.postgres import Pool, asking, transaction

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
TENANT = "acme"
URL = "https://hooks.example.com/in"
OK, GONE, BROKEN = (TABLE.judged("webhook", status) for status in (200, 410, 500))


async def made(pool: Pool, *types: str, user: str | None = None, tenant: str = TENANT) -> WebhookEndpoint:
    async with changing(pool, tenant) as change:
        endpoint, _ = await create_endpoint(change, NewEndpoint(url=URL, types=types or ("*",), user=user))
    return endpoint


async def note(pool: Pool, id: str, outcome: Outcome, message: str, sent_at: datetime) -> Health | None:
    async with transaction(pool, 10.0) as connection:
        return await note_attempt(connection, TENANT, id, outcome, message, sent_at)


async def shown(pool: Pool, id: str) -> WebhookEndpoint:
    async with asking(pool) as connection:
        found = await find_endpoint(connection, TENANT, id)
    assert found is not None
    return found


async def test_a_notification_goes_to_the_endpoints_of_the_tenant_and_of_its_user(pool: Pool) -> None:
    everything, orders, exact, anns = (
        (await made(pool)).id, (await made(pool, "order.*", "invoice.paid")).id, (await made(pool, "order.shipped")).id,
        (await made(pool, "order.*", user="ann")).id,
    )  # fmt: skip
    await made(pool, "order.*", user="bob")
    await made(pool, tenant="other")
    async with asking(pool) as connection:
        assert set(await targets_of(connection, TENANT, "ann", "order.shipped")) == {everything, orders, exact, anns}
        assert set(await targets_of(connection, TENANT, "eve", "order.shipped")) == {everything, orders, exact}
        assert set(await targets_of(connection, TENANT, "ann", "order")) == {everything}
        assert set(await targets_of(connection, TENANT, "ann", "invoice.paid")) == {everything, orders}
        assert await endpoint_of(connection, "other", everything) is None


async def test_an_endpoint_signs_with_its_new_secret_and_the_one_before(pool: Pool) -> None:
    id = (await made(pool)).id
    async with asking(pool) as connection:
        first = await endpoint_of(connection, TENANT, id)
    async with changing(pool, TENANT) as change:
        _, new = await rotate_secret(change, id, None)
    async with asking(pool) as connection:
        second = await endpoint_of(connection, TENANT, id)
    assert (second.url, second.secrets) == (URL, (new, *first.secrets))
    assert len(first.secrets) == 1


async def test_a_secret_that_nobody_can_open_is_named_and_the_others_are_sealed_all_the_same(pool: Pool) -> None:
    old, new = Seal([OLD]), Seal([NEW])
    async with changing(pool, TENANT) as change:
        half, _ = await create_endpoint(change, NewEndpoint(url=URL), old)
        _, second = await rotate_secret(change, half.id, None)
        ids = [half.id, *[(await create_endpoint(change, NewEndpoint(url=URL), seal))[0].id for seal in (old, PLAIN)]]
    done = await seal_anew(pool, new)
    assert {str(one) for one in done.unopened} == {
        f"the secret of {id} is sealed by the key {old.name}" for id in ids[:2]
    }
    rows = {row["id"]: row for row in await pool.fetch("SELECT * FROM webhook_endpoints WHERE tenant = $1", TENANT)}
    assert new.is_newest(rows[ids[2]]["secret"])
    assert new.open(rows[half.id]["secret"], TENANT, half.id) == second
    assert old.is_newest(rows[half.id]["previous_secret"])
    assert (await seal_anew(pool, Seal([NEW, OLD]))).unopened == []


async def test_secrets_are_stored_sealed_and_sealed_anew_when_the_key_is_changed(pool: Pool) -> None:
    old, both, new = Seal([OLD]), Seal([NEW, OLD]), Seal([NEW])
    async with changing(pool, TENANT) as change:
        plain, first = await create_endpoint(change, NewEndpoint(url=URL, types=("*",)))
        _, second = await rotate_secret(change, plain.id, None, seal=old)
        sealed, third = await create_endpoint(change, NewEndpoint(url=URL, types=("*",)), old)
    endpoints = await pool.fetchval("SELECT count(*) FROM webhook_endpoints")
    async with asking(pool) as connection:
        assert (await endpoint_of(connection, TENANT, plain.id, old)).secrets == (second, first)
        with pytest.raises(StoreBroken, match=old.name):
            await endpoint_of(connection, TENANT, sealed.id, new)
    assert (await seal_anew(pool, both)).endpoints == endpoints
    assert await seal_anew(pool, new) == (endpoints, 0, [])
    async with asking(pool) as connection:
        assert (await endpoint_of(connection, TENANT, plain.id, new)).secrets == (second, first)
        assert (await endpoint_of(connection, TENANT, sealed.id, new)).secrets == (third,)
    columns = await pool.fetch("SELECT secret, previous_secret FROM webhook_endpoints WHERE tenant = $1", TENANT)
    assert all(one is None or one.startswith(f"sealed:{new.name}:") for row in columns for one in row)


@pytest.mark.parametrize("because", ["gone", "failing"])
async def test_a_disabled_endpoint_gets_nothing_until_it_is_enabled_again(pool: Pool, because: str) -> None:
    id = (await made(pool, "order.*")).id
    start = datetime.now(UTC)
    if because == "gone":
        health = await note(pool, id, GONE, "a", start)
    else:
        assert (await note(pool, id, BROKEN, "a", start)).disabled is None
        assert (await shown(pool, id)).failing_since == start
        health = await note(pool, id, BROKEN, "b", start + timedelta(days=5))
    assert health.disabled == because

    async with asking(pool) as connection:  # between the two steps
        assert await targets_of(connection, TENANT, "ann", "order.shipped") == []
        assert await endpoint_of(connection, TENANT, id) is None
    before = (await read_rules(pool, TENANT)).version
    for there_was_something_to_do in (True, False):
        async with changing(pool, TENANT) as change:
            assert await disable(change, id) == there_was_something_to_do
    rules = await read_rules(pool, TENANT)
    assert (rules.version, rules.webhook_of("order.shipped")) == (before + 1, False)
    endpoint = await shown(pool, id)
    assert (endpoint.state, endpoint.disabled_because) == ("disabled", because)
    assert await note(pool, id, OK, "c", start + timedelta(days=6)) is None

    async with changing(pool, TENANT) as change:
        await replace_endpoint(change, id, EndpointSettings(url=URL, types=("order.*",), state="active"))
    endpoint = await shown(pool, id)
    assert (endpoint.state, endpoint.disabled_because, endpoint.failing_since) == ("active", None, None)
    late = await note(pool, id, GONE, "a", endpoint.changed_at - timedelta(seconds=1))
    assert late.disabled is None, "what was sent before says nothing of it"
    async with asking(pool) as connection:
        assert await targets_of(connection, TENANT, "ann", "order.shipped") == [id]


async def test_an_endpoint_that_works_is_not_disabled(pool: Pool) -> None:
    id = (await made(pool)).id
    async with changing(pool, TENANT) as change:
        assert not await disable(change, id)
    assert (await shown(pool, id)).state == "active"


async def test_another_address_is_another_endpoint_and_another_type_is_not(pool: Pool) -> None:
    id = (await made(pool)).id
    await note(pool, id, BROKEN, "a", datetime.now(UTC))
    async with changing(pool, TENANT) as change:
        await replace_endpoint(change, id, EndpointSettings(url=URL, types=("order.*",)))
    assert (await shown(pool, id)).failing_since is not None
    async with changing(pool, TENANT) as change:
        await replace_endpoint(change, id, EndpointSettings(url=URL + "/2", types=("order.*",)))
    assert (await shown(pool, id)).failing_since is None


async def test_successes_cost_a_write_a_minute_and_each_end_of_a_failure_one(pool: Pool) -> None:
    id = (await made(pool)).id
    start = datetime.now(UTC)

    async def writes_for(outcome: Outcome, sent_at: datetime) -> bool:
        async with asking(pool) as connection:
            before = await connection.fetchval("SELECT ctid::text FROM webhook_endpoints WHERE id = $1", id)
        await note(pool, id, outcome, "a", sent_at)
        async with asking(pool) as connection:
            return before != await connection.fetchval("SELECT ctid::text FROM webhook_endpoints WHERE id = $1", id)

    second = timedelta(seconds=1)
    assert await writes_for(OK, start)
    assert not await writes_for(OK, start + second)
    assert await writes_for(OK, start + OK_NOTED_EVERY)
    assert await writes_for(BROKEN, start + OK_NOTED_EVERY + second)
    assert await writes_for(OK, start + OK_NOTED_EVERY + 2 * second)


async def test_workers_that_report_at_once_lose_nothing(pool: Pool) -> None:
    id = (await made(pool)).id
    start = datetime.now(UTC)
    times = [(f"m{n}", start + timedelta(hours=n)) for n in range(0, 121, 10)]
    await asyncio.gather(*(note(pool, id, BROKEN, message, sent_at) for message, sent_at in reversed(times)))
    async with changing(pool, TENANT) as change:
        assert await disable(change, id)
    assert (await shown(pool, id)).disabled_because == "failing"
