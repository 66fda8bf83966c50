"""`Idempotency-Key` over real servers: a request that is sent again is answered as before, and nothing is done twice."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.http.idempotency import Held, IdempotencyKeys, Kept, today
from gateway.http.problems import Problem
from ops.dev.servers import NatsServer, Valkey
from tests.integration.test_events_api import EVENT, KEY, add_key, with_keys
from tests.support.gateways import PARTITIONS, TestGateway, gateway_on
from tests.support.logs import all_records, dispatching, eventually
from tests.support.patience import wait_for_stores

ANONYMOUS = {"type": "order.shipped", "to": ["alice"], "data": {"order": 17}}
OTHER = {**ANONYMOUS, "data": {"order": 18}}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Redis is slow, and not away."""
    wait_for_stores(monkeypatch)


class Answer:
    """What came of a request."""

    def __init__(self, status: int, body: dict[str, Any], headers: Any) -> None:
        self.status, self.body = status, body
        self.replayed = headers.get("Idempotency-Replayed")
        self.retry_after = headers.get("Retry-After")


async def send(
    gateway: TestGateway, body: Any, key: str = "k1", *, path: str = "/v1/events", api_key: str = KEY
) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {api_key}", "Idempotency-Key": key}
    async with gateway.http.post(gateway.url + path, data=data, headers=headers) as response:
        return Answer(response.status, await response.json(content_type=None), response.headers)


@asynccontextmanager
async def at_the_door(nats: NatsServer, postgres: str, valkey: Valkey) -> AsyncIterator[TestGateway]:
    """A gateway with Redis that knows the API key of tenant acme."""
    async with with_keys(nats, postgres, redis_url=valkey.url) as gateway:
        yield gateway


async def events(gateway: TestGateway) -> int:
    """How many events are stored."""
    return (await gateway.broker.stream("EVENTS")).messages


async def test_sent_again_a_request_is_answered_as_before_by_any_gateway(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as first:
        async with gateway_on(nats_server, postgres_url=postgres, redis_url=valkey.url, topology_ready=True) as second:
            before = await send(first, ANONYMOUS)
            await send(first, EVENT, "another")
            again = await send(second, ANONYMOUS)
        assert (before.status, before.replayed, again.status, again.replayed) == (202, None, 202, "true")
        assert again.body == before.body
        assert before.body["event_id"].startswith("k1.")
        assert (before.body["seq"], before.body["duplicate"]) == (1, False)
        assert await events(first) == 2


async def test_a_thousand_requests_at_once_are_one_event_and_one_record(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with (
        at_the_door(nats_server, postgres, valkey) as first,
        gateway_on(nats_server, postgres_url=postgres, redis_url=valkey.url, topology_ready=True) as second,
        dispatching(nats_server.url, valkey.url),
    ):
        both = [send((first, second)[number % 2], ANONYMOUS) for number in range(1000)]
        answers = await asyncio.gather(*both)
        assert {answer.status for answer in answers} <= {202, 409, 503}  # 503: this one process does the work of many
        taken = [answer for answer in answers if answer.status == 202]
        if not taken:
            taken = [await eventually(lambda: _taken(first))]
        # A second one is carried out only where Redis was too slow to be told how the first has ended, and says so.
        carried_out = [answer.body["duplicate"] for answer in taken if answer.replayed is None]
        assert carried_out.count(False) == 1
        assert {(answer.body["event_id"], answer.body["seq"]) for answer in taken} == {
            (taken[0].body["event_id"], taken[0].body["seq"])
        }
        assert all(answer.retry_after == "1" for answer in answers if answer.status == 409)
        assert await events(first) == 1
        await eventually(lambda: _records(first))
        await send(first, EVENT, "last")
        records = await eventually(lambda: _records(first, "e1"))
        assert [record.id for record in records] == [taken[0].body["event_id"], "e1"]


async def _records(gateway: TestGateway, last: str = "") -> list[Any]:
    found = await all_records(gateway.broker, PARTITIONS)
    return found if not last or (found and found[-1].id == last) else []


async def test_of_two_bodies_with_one_key_exactly_one_wins(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        for number in range(5):
            key, bodies = f"k{number}", [ANONYMOUS, OTHER] * 50
            answers = await asyncio.gather(*(send(gateway, body, key) for body in bodies))
            # 503: a busy process was not answered in time by Redis, and nothing was done.
            assert {answer.status for answer in answers} <= {202, 409, 422, 503}
            winners = {json.dumps(body) for body, answer in zip(bodies, answers, strict=True) if answer.status == 202}
            if not winners:
                winners = {await eventually(lambda key=key: _winner(gateway, key))}
            assert len(winners) == 1
            assert await events(gateway) == number + 1
            loser = OTHER if winners == {json.dumps(ANONYMOUS)} else ANONYMOUS
            refused = await send(gateway, loser, key)
            assert (refused.status, refused.body["code"]) == (422, "idempotency_key_reused")
            assert refused.body["field"] == "Idempotency-Key"


async def _winner(gateway: TestGateway, key: str) -> str | None:
    for body in (ANONYMOUS, OTHER):
        if (await send(gateway, body, key)).status == 202:
            return json.dumps(body)
    return None


async def test_the_same_body_sent_elsewhere_is_another_request(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        assert (await send(gateway, {"events": [ANONYMOUS]}, path="/v1/events/bulk")).status == 202
        assert (await send(gateway, {"events": [ANONYMOUS]})).status == 422


async def test_while_a_request_runs_others_with_its_key_are_told_to_wait(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as gateway, remembered(valkey) as keys:
        held = await keys.begin("acme", "k1", b"a request under way")
        assert isinstance(held, Held)
        waiting = await send(gateway, ANONYMOUS)
        assert (waiting.status, waiting.body["code"], waiting.retry_after) == (409, "idempotency_running", "1")
        await keys.forget(held)
        assert (await send(gateway, ANONYMOUS)).status == 202


async def test_a_request_that_was_refused_leaves_its_key_to_the_corrected_one(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        assert (await send(gateway, {**ANONYMOUS, "to": []})).status == 400
        assert (await send(gateway, b"{")).status == 400
        assert (await send(gateway, ANONYMOUS)).status == 202


async def test_a_request_whose_outcome_is_unknown_keeps_its_key_for_its_own_body(
    nats_server: NatsServer, postgres: str, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        nats_server.kill()
        with monkeypatch.context() as patch:
            patch.setattr("gateway.api.events.EVENT_BUDGET_SECONDS", 0.3)
            assert (await send(gateway, ANONYMOUS)).status == 503
        assert (await send(gateway, OTHER)).status == 422
        nats_server.start()
        await eventually(lambda: gateway.context.broker.connected)
        await eventually(lambda: gateway.broker.connected)
        taken = await eventually(lambda: _taken(gateway))
        assert taken.replayed is None
        assert await events(gateway) == 1


async def _taken(gateway: TestGateway, key: str = "k1") -> Answer | None:
    answer = await send(gateway, ANONYMOUS, key)
    return answer if answer.status == 202 else None


async def test_events_of_a_bulk_request_that_were_not_stored_are_tried_again_the_others_are_duplicates(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    bulk = {"events": [ANONYMOUS, {**ANONYMOUS, "to": ["bob"], "data": "x" * 2000}]}
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        config = (await gateway.broker.stream("EVENTS")).config
        small = {**config, "max_bytes": 1_500, "max_msg_size": 1_400}
        await gateway.broker.api("STREAM.UPDATE.EVENTS", {**small, "max_msg_size": -1})
        before = await send(gateway, bulk, path="/v1/events/bulk")
        assert [one.get("error", {}).get("code") for one in before.body["results"]] == [None, "store_full"]
        await gateway.broker.api("STREAM.UPDATE.EVENTS", config)
        again = await send(gateway, bulk, path="/v1/events/bulk")
        assert [one["duplicate"] for one in again.body["results"]] == [True, False]
        assert [one["event_id"] for one in again.body["results"]] == [one["event_id"] for one in before.body["results"]]
        last = await send(gateway, bulk, path="/v1/events/bulk")
        assert (last.replayed, last.body) == ("true", again.body)
        assert await events(gateway) == 2


async def test_while_redis_is_away_events_are_taken_and_known_again_by_their_ids(
    nats_server: NatsServer, postgres: str, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.idempotency.today", lambda: 20_000)  # no midnight in between
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        valkey.kill()
        answers = [await send(gateway, ANONYMOUS) for _ in range(3)]
        assert [(answer.status, answer.replayed) for answer in answers] == [(202, None)] * 3
        assert [answer.body["duplicate"] for answer in answers] == [False, True, True]
        valkey.start()
        keys = gateway.context.idempotency_keys
        assert keys is not None
        await eventually(lambda: time.monotonic() > keys._away_until)  # it is left alone for a second
        assert (await send(gateway, ANONYMOUS)).body["duplicate"] is True
        assert (await send(gateway, ANONYMOUS)).replayed == "true"
        assert await events(gateway) == 1


async def test_a_silent_redis_is_waited_for_before_it_is_taken_for_away(
    nats_server: NatsServer, postgres: str, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        assert (await send(gateway, EVENT, "before")).status == 202
        monkeypatch.setattr("gateway.http.idempotency.REDIS_SECONDS", 0.3)
        monkeypatch.setattr("gateway.http.idempotency.SILENT_SECONDS", 1.5)
        valkey.suspend()
        assert (await send(gateway, ANONYMOUS)).status == 503
        assert await events(gateway) == 1
        valkey.resume()
        assert (await eventually(lambda: _taken(gateway))).body["duplicate"] is False
        valkey.suspend()
        try:
            gone_on = await eventually(lambda: _taken(gateway, "k2"), seconds=30)
            assert gone_on.replayed is None
        finally:
            valkey.resume()


async def test_a_key_that_is_used_again_when_it_was_forgotten_makes_another_event(
    nats_server: NatsServer, postgres: str, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are known for three days, keys for one: with the id of the first event, the second would be lost without a word."""
    async with (
        at_the_door(nats_server, postgres, valkey) as gateway,
        dispatching(nats_server.url, valkey.url),
        Redis.from_url(valkey.url) as redis,
    ):
        first = await send(gateway, ANONYMOUS)
        await redis.delete("idempotency:{acme}:k1")  # its day is over
        monkeypatch.setattr("gateway.http.idempotency.today", lambda: today() + 1)
        second = await send(gateway, ANONYMOUS)
        assert (second.status, second.replayed, second.body["duplicate"]) == (202, None, False)
        both = [first.body["event_id"], second.body["event_id"]]
        records = await eventually(lambda: _records(gateway, both[1]))
        assert [record.id for record in records] == both


async def test_keys_are_those_of_a_tenant(nats_server: NatsServer, postgres: str, valkey: Valkey) -> None:
    await add_key(postgres, "globex's", ["events:write"], "globex")
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        assert (await send(gateway, ANONYMOUS)).status == 202
        other = await send(gateway, OTHER, api_key="globex's")
        assert (other.status, other.replayed) == (202, None)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_a_key_that_is_none_is_refused_by_name(
    nats_server: NatsServer, postgres: str, valkey: Valkey, key: str
) -> None:
    async with at_the_door(nats_server, postgres, valkey) as gateway:
        refused = await send(gateway, ANONYMOUS, key)
        assert (refused.status, refused.body["code"]) == (400, "invalid_idempotency_key")
        assert refused.body["field"] == "Idempotency-Key"


# --- the keys themselves --------------------------------------------------------------------------------------------


@asynccontextmanager
async def remembered(valkey: Valkey, **limits: Any) -> AsyncIterator[IdempotencyKeys]:
    """Keys in Redis, without a gateway."""
    async with Redis.from_url(valkey.url) as redis:
        keys = IdempotencyKeys(redis, **limits)
        try:
            yield keys
        finally:
            await keys.close()


async def refused(keys: IdempotencyKeys, key: str, body: bytes, tenant: str = "acme") -> int:
    """The status with which a request is refused."""
    with pytest.raises(Problem) as problem:
        await keys.begin(tenant, key, body)
    return problem.value.kind.status


async def test_who_died_over_a_request_leaves_it_to_the_same_body_and_says_nothing_afterwards(valkey: Valkey) -> None:
    async with (
        remembered(valkey, running_seconds=50) as other,
        remembered(valkey) as keys,
        Redis.from_url(valkey.url) as redis,
    ):
        dead = await other.begin("acme", "k1", b"body")
        assert isinstance(dead, Held)
        assert await refused(keys, "k1", b"body") == 409
        seconds, microseconds = await redis.time()
        until, now = float(await redis.hget(dead.names[0], "until")), seconds + microseconds / 1e6
        assert 0 < until - now <= 50
        await redis.hset(dead.names[0], "until", f"{now:.6f}")  # they have passed
        assert await refused(keys, "k1", b"other") == 422
        heir = await keys.begin("acme", "k1", b"body")
        assert isinstance(heir, Held)
        await other.done(dead, 202, b"late")  # it was only slow
        await other.forget(dead)
        assert await refused(other, "k1", b"body") == 409
        await keys.done(heir, 202, b"heir")
        assert await keys.begin("acme", "k1", b"body") == Kept(202, b"heir")


async def test_what_is_refused_after_a_run_whose_outcome_is_unknown_leaves_its_key_to_no_other_body(
    valkey: Valkey,
) -> None:
    """Its event may be stored: with its key, and so its id, another one would be taken for it and be lost."""
    async with remembered(valkey) as keys:
        unknown = await keys.begin("acme", "k1", b"body")
        assert isinstance(unknown, Held)
        await keys.again(unknown)
        refused_now = await keys.begin("acme", "k1", b"body")
        assert isinstance(refused_now, Held)
        await keys.forget(refused_now)
        assert await refused(keys, "k1", b"other") == 422
        assert isinstance(await keys.begin("acme", "k1", b"body"), Held)


async def test_a_run_that_is_tried_again_after_midnight_makes_what_it_made_before(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with remembered(valkey) as keys:
        first = await keys.begin("acme", "k1", b"body")
        assert isinstance(first, Held)
        await keys.again(first)
        monkeypatch.setattr("gateway.http.idempotency.today", lambda: today() + 1)
        later = await keys.begin("acme", "k1", b"body")
        assert isinstance(later, Held)
        assert later.day == first.day


async def test_thousands_of_keys_at_once_are_all_held_though_each_takes_a_turn_of_the_loop(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.idempotency.REDIS_SECONDS", 0.05)

    async def busy() -> None:
        while True:
            time.sleep(0.02)
            await asyncio.sleep(0)

    async with remembered(valkey) as keys:
        load = asyncio.create_task(busy(), name="busy")
        try:
            for tried in range(5):
                begins = [keys.begin("acme", f"k{tried}-{number}", b"body") for number in range(16)]
                held = await asyncio.gather(*begins, return_exceptions=True)
                if all(isinstance(one, Held) for one in held):
                    return  # else Redis itself may have been slow, once
        finally:
            load.cancel()
        raise AssertionError(held)


async def test_a_tenant_cannot_fill_redis_with_keys_and_others_go_on(valkey: Valkey) -> None:
    async with remembered(valkey, burst_bytes=5_000, bytes_per_day=864_000) as keys:
        for number in range(4):
            held = await keys.begin("acme", f"k{number}", b"body")
            assert isinstance(held, Held)
            await keys.done(held, 202, b"x" * 1_000)  # what an answer takes counts, too
        with pytest.raises(Problem) as full:
            await keys.begin("acme", "k9", b"body")
        assert full.value.kind.code == "too_many_idempotency_keys"
        assert 50 <= (full.value.retry_after_seconds or 0) <= 200
        assert isinstance(await keys.begin("acme", "k1", b"body"), Kept)
        assert isinstance(await keys.begin("globex", "k9", b"body"), Held)


async def test_requests_that_are_refused_use_up_no_allowance(valkey: Valkey) -> None:
    async with remembered(valkey, burst_bytes=1_000, bytes_per_day=86.4) as keys:
        for number in range(10):
            held = await keys.begin("acme", f"k{number}", b"body")
            assert isinstance(held, Held)
            await keys.forget(held)


async def test_keys_and_allowances_leave_redis_by_themselves(valkey: Valkey) -> None:
    slowly = {"kept_seconds": 60, "bytes_per_day": 86_400}  # so that none has left before it is looked at
    async with remembered(valkey, **slowly) as keys, Redis.from_url(valkey.url) as redis:
        for number, end in enumerate((keys.forget, keys.again, lambda held: keys.done(held, 202, b"{}"))):
            held = await keys.begin("acme", f"k{number}", b"body")
            assert isinstance(held, Held)
            await end(held)
        assert isinstance(await keys.begin("acme", "abandoned", b"body"), Held)
        names = [name async for name in redis.scan_iter()]
        assert len(names) == 4
        assert all([0 < await redis.pttl(name) <= 60_000 for name in names if name.startswith(b"idempotency")])
        assert all([await redis.pttl(name) > 0 for name in names])
