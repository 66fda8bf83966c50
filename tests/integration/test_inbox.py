"""The inbox over HTTP, snapshots, known devices and proofs, on real servers with dispatcher, projector and gateway."""

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from yarl import URL

from engine.broker.jetstream import Broker
from engine.topology import server as topology
from gateway.access.key_table import KeyTable
from gateway.access.principals import Scope
from seamark.protocol.close_codes import TABLE
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import FAST, connected, dispatching, eventually, publish
from tests.support.patience import wait_for_stores
from tests.support.tables import projecting_tables
from tests.support.tokens import bearer, token

PARTITIONS = 4
PHONE = bearer()


@pytest.fixture
async def house(nats_server, valkey, postgres, monkeypatch) -> AsyncIterator[TestGateway]:
    wait_for_stores(monkeypatch)
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
    options: dict[str, Any] = {"postgres_url": postgres, "redis_url": valkey.url}
    async with (
        dispatching(nats_server.url, valkey.url),
        projecting_tables(nats_server.url, valkey.url, postgres),
        gateway_on(nats_server, topology_ready=True, **options) as gateway,
    ):
        yield gateway


async def inbox(gateway: TestGateway, **query: Any) -> dict[str, Any]:
    async with gateway.http.get(f"{gateway.url}/v1/inbox", params=query, headers=PHONE) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def mark(gateway: TestGateway, kind: str, **body: Any) -> dict[str, Any]:
    body = {"device": "phone", **body}
    async with gateway.http.post(f"{gateway.url}/v1/inbox/{kind}", json=body, headers=PHONE) as answer:
        assert answer.status == 202, await answer.text()
        return await answer.json()


async def publish_some(broker: Broker, count: int, **event: Any) -> None:
    for number in range(count):
        await publish(broker, **{"to": ["alice"], "type": "demo.hello", "id": f"e{number}", **event})


async def unread(gateway: TestGateway, count: int) -> None:
    """Wait until so many of alice's notifications are counted: the inbox and the count are folded by themselves."""

    async def check() -> bool:
        counts = gateway.context.partitions[gateway.partition()].counts
        return [one.count for one in await counts.read(["default.alice"])] == [count]

    await eventually(check)


def shows(gateway: TestGateway, ids: list[str], **query: Any):
    async def check() -> bool:
        return [item["id"] for item in (await inbox(gateway, **query))["items"]] == ids

    return eventually(check)


async def test_pages_are_newest_first_and_fit_together(house: TestGateway) -> None:
    await publish_some(house.broker, 7)
    await shows(house, [f"e{n}" for n in range(6, -1, -1)])
    found, cursor = [], None
    while True:
        page = await inbox(house, limit=3, **({"cursor": cursor} if cursor else {}))
        found += [item["id"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert found == [f"e{n}" for n in range(6, -1, -1)]


async def test_a_page_of_large_rows_ends_early_and_the_next_one_goes_on(house: TestGateway) -> None:
    ids = [f"e{n}" for n in range(12)]
    await publish_some(house.broker, 12, data="x" * 250_000)
    found, sizes, cursor = [], [], None
    await eventually(lambda: counted(house, len(ids)))
    while True:
        page = await inbox(house, **({"cursor": cursor} if cursor else {}))
        found += [item["id"] for item in page["items"]]
        sizes.append(len(page["items"]))
        cursor = page["next"]
        if cursor is None:
            break
    assert found == ids[::-1]
    assert sizes == [5, 5, 2]


async def counted(gateway: TestGateway, count: int) -> bool:
    """Whether the inbox has so many rows, over all pages."""
    found, cursor = 0, None
    while True:
        page = await inbox(gateway, limit=2, **({"cursor": cursor} if cursor else {}))
        found, cursor = found + len(page["items"]), page["next"]
        if cursor is None:
            return found == count


async def test_reading_and_archiving_by_id_position_and_filter_shows_everywhere(house: TestGateway) -> None:
    await publish_some(house.broker, 3)
    await publish(house.broker, to=["alice"], type="order.shipped", id="o1", category="orders")
    await shows(house, ["o1", "e2", "e1", "e0"])
    await mark(house, "read", ids=["e1"])
    await shows(house, ["o1", "e2", "e0"], unread="true")
    await mark(house, "archive", ids=["e0"])
    await shows(house, ["e0"], archived="true")
    assert (await mark(house, "read", filter={"category": "orders"}))["count"] == 1
    await shows(house, ["e2"], unread="true")
    await shows(house, ["o1"], type="order.*")
    await shows(house, ["o1"], category="orders")
    await mark(house, "read", all=True)
    await shows(house, [], unread="true")
    await shows(house, ["o1", "e2", "e1", "e0"], archived="any")


async def test_a_reset_brings_the_rows_and_goes_on_exactly_behind_them(house: TestGateway) -> None:
    await publish_some(house.broker, 3)
    await shows(house, ["e2", "e1", "e0"])
    await unread(house, 3)
    async with house.device(cursor=None, name="fresh") as device:
        reset = await device.until("reset")
        assert [row["id"] for row in reset["inbox"]] == ["e2", "e1", "e0"]
        assert reset["unread"]["count"] == 3
        await device.until("live")
        await publish(house.broker, to=["alice"], type="demo.hello", id="later")
        [record] = await device.records(1)
        assert record["record"]["id"] == "later"
        assert [frame["op"] for frame in device.frames if frame["op"] == "record"] == ["record"]


async def test_a_known_device_without_a_cursor_goes_on_where_it_has_acknowledged(
    house: TestGateway, postgres: str
) -> None:
    await publish_some(house.broker, 4)
    async with house.device(cursor="start") as device:
        records = await device.records(4)
        await device.say("ack", cursor=records[1]["cursor"])
        epoch, seq = records[1]["cursor"].split(".")
        connection = await asyncpg.connect(postgres)
        known = "SELECT count(*) FROM device_cursors WHERE device = 'phone' AND seq = $1 AND epoch = $2"
        await eventually(lambda: connection.fetchval(known, int(seq), epoch))
        await connection.close()
    async with house.device(cursor=None) as device:
        ready = await device.until("ready")
        assert ready["resumed"]
        assert ready["cursor"] == records[1]["cursor"]
        assert [frame["record"]["id"] for frame in await device.records(2)] == ["e2", "e3"]


async def test_a_device_that_has_lost_what_it_showed_gets_a_snapshot_though_it_holds_a_cursor(
    house: TestGateway,
) -> None:
    await publish_some(house.broker, 3)
    await shows(house, ["e2", "e1", "e0"])
    await unread(house, 3)
    async with house.device() as device:
        held = (await device.records(3))[-1]["cursor"]
        await device.say("ack", cursor=held)

    def is_whole(reset: dict[str, Any]) -> bool:
        assert (reset["op"], reset["reason"], reset["cursor"]) == ("reset", "snapshot", held)
        assert [row["id"] for row in reset["inbox"]] == ["e2", "e1", "e0"]
        return bool(reset["unread"]["count"] == 3)

    async with house.socket() as device:
        await device.say("hello", token=token(), device="phone", cursor=held, snapshot=True)
        ready = await device.next()
        assert (ready["op"], ready["cursor"], ready["reason"], ready["resumed"]) == ("ready", None, "snapshot", False)
        assert is_whole(await device.next())
        assert (await device.until("live"))["cursor"] == held
    asked = {"device": "phone", "cursor": held, "snapshot": "true"}
    async with house.http.get(f"{house.url}/v1/records", params=asked, headers=PHONE) as answer:
        assert is_whole((await answer.json())["reset"])
    async with house.http.get(f"{house.url}/v1/stream", params=asked, headers=PHONE) as answer:
        assert b'"reason":"snapshot"' in await answer.content.readuntil(b"\n\n")
        event = await answer.content.readuntil(b"\n\n")
        assert is_whole(json.loads(event.split(b"data: ")[1]))
    again = {**PHONE, "Last-Event-ID": held}  # a browser that reconnects repeats the query
    async with house.http.get(f"{house.url}/v1/stream", params=asked, headers=again) as answer:
        assert b'"resumed":true' in await answer.content.readuntil(b"\n\n")
    for way in ("records", "stream"):
        wrong = {**asked, "snapshot": "yes"}
        async with house.http.get(f"{house.url}/v1/{way}", params=wrong, headers=PHONE) as answer:
            assert (answer.status, (await answer.json())["field"]) == (400, "snapshot")


async def test_a_device_for_which_too_many_wait_comes_back_and_is_never_told_that_its_inbox_is_empty(
    house: TestGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish_some(house.broker, 2)
    await shows(house, ["e1", "e0"])
    monkeypatch.setattr("gateway.stores.tables.WAITING_MAX", 0)
    for hello in ({}, {"snapshot": True}):
        async with house.socket() as device:
            await device.say("hello", token=token(), device="phone", **hello)
            code, _ = await device.closed()
            assert code == 1013
            assert next(row for row in TABLE if row.code == code).reconnect
            assert [frame["op"] for frame in device.frames] == ["error"]
    async with house.http.get(f"{house.url}/v1/records", params={"device": "phone"}, headers=PHONE) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")


async def trace(gateway: TestGateway, id: str, bearer: str, **query: str) -> tuple[int, Any]:
    url = f"{gateway.url}/v1/notifications/{id}/trace"
    async with gateway.http.get(url, params=query, headers={"Authorization": f"Bearer {bearer}"}) as answer:
        return answer.status, await answer.json()


async def test_a_user_whose_name_no_table_can_hold_is_nobody_and_costs_the_others_nothing(house: TestGateway) -> None:
    async with house.device(user="nul\0", cursor=None) as device:
        assert (await device.closed())[0] == 4401
    assert house.context.tables is not None
    assert house.context.tables._away_until == 0.0


async def test_a_proof_orders_what_is_known_and_names_what_is_not(house: TestGateway, postgres: str) -> None:
    await publish(house.broker, to=["alice", "bob"], type="demo.hello", id="e1")
    await shows(house, ["e1"])
    async with house.device() as device:
        [record] = await device.records(1)
        await device.say("ack", cursor=record["cursor"])
        await device.say("read", ids=["e1"])

        async def proven() -> Any:
            _, answer = await trace(house, "e1", token())
            facts = [fact["fact"] for fact in answer["proofs"][0]["facts"]]
            return facts == ["emitted", "stored", "dispatched", "planned", "sent", "acknowledged", "read"] and answer

        answer = await eventually(proven)
    proof = answer["proofs"][0]
    assert [one["user"] for one in answer["proofs"]] == ["alice"], "a user sees nobody else"
    assert {fact.get("device") for fact in proof["facts"] if fact["fact"] in ("sent", "acknowledged", "read")} == {
        "phone"
    }
    assert [line for line in proof["not_proven"] if line.startswith(("sent", "acknowledged", "read"))] == []
    assert (await trace(house, "e1", token(), user="bob"))[0] == 403
    assert (await trace(house, "e1", token(tenant="other")))[0] == 404
    assert (await trace(house, "e1", token("operator", scope="operator")))[0] == 404, "a token speaks for one user only"

    service, other, publisher, operator = await keys_for(postgres)
    _, answer = await trace(house, "e1", service)
    assert [one["user"] for one in answer["proofs"]] == ["alice", "bob"]
    assert any(line.startswith("sent: no receipt") for line in answer["proofs"][1]["not_proven"])
    _, answer = await trace(house, "e1", service, user="bob", tenant="default")
    assert [one["user"] for one in answer["proofs"]] == ["bob"]
    assert (await trace(house, "e1", service, tenant="other"))[0] == 403
    assert (await trace(house, "e1", other))[0] == 404
    assert (await trace(house, "e1", publisher))[0] == 403
    status, problem = await trace(house, "e1", operator)
    assert (status, problem["field"]) == (400, "tenant")
    _, answer = await trace(house, "e1", operator, tenant="default")
    assert [one["user"] for one in answer["proofs"]] == ["alice", "bob"]
    async with house.http.post(f"{house.url}/v1/events", headers={"Authorization": f"Bearer {operator}"}) as refused:
        assert refused.status == 403, "an operator belongs to no tenant, and so publishes for none"


async def keys_for(postgres: str) -> list[str]:
    """Keys of a service that may read, of one of another tenant, of one that may not, and of an operator."""
    connection = await asyncpg.connect(postgres)
    try:
        table = KeyTable(connection)
        made = [
            await table.create("default", [Scope.NOTIFICATIONS_READ]),
            await table.create("other", [Scope.NOTIFICATIONS_READ]),
            await table.create("default", [Scope.EVENTS_WRITE]),
            await table.create(None, []),
        ]
    finally:
        await connection.close()
    return [one.key for one in made]


async def test_without_postgres_a_device_without_a_cursor_gets_what_the_log_holds(nats_server, postgres_server) -> None:
    gone = postgres_server.url.replace(str(postgres_server.port), "1")
    async with gateway_on(nats_server, postgres_url=gone) as gateway:
        seqs = await gateway.append(count=3)
        async with gateway.device(cursor=None) as device:
            ready = await device.until("ready")
            assert (ready["resumed"], ready["reason"]) == (False, "new")
            assert [frame["seq"] for frame in await device.records(3)] == seqs
            await device.until("live")
        assert (await gateway.http.get(f"{gateway.url}/v1/inbox", headers=PHONE)).status == 503


@pytest.mark.parametrize(
    "query", [{"cursor": "x"}, {"limit": "0"}, {"limit": "-1"}, {"unread": "yes"}, {"category": ""}]
)
async def test_a_wrong_question_names_its_field(house: TestGateway, query: dict[str, str]) -> None:
    async with house.http.get(f"{house.url}/v1/inbox", params=query, headers=PHONE) as answer:
        assert answer.status == 400
        assert (await answer.json())["field"] == next(iter(query))


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        ("read", {"filter": {"category": "a\0b"}}, "filter.category"),
        ("read", {"filter": {"type": ""}}, "filter.type"),
        ("archive", {"filter": {"type": "x" * 129}}, "filter.type"),
        ("archive", {"up_to": "nonsense"}, "cursor"),
    ],
)
async def test_a_mark_that_cannot_be_made_is_refused_and_not_to_be_tried_again(
    house: TestGateway, kind: str, body: dict[str, Any], named: str
) -> None:
    body = {"device": "phone", **body}
    async with house.http.post(f"{house.url}/v1/inbox/{kind}", json=body, headers=PHONE) as answer:
        problem = await answer.json()
        assert (answer.status, problem["code"]) == (400, "invalid_body")
        assert named in problem["detail"]


@pytest.mark.parametrize("id", ["{3F2504E0-4F89-11D3}", "a/b%2Fc?d#e"])
async def test_whatever_id_an_event_may_have_its_notification_can_be_traced(house: TestGateway, id: str) -> None:
    await publish(house.broker, to=["alice"], type="demo.hello", id=id)
    await shows(house, [id])
    url = URL(f"{house.url}/v1/notifications/{quote(id, safe='')}/trace", encoded=True)
    async with house.http.get(url, headers=PHONE) as answer:
        assert answer.status == 200, await answer.text()
        assert [proof["id"] for proof in (await answer.json())["proofs"]] == [id]
