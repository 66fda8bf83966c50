"""What is cancelled or over is shown to nobody, and that is a stored fact; what was sent is taken off where it is asked for."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from engine import cancels as cancels_module
from engine.broker.jetstream import Broker
from engine.buckets import Buckets
from engine.cancels import CANCELS_STREAM, Cancels, cancel, watching
from engine.errors import Unanswered
from engine.topology import server as topology
from gateway.api import transactions as transactions_api
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.subjects import encode_token, partition_of
from tests.integration.test_events_api import add_key
from tests.integration.test_inbox import shows, trace
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import FAST, all_records, connected, dispatching, eventually, publish
from tests.support.roles import dispatcher_processes
from tests.support.tables import projecting_tables
from tests.support.tokens import token

PARTITIONS = 4
ALICE = {"Authorization": f"Bearer {token('alice')}"}
SERVICE = "a service"


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    """A connection to a server with the topology."""
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


@pytest.fixture
async def house(
    patient: None,
    monkeypatch: pytest.MonkeyPatch,
    nats_server: NatsServer,
    valkey: Valkey,
    postgres: str,
    broker: Broker,
) -> AsyncIterator[TestGateway]:
    """Dispatcher, projector and gateway, and a service's key. Whoever waits for another waits for as long as it takes."""
    monkeypatch.setattr(cancels_module, "CANCELS_PATIENCE_SECONDS", 60.0)
    for deadline in ("INBOX_PASSES_SECONDS", "RECALL_SECONDS"):
        monkeypatch.setattr(transactions_api, deadline, 60.0)
    await add_key(postgres, SERVICE, ["events:write", "notifications:read"], "default")
    redis_url = valkey.url
    async with (
        dispatching(nats_server.url, redis_url),
        projecting_tables(nats_server.url, redis_url, postgres),
        gateway_on(nats_server, topology_ready=True, postgres_url=postgres, redis_url=redis_url) as gateway,
    ):
        yield gateway


async def delete(gateway: TestGateway, id: str, **query: Any) -> tuple[int, dict[str, Any]]:
    url, headers = f"{gateway.url}/v1/transactions/{id}", {"Authorization": f"Bearer {SERVICE}"}
    async with gateway.http.delete(URL(url, encoded="%" in id).with_query(query), headers=headers) as response:
        return response.status, await response.json()


async def unread(gateway: TestGateway, seq: int) -> int:
    """Alice's unread count once the record `seq` is counted."""

    async def told() -> dict[str, Any] | None:
        async with gateway.device(name="other", cursor=None) as device:
            count = (await device.until("ready")).get("unread")
        return count if count and count["as_of"] >= seq else None

    return int((await eventually(told))["count"])


# --- the view ---------------------------------------------------------------------------------------------------------


async def test_whoever_watches_knows_of_a_cancel_soon_and_after_a_start_of_all(broker: Broker) -> None:
    for number in range(5):
        await cancel(broker, "default", f"order {number}", budget_seconds=5)
    async with watching(broker) as cancels:
        await cancels.heard()
        assert all(cancels.holds("default", f"order {number}") for number in range(5))
        assert cancels.of_tenant("default") == 5
        assert not cancels.holds("acme", "order 1")
        await cancel(broker, "acme.x", "order 1", budget_seconds=5)
        await cancel(broker, "acme.x", "order 1", budget_seconds=5)
        await eventually(lambda: cancels.holds("acme=2Ex", "order 1"))
        assert cancels.of_tenant("acme=2Ex") == 1
        await eventually(lambda: cancels.fresh)


async def test_a_bucket_made_anew_forgets_and_one_that_is_missing_holds_nobody_up(broker: Broker) -> None:
    await cancel(broker, "default", "t", budget_seconds=5)
    async with watching(broker) as cancels:
        await cancels.heard()
        await broker.api(f"STREAM.DELETE.{CANCELS_STREAM}")
        await eventually(lambda: not cancels.holds("default", "t"))
        await eventually(lambda: cancels.fresh)
        await topology.apply(broker, await topology.plan(broker, "dev", overrides=FAST, recreate=True))
        for number in range(3):
            await cancel(broker, "default", f"n{number}", budget_seconds=5)
        await eventually(lambda: all(cancels.holds("default", f"n{number}") for number in range(3)))
        assert not cancels.holds("default", "t")


async def test_what_the_bucket_no_longer_holds_is_let_go(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watching(broker) as cancels:
        await cancel(broker, "default", "t", budget_seconds=5)
        await eventually(lambda: cancels.holds("default", "t"))
        monkeypatch.setattr(cancels_module, "CANCEL_KEPT_SECONDS", 0.1)
        await eventually(lambda: not cancels.holds("default", "t"))
        assert cancels.of_tenant("default") == 0


class Silent:
    """A broker that does not answer until it is told to."""

    answers = False

    def __init__(self) -> None:
        self.on_reconnect: list[Any] = []

    async def stream(self, name: str) -> Any:
        if not self.answers:
            raise Unanswered
        return type("State", (), {"epoch": "e", "last_seq": 0})

    def subscribe(self, subject: str, callback: Any) -> Any:
        return type("Subscription", (), {"unsubscribe": lambda self: None})()


async def test_a_view_that_is_not_fresh_is_waited_for_once_in_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancels_module, "CANCELS_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("engine.broker.tail.CONTROL_READ_SECONDS", 0.02)
    broker: Any = Silent()
    cancels = Cancels(broker)
    watch = asyncio.create_task(cancels.tail.run(), name="watch")
    try:
        began = time.monotonic()
        await cancels.heard()
        assert time.monotonic() - began >= 0.29
        monkeypatch.setattr(cancels_module, "CANCELS_PATIENCE_SECONDS", 60.0)
        async with asyncio.timeout(20):  # what holds up a partition is not waited for twice
            await cancels.heard()
        broker.answers = True
        await eventually(lambda: cancels.fresh)
        monkeypatch.setattr(cancels_module, "CANCELS_FRESH_SECONDS", -1.0)
        waiting = asyncio.create_task(cancels.heard())
        await asyncio.sleep(0.1)  # a fault would end it at once, as the one before did; a slow machine only shows less
        assert not waiting.done(), "a new outage is waited for again"
        monkeypatch.setattr(cancels_module, "CANCELS_FRESH_SECONDS", 1.0)
        await asyncio.wait_for(waiting, 20)
    finally:
        watch.cancel()


# --- dispatching ------------------------------------------------------------------------------------------------------


async def test_an_event_of_a_cancelled_transaction_becomes_a_record_that_nobody_is_shown(house: TestGateway) -> None:
    broker = house.broker
    await publish(broker, to=["alice"], type="order.paid", id="before", transaction_id="order 17")
    await shows(house, ["before"])
    assert await delete(house, "order 17") == (
        200,
        {"id": "order 17", "cancelled": 0, "recalled": 0, "too_late": 1, "more": False},
    )
    await publish(broker, to=["alice", "bob"], type="order.paid", id="e1", transaction_id="order 17", key="alice")
    await publish(broker, to=["alice"], type="order.paid", id="mail", transaction_id="order 17", channels=["email"])
    await publish(broker, to=["alice"], type="order.paid", id="e2", transaction_id="order 18")
    async with house.device() as device:
        frames = await device.records(4)
    assert [frame["op"] for frame in frames] == ["record", "skip", "skip", "record"]
    assert [frame["record"]["id"] for frame in frames if frame["op"] == "record"] == ["before", "e2"]
    assert frames[0]["record"]["transaction_id"] == "order 17"
    await shows(house, ["e2", "before"])
    records = {(one.id, one.user): one.record for one in await all_records(broker, PARTITIONS)}
    assert records["e1", "bob"]["plan"] == {"inapp": {"when": "never", "why": "cancelled"}}
    assert records["mail", "alice"]["plan"] == {"email": {"when": "never", "why": "cancelled"}}
    assert await unread(house, frames[-1]["seq"]) == 2
    _, answer = await trace(house, "e1", token("alice"))
    [proof] = answer["proofs"]
    assert [f["detail"] for f in proof["facts"] if f["fact"] == "planned"] == ["never, because: cancelled"]
    assert not [fact for fact in proof["facts"] if fact["fact"] == "sent"]
    assert not [gap for gap in proof["not_proven"] if gap.startswith(("sent", "read"))]
    assert (await delete(house, "order 17"))[1]["cancelled"] == 3


async def test_a_recall_takes_off_what_was_sent_and_says_how_many_it_was_too_late_for(house: TestGateway) -> None:
    broker = house.broker
    users = ["alice", "bob", "carol@example.com"]
    for number in range(3):
        await publish(broker, to=users, type="order.paid", id=f"e{number}", transaction_id="t/1", key="k")
    await publish(broker, to=["alice"], type="order.paid", id="other", transaction_id="t/2", key="k")
    await shows(house, ["other", "e2", "e1", "e0"])
    async with house.device() as device:
        await device.until("live")
        body = {"device": "phone", "ids": ["e0"]}
        async with house.http.post(f"{house.url}/v1/inbox/read", json=body, headers=ALICE) as answer:
            assert answer.status == 202
        await device.records(1)
        status, answer = await delete(house, "t%2F1", recall="true")
        assert (status, answer) == (200, {"id": "t/1", "cancelled": 0, "recalled": 8, "too_late": 1, "more": False})
        [recall] = await device.records(1)
        assert (recall["record"]["kind"], sorted(recall["record"]["ids"])) == ("recall", ["e0", "e1", "e2"])
    await shows(house, ["other"])
    assert await unread(house, recall["seq"]) == 1
    async with house.device(cursor=None, name="fresh") as device:
        assert [item["id"] for item in (await device.until("reset"))["inbox"]] == ["other"]
    before = len(await all_records(broker, PARTITIONS))
    assert (await delete(house, "t%2F1", recall="true"))[1] == answer, "sent again, it finds what it has done"
    assert len(await all_records(broker, PARTITIONS)) == before, "and does nothing twice"


async def test_a_large_recall_ends_in_parts_and_the_next_request_goes_on(
    house: TestGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions_api, "RECALL_ROWS", 7)
    monkeypatch.setattr(transactions_api, "READ_IDS", 3)
    users = ["alice", *(f"u{number:02}" for number in range(20))]
    for number in range(4):
        await publish(house.broker, to=users, type="demo.x", id=f"e{number}", transaction_id="t", key="k")
    await shows(house, ["e3", "e2", "e1", "e0"])
    with monkeypatch.context() as patch:
        patch.setattr(transactions_api, "RECALL_SECONDS", 0.0)
        assert (await delete(house, "t", recall="true"))[1]["more"] is True
    status, answer = await delete(house, "t", recall="true")
    assert (status, answer["recalled"], answer["too_late"], answer["more"]) == (200, 84, 0, False)
    recalls = [one.record for one in await all_records(house.broker, PARTITIONS) if one.record["kind"] == "recall"]
    assert sorted((one["user"], id) for one in recalls for id in one["ids"]) == sorted(
        (user, f"e{number}") for user in users for number in range(4)
    )
    await shows(house, [])


async def test_a_transaction_that_cannot_be_named_or_is_not_the_callers_is_not_cancelled(house: TestGateway) -> None:
    for impossible in ("x" * 129, "a%00b"):
        status, problem = await delete(house, impossible, recall="true")
        assert (status, problem["code"], problem["field"]) == (400, "invalid_query", "id")
    headers = {"Authorization": f"Bearer {token('alice')}"}
    async with house.http.delete(f"{house.url}/v1/transactions/t", headers=headers) as response:
        assert response.status in (401, 403)
    assert (await house.broker.stream(CANCELS_STREAM)).last_seq == 0


async def test_one_tenant_cannot_fill_the_bucket_of_all(house: TestGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions_api, "CANCELS_PER_TENANT", 2)
    monkeypatch.setattr(transactions_api, "CANCEL_SETTLE_SECONDS", 0.0)
    assert house.context.cancels is not None
    for id in ("a", "b"):
        assert (await delete(house, id))[0] == 200
    await eventually(lambda: house.context.cancels.of_tenant("default") == 2)  # type: ignore[union-attr]
    assert (await delete(house, "c"))[1]["code"] == "too_many_cancels"
    assert (await delete(house, "a"))[0] == 200, "what is cancelled may be recalled"
    house.context.cancel_rate = Buckets(1)
    assert [(await delete(house, "a"))[0] for _ in range(2)] == [200, 429]


async def test_a_cancel_is_stored_though_the_inbox_is_away_and_a_recall_says_that_it_is_not_done(
    nats_server: NatsServer, broker: Broker, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions_api, "INBOX_PASSES_SECONDS", 0.2)
    await add_key(postgres, SERVICE, ["events:write"], "default")
    async with gateway_on(nats_server, topology_ready=True, postgres_url=postgres) as gateway:
        await gateway.append()  # no projector runs
        status, answer = await delete(gateway, "t")
        assert (status, answer["cancelled"], answer["too_late"]) == (200, None, None)
        status, problem = await delete(gateway, "t", recall="true")
        assert (status, problem["code"]) == (503, "not_recalled")
        async with watching(broker) as cancels:
            await cancels.heard()
            assert cancels.holds("default", "t")


# --- kills and freezes ------------------------------------------------------------------------------------------------


def users_of_two_partitions() -> tuple[str, str]:
    """A user in another partition than the ordering key's, and one in that."""
    home = partition_of("default", "k", PARTITIONS)
    names = [f"user{number}" for number in range(50)]
    foreign = next(name for name in names if partition_of("default", encode_token(name), PARTITIONS) != home)
    return foreign, next(name for name in names if partition_of("default", encode_token(name), PARTITIONS) == home)


async def test_a_cancel_between_the_partitions_of_an_event_leaves_each_user_one_record_sent_or_cancelled(
    nats_server: NatsServer, valkey: Valkey, broker: Broker, tmp_path: Path
) -> None:
    sent, late = users_of_two_partitions()
    with dispatcher_processes(tmp_path, nats_server.url, valkey.url) as (first, second):
        first.start(fail_point="between-foreign-and-home")
        await publish(broker, to=[sent, late], type="demo.x", id="e1", transaction_id="t", key="k")
        await eventually(lambda: first.exit_code == -9)
        await cancel(broker, "default", "t", budget_seconds=5)
        second.start()
        await eventually(lambda: at_least(broker, 2))
        await publish(broker, to=[sent, late], type="demo.x", id="e2", key="k")
        await eventually(lambda: at_least(broker, 4))
    found = {(one.id, one.user): one.record["plan"]["inapp"]["why"] for one in await all_records(broker, PARTITIONS)}
    cancelled = {("e1", sent): "default", ("e1", late): "cancelled"}
    assert found == cancelled | {("e2", sent): "default", ("e2", late): "default"}


@pytest.mark.parametrize("frozen", ["after-claims-before-append", "before-append"])
async def test_a_dispatcher_that_was_frozen_heeds_what_was_cancelled_meanwhile_be_it_before_its_last_look_or_after(
    nats_server: NatsServer, valkey: Valkey, broker: Broker, tmp_path: Path, frozen: str
) -> None:
    with dispatcher_processes(tmp_path, nats_server.url, valkey.url, 1) as (only,):
        only.start(fail_point=f"{frozen}:1:stop")
        await publish(broker, to=["alice"], type="demo.x", id="e1", transaction_id="t")
        await eventually(lambda: only.suspended)
        await cancel(broker, "default", "t", budget_seconds=5)
        await asyncio.sleep(1.1)  # its view is too old now to be acted upon: this is what the test is about
        only.resume()
        [record] = await eventually(lambda: all_records(broker, PARTITIONS))
    assert record.record["plan"] == {"inapp": {"when": "never", "why": "cancelled"}}


async def at_least(broker: Broker, count: int) -> bool:
    return len(await all_records(broker, PARTITIONS)) >= count


# --- expiry -----------------------------------------------------------------------------------------------------------


async def test_an_event_that_is_over_when_it_is_dispatched_becomes_a_record_that_nobody_is_shown(
    house: TestGateway,
) -> None:
    over = datetime.now(UTC) - timedelta(seconds=1)
    await publish(house.broker, to=["alice"], type="demo.x", id="former", collapse_key="k")
    await publish(house.broker, to=["alice"], type="demo.x", id="over", expires_at=over, collapse_key="k")
    await publish(house.broker, to=["alice"], type="demo.x", id="e2")
    async with house.device() as device:
        frames = await device.records(3)
    assert [frame["op"] for frame in frames] == ["record", "skip", "record"]
    await shows(house, ["e2", "former"])
    assert await unread(house, frames[-1]["seq"]) == 2, "what nobody saw supersedes nothing"
    _, answer = await trace(house, "over", token("alice"))
    facts = {fact["fact"]: fact.get("detail") for fact in answer["proofs"][0]["facts"]}
    assert facts["planned"] == "never, because: expired"
    assert "expired" in facts


async def test_a_record_is_shown_before_it_expires_and_not_replayed_after(house: TestGateway) -> None:
    for user, seconds in (("alice", 1.5), ("bob", 6), ("carol", 20)):  # a slow machine may need longer to show it
        async with house.device(user) as device:
            await device.until("live")
            soon = datetime.now(UTC) + timedelta(seconds=seconds)
            later = datetime.now(UTC) + timedelta(hours=1)
            for id, at, key in (("soon", soon, None), ("key", soon, "k"), ("later", later, None)):
                await publish(house.broker, to=[user], type="demo.x", id=id, expires_at=at, collapse_key=key)
            live = await device.records(3)
        if all(frame["op"] == "record" for frame in live):
            break
    assert [frame["record"]["id"] for frame in live] == ["soon", "key", "later"]
    await asyncio.sleep(max(0.0, (soon - datetime.now(UTC)).total_seconds() + 0.01))
    # The one with a collapse key supersedes others still, so devices must see it, and leave it out themselves.
    wanted = ["skip", "record", "record"]
    async with house.device(user) as device:
        frames = await device.records(3)
        assert [frame["op"] for frame in frames] == wanted
        assert [(f["seq"], f["prev"]) for f in frames] == [(f["seq"], f["prev"]) for f in live]
    asked, headers = {"device": "poll", "cursor": "start"}, {"Authorization": f"Bearer {token(user)}"}
    async with house.http.get(f"{house.url}/v1/records", params=asked, headers=headers) as answer:
        assert [frame["op"] for frame in json.loads(await answer.read())["records"]] == wanted

    async def only_later() -> bool:
        async with house.http.get(f"{house.url}/v1/inbox", headers=headers) as answer:
            return [item["id"] for item in (await answer.json())["items"]] == ["later"]

    await eventually(only_later)

    async def counted() -> bool:
        async with house.device(user, name="other", cursor=None) as device:
            return ((await device.until("ready")).get("unread") or {}).get("count") == 1

    await eventually(counted)
