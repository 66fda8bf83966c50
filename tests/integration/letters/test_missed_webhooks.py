"""What an endpoint has missed, sent again from a time on."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from msgspec.structs import replace

from chaos.load import whole_stream
from engine.channels.channel import Outcome
from engine.directory.changes import changing
from engine.directory.webhooks import (
    FORMER_TYPES_MAX,
    EndpointSettings,
    NewEndpoint,
    WebhookEndpoint,
    create_endpoint,
    replace_endpoint,
)
from engine.jobs.claims import Done
from engine.jobs.messages import decode_job
from engine.jobs.receipts import receipts_of
from engine.postgres import asking
from gateway.api.pages import cursor_after
from ops.dev.servers import NatsServer, Valkey
from projections.deliveries.missed import Place, missed_by
from tests.integration.test_events_api import add_key
from tests.support.gateways import gateway_on
from tests.support.letters import TENANT, USER, World, dead, job, known_to_the_inbox, planned
from tests.support.logs import eventually


async def test_an_endpoint_gets_again_what_it_has_missed_since_a_time_each_message_once_and_others_get_nothing(
    world: World, nats_server: NatsServer, valkey: Valkey, postgres: str
) -> None:
    key = "sk_test_3333333333"
    await add_key(postgres, key, ["webhooks:write"])
    async with changing(world.pool, TENANT) as change:
        new = NewEndpoint(url="https://hooks.example.com/a", types=("order.*",))
        mine, other = [(await create_endpoint(change, new))[0].id for _ in range(2)]
    hook: dict[str, Any] = {"channel": "webhook", "target": mine}
    await dead(world, job("before", **hook))
    since = datetime.now(UTC)
    doubtful = Done(0, "ambiguous", "x", Outcome(kind="ambiguous", provider="webhook", code="timeout"))
    await dead(world, job("n1", **hook), job("n2", **hook), job("else", **(hook | {"target": other})), job("mail"))
    await world.journal.conclude(job("n3", **hook), doubtful)
    await dead(world, job("foreign", **hook, tenant="other"))
    await while_it_was_disabled(world, mine, datetime.now(UTC))
    options: dict[str, Any] = {"postgres_url": postgres, "redis_url": valkey.url, "topology_ready": True}
    async with gateway_on(nats_server, **options) as gateway:

        async def replay(endpoint: str = mine, **body: Any) -> tuple[int, Any]:
            url, headers = f"{gateway.url}/v1/webhooks/{endpoint}/replay", {"Authorization": f"Bearer {key}"}
            async with gateway.http.post(
                url, json={"since": since.isoformat(), "per_second": 500, **body}, headers=headers
            ) as response:
                return response.status, await response.json()

        await eventually(partial(_answers, replay))
        for at in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-31T12:00:00"):
            for name in ("since", "until"):
                status, problem = await replay(**{name: at})
                assert (status, problem["field"]) == (400, name), problem
                assert "2026-01-31T12:00:00Z" in problem["detail"]
            for given in (
                ("m.", at, "u", "i", since.isoformat()),
                ("m.", since.isoformat(), "u", "i", at),
                ("", "5", at),
            ):
                status, problem = await replay(cursor=given[0] + cursor_after(given[1:]))
                assert (status, problem["field"]) == (400, "cursor"), (given, problem)
        for at in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"):
            assert (await replay(since="9999-12-31T23:59:59Z", until=at))[1] == {"fates": {}, "next": None}
        assert (await replay("wh_" + "0" * 24))[0] == 404
        assert (await replay(until=since.isoformat()))[1]["fates"] == {}
        async with changing(world.pool, TENANT) as change:
            await replace_endpoint(change, other, EndpointSettings(url=new.url, state="disabled"))
        refused = (await replay(other))[1]
        assert refused["code"] == "endpoint_disabled"
        assert all(word in refused["detail"] for word in (other, "`url`", "`types`", '"state": "active"'))
        answers = await asyncio.gather(*(replay() for _ in range(3)))
        assert {status for status, _ in answers} == {200}
        assert (await replay(cursor="m.x"))[0] == 400
        world.desk.outcome = Outcome(kind="ok")
        waiting = await whole_stream(world.broker, "JOBS", "job.webhook.>")
        await world.work(channel="webhook")
        assert (await replay())[1] == {"fates": {}, "next": None}
    assert set(world.desk.accepted.values()) == {1}
    assert {key.split("/")[1] for key in world.desk.accepted} == {"n1", "n2", "n3", "away", "split", "late"}
    jobs = [decode_job(one.payload) for one in waiting]
    assert {(one.target, one.again, one.type) for one in jobs} == {(mine, True, "order.shipped")}
    assert len({one.claim_key for one in jobs}) == 6, "a message that stands there twice is one life, sent once"
    assert {one.id for one in jobs if one.requested} == {"away", "split", "late"}, "as the event had asked for"
    # What it was never tried with has the claim that it would have had: a job that is late is the same.
    assert {one.id for one in jobs if one.claim_key == one.key} == {"away", "split"}
    assert {one.letter.id for one in await world.letters()} == {"before", "else", "mail", "foreign"}


async def test_an_endpoint_has_not_missed_what_it_was_not_subscribed_to_when_it_came(world: World) -> None:
    """A service that subscribes to more types, and asks for what it has missed, is not told of all that there ever was."""
    async with changing(world.pool, TENANT) as change:
        new = NewEndpoint(url="https://hooks.example.com/a", types=("mail.*",))
        mine = (await create_endpoint(change, new))[0].id

    async def subscribed(*types: str) -> WebhookEndpoint:
        async with changing(world.pool, TENANT) as change:
            found = await replace_endpoint(change, mine, EndpointSettings(url=new.url, types=types))
        assert found is not None
        return found

    since, came = datetime.now(UTC), dict[str, datetime]()
    came["too-early"] = datetime.now(UTC)
    await subscribed("mail.*", "order.*")
    came["missed"] = datetime.now(UTC)
    await subscribed("order.shipped")
    came["missed-too"] = datetime.now(UTC)
    await subscribed("mail.*")
    came["between"] = datetime.now(UTC)
    endpoint = await subscribed("order.*")
    for one in (job(id, channel="webhook") for id in came):
        await world.journal.store(one, receipts_of(one, Done(0, "split"), since))
    await world.fold()
    await known_to_the_inbox(world, *came, user=USER, type="order.shipped", ago=timedelta(0))
    for id, at in came.items():
        await world.pool.execute("UPDATE inbox SET stored_at = $2 WHERE id = $1", id, at)
    until = datetime.now(UTC) + timedelta(minutes=1)
    found, _ = await missed_by(world.pool, TENANT, endpoint, Place(since), until, 100)
    assert [one.id for one in found] == ["missed", "missed-too"]
    for number in range(FORMER_TYPES_MAX + 5):
        endpoint = await subscribed("order.*", f"other{number}.*")
    async with asking(world.pool) as connection:
        kept = await connection.fetchval("SELECT jsonb_array_length(former_types) FROM webhook_endpoints")
    assert kept == FORMER_TYPES_MAX


async def while_it_was_disabled(world: World, endpoint: str, now: datetime) -> None:
    """What came to a tenant whose endpoint was disabled: of three notifications it would have been told."""
    ids = ("away", "split", "late", "off", "had", "odd")
    away, split, late, off, had, odd = (job(id, channel="webhook") for id in ids)
    await planned(world, away, "never", now, "no_address")
    await planned(world, off, "never", now, "user_off")
    for one in (split, late, had, odd):
        await world.journal.store(one, receipts_of(one, Done(0, "split"), now))
    for one, done in ((late, Done(0, "suppressed", "no_address")), (had, Done(0, "sent", "200"))):
        await world.journal.store(one, receipts_of(replace(one, target=endpoint), done, now))
    await world.fold()
    await known_to_the_inbox(world, *ids, user=USER, type="order.shipped", ago=timedelta(0))
    await world.pool.execute("UPDATE inbox SET type = 'other.type' WHERE id = 'odd'")


async def _answers(replay: Callable[..., Awaitable[tuple[int, Any]]]) -> bool:
    return (await replay("wh_" + "0" * 24))[0] == 404
