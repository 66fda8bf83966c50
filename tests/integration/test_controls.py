"""Controls on real servers: two operators, every process within a second, a log of who and why, and what each of them stops."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from engine.broker.jetstream import Broker
from engine.controls.changing import Asked
from engine.controls.document import Control, Kill, Pause, Rehydrate, Throttle
from engine.controls.log import KEPT_DAYS, last, write_to
from engine.controls.store import ChangedMeanwhile, ControlStore
from engine.controls.watching import watched_controls
from engine.dispatch.claims import Claims
from engine.dispatch.dispatcher import Dispatcher
from engine.dispatch.source import EVENTS
from engine.errors import TopologyError
from engine.topology import server as topology
from gateway.access.key_table import KeyTable
from ops.dev.servers import NatsServer, Valkey
from tests.integration.test_events_api import EVENT, add_key, post, with_keys
from tests.support.gateways import PARTITIONS, TestGateway, gateway_on
from tests.support.logs import FAST, PIN_TIMEOUT_SECONDS, all_records, at_work, connected, eventually, publish, redis_at

SOON_SECONDS = 20.0
"""A second is what is promised (ADR 0039 says what was measured); a machine that runs other tests as well may need longer."""

PUSH = Kill(channel="push")


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


async def change(
    broker: Broker,
    target: Control | Rehydrate,
    *,
    who: str = "ops",
    restore: bool = False,
    percent: int | None = None,
) -> int:
    return (await ControlStore(broker).change(Asked(target, who, "outage", restore, percent))).version


# --- two operators -------------------------------------------------------------------------------------------------------


async def test_changes_of_different_controls_at_once_are_all_made(broker: Broker) -> None:
    targets = [Throttle("acme", number) for number in range(1)] + [Kill(category=f"c{number}") for number in range(5)]
    await asyncio.gather(*(change(broker, target) for target in targets))
    document, version = await ControlStore(broker).read()
    assert {each.control for each in document.controls} == set(targets)
    assert [each.number for each in document.changes] == list(range(1, 7))
    assert version >= 6


async def test_of_two_operators_who_change_one_control_at_once_the_second_is_told_who_was_first(broker: Broker) -> None:
    modes = ["hold", "drop"] * 2
    made = await asyncio.gather(
        *(change(broker, Kill(channel="push", mode=mode), who=f"ops-{mode}") for mode in modes),  # type: ignore[arg-type]
        return_exceptions=True,
    )
    refused = [each for each in made if isinstance(each, ChangedMeanwhile)]
    assert all("last changed by ops-" in str(each) for each in refused)
    changes = (await ControlStore(broker).read()).document.changes
    assert len(changes) + len(refused) == 4
    # Who was not refused has seen what the one before had made.
    assert [each.before for each in changes] == [None, *(each.after for each in changes[:-1])]


async def test_of_operators_who_have_seen_the_same_version_one_changes_something(broker: Broker) -> None:
    asked = [Asked(Kill(category=f"c{number}"), "ops", "outage") for number in range(4)]
    made = await asyncio.gather(
        *(ControlStore(broker).change(each, version=0) for each in asked), return_exceptions=True
    )
    assert sum(isinstance(each, ChangedMeanwhile) for each in made) == 3
    assert len((await ControlStore(broker).read()).document.changes) == 1


async def test_a_change_for_a_version_that_is_gone_changes_nothing(broker: Broker) -> None:
    version = await change(broker, PUSH)
    await change(broker, Kill(channel="sms"))
    with pytest.raises(ChangedMeanwhile, match=str(version + 1)):
        await ControlStore(broker).change(Asked(PUSH, "ops", "why", restore=True), version=version)
    assert len((await ControlStore(broker).read()).document.controls) == 2


async def test_controls_of_a_newer_version_are_not_overwritten(broker: Broker) -> None:
    await broker.append("$KV.control.controls.document", b'{"controls":[{"control":{"kind":"newer"}}]}')
    with pytest.raises(TopologyError, match="version"):
        await change(broker, PUSH)


# --- every process ---------------------------------------------------------------------------------------------------------


async def test_a_process_hears_of_a_change_within_a_second_and_knows_no_older_one_as_new(
    broker: Broker, nats_server: NatsServer
) -> None:
    await change(broker, PUSH)
    heard: list[tuple[float, list[str]]] = []
    async with connected(nats_server.url) as far, watched_controls(far) as watched:
        assert watched.not_ready() == ["controls are not known yet: the control bucket was not read"]
        watched.on_change.append(lambda _, new: heard.append((time.monotonic(), [each.action for each in new])))
        await eventually(lambda: not watched.not_ready())
        assert watched.controls.verdict("acme", "push", None, None).effect == "hold"
        assert [new for _, new in heard] == [[]]
        before = time.monotonic()
        await change(broker, PUSH, restore=True)
        await eventually(lambda: len(heard) == 2)
        assert heard[1][0] - before < SOON_SECONDS
        assert heard[1][1] == ["restore"]
        assert watched.controls.verdict("acme", "push", None, None).effect == "go"


async def test_a_process_that_cannot_read_the_bucket_goes_on_as_before_and_says_so(
    broker: Broker, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.controls.watching.OLD_SECONDS", 0.8)
    await change(broker, PUSH)
    async with watched_controls(broker) as watched:
        await eventually(lambda: not watched.not_ready())
        nats_server.kill()
        await eventually(watched.not_ready)
        assert "controls are" in watched.not_ready()[0]
        assert watched.controls.verdict("acme", "push", None, None).effect == "hold"
        nats_server.start()
        await eventually(lambda: not watched.not_ready())


async def test_a_document_that_cannot_be_read_takes_no_control_off(broker: Broker) -> None:
    version = await change(broker, PUSH)
    async with watched_controls(broker) as watched:
        await eventually(lambda: not watched.not_ready())
        await broker.append("$KV.control.controls.document", b'{"controls":7}')
        await eventually(watched.not_ready)
        assert "newer version" in watched.not_ready()[0]
        assert watched.controls.verdict("acme", "push", None, None).effect == "hold"
    assert version > 0


async def test_a_paused_lane_holds_its_source_up_and_nothing_is_lost_when_it_goes_on(
    broker: Broker, nats_server: NatsServer, valkey: Valkey
) -> None:
    await change(broker, Pause("bulk"))
    async with redis_at(valkey.url) as redis, watched_controls(broker) as watched:
        await eventually(lambda: not watched.not_ready())
        dispatcher = Dispatcher(
            broker,
            Claims(redis),
            PARTITIONS,
            sources=(EVENTS._replace(lane="bulk"),),
            controls=watched,
            pin_timeout_seconds=PIN_TIMEOUT_SECONDS,
        )
        async with at_work(dispatcher.run(), "dispatcher"):
            for number in range(20):
                await publish(broker, id=f"e{number}", to=["alice"], type="demo.hello")
            await asyncio.sleep(3 * PIN_TIMEOUT_SECONDS)  # longer than a standby would wait for the pin
            assert await all_records(broker, PARTITIONS) == []
            before = time.monotonic()
            await change(broker, Pause("bulk"), restore=True)
            first = await eventually(lambda: all_records(broker, PARTITIONS))
            assert time.monotonic() - before < 2 * SOON_SECONDS
            assert first[0].id == "e0"

            async def all_there() -> list[Any]:
                found = await all_records(broker, PARTITIONS)
                return found if len(found) == 20 else []

            assert [each.id for each in await eventually(all_there)] == [f"e{number}" for number in range(20)]


async def test_another_lane_holds_nothing_up(broker: Broker, nats_server: NatsServer, valkey: Valkey) -> None:
    for pause in (Pause("normal"), Pause("bulk", "push"), Pause("bulk")):
        await change(broker, pause)
    async with redis_at(valkey.url) as redis, watched_controls(broker) as watched:
        await eventually(lambda: not watched.not_ready())
        dispatcher = Dispatcher(
            broker, Claims(redis), PARTITIONS, controls=watched, pin_timeout_seconds=PIN_TIMEOUT_SECONDS
        )
        async with at_work(dispatcher.run(), "dispatcher"):
            await publish(broker, id="e1", to=["alice"], type="demo.hello")
            assert await eventually(lambda: all_records(broker, PARTITIONS))


# --- the door --------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def throttled(
    nats: NatsServer, postgres: str, valkey: Valkey, throttle: Throttle
) -> AsyncIterator[tuple[TestGateway, TestGateway]]:
    """Two gateways that have heard of a throttle."""
    async with with_keys(nats, postgres, redis_url=valkey.url) as first:
        await change(first.broker, throttle)
        async with gateway_on(nats, postgres_url=postgres, redis_url=valkey.url, topology_ready=True) as second:
            for each in (first, second):
                await eventually(lambda each=each: each.context.controls.document.controls)
            yield first, second


async def test_a_throttled_tenant_is_told_when_to_come_back_whichever_gateway_it_asks(
    patient: None, nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with throttled(nats_server, postgres, valkey, Throttle("acme", 1, "order.*")) as gateways:
        statuses = [(await post(gateways[n % 2], {**EVENT, "id": f"e{n}"}))[0] for n in range(6)]
        assert statuses == [202, 429, 429, 429, 429, 429]
        headers = {"Authorization": "Bearer sk_test_0123456789"}
        async with gateways[0].http.post(f"{gateways[0].url}/v1/events", json=EVENT, headers=headers) as response:
            problem = await response.json(content_type=None)
            assert (response.status, problem["code"]) == (429, "throttled")
            assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert (await post(gateways[1], {**EVENT, "id": "c1", "type": "chat.message"}))[0] == 202
        assert (await gateways[0].broker.stream("EVENTS")).messages == 2


async def test_the_events_of_a_minute_may_come_at_once(
    patient: None, nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with throttled(nats_server, postgres, valkey, Throttle("acme", 2)) as gateways:
        statuses = [(await post(gateways[n % 2], {**EVENT, "id": f"e{n}"}))[0] for n in range(4)]
        assert statuses == [202, 202, 429, 429]


async def test_in_a_bulk_request_each_event_is_throttled_for_itself_and_order_is_kept(
    patient: None, nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with throttled(nats_server, postgres, valkey, Throttle("acme", 0, "promo")) as (gateway, _):
        events = [
            {**EVENT, "id": "e1"},
            {**EVENT, "id": "e2", "type": "promo"},
            {**EVENT, "id": "e3"},
            {**EVENT, "id": "e4", "to": ["bob"]},
        ]
        _, answer = await post(gateway, {"events": events}, path="/v1/events/bulk")
        codes = [result.get("error", {}).get("code") for result in answer["results"]]
        assert codes == [None, "throttled", "unavailable", None]


async def test_while_redis_is_away_a_throttle_holds_in_each_process(
    nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    async with throttled(nats_server, postgres, valkey, Throttle("acme", 1)) as (gateway, _):
        valkey.kill()
        statuses = [(await post(gateway, {**EVENT, "id": f"e{number}"}))[0] for number in range(4)]
        assert statuses == [202, 429, 429, 429]


async def test_a_throttle_counts_events_that_are_never_stored_as_well(
    patient: None, nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    await add_key(postgres, "sk_broadcasts", ["broadcasts:write"], "acme")
    async with throttled(nats_server, postgres, valkey, Throttle("acme", 0)) as (gateway, _):
        status, problem = await post(gateway, {**EVENT, "semantics": "at_most_once"})
        assert (status, problem["code"]) == (429, "throttled")
        headers = {"Authorization": "Bearer sk_broadcasts"}
        async with gateway.http.post(f"{gateway.url}/v1/broadcasts", json={"type": "a.b"}, headers=headers) as response:
            assert (response.status, (await response.json(content_type=None))["code"]) == (429, "throttled")


async def test_a_throttle_ends_soon_after_it_was_restored(
    patient: None, nats_server: NatsServer, postgres: str, valkey: Valkey
) -> None:
    stopped = Throttle("acme", 0)
    async with throttled(nats_server, postgres, valkey, stopped) as (gateway, _):
        assert (await post(gateway, EVENT))[0] == 429
        before = time.monotonic()
        await change(gateway.broker, stopped, restore=True)

        async def taken() -> bool:
            return (await post(gateway, EVENT))[0] == 202

        await eventually(taken)
        assert time.monotonic() - before < SOON_SECONDS


# --- devices -----------------------------------------------------------------------------------------------------------------


async def test_rehydrated_devices_get_a_snapshot_and_then_every_record_as_before(nats_server: NatsServer) -> None:
    async with (
        gateway_on(nats_server) as gateway,
        gateway.device("alice") as alice,
        gateway.device("bob") as bob,
        gateway.device("alice", tenant="globex") as stranger,
    ):
        await gateway.append("alice", 3)
        await alice.records(3)
        for device in (bob, stranger):
            await device.until("live")
        await eventually(lambda: not gateway.context.controls.not_ready())
        before = time.monotonic()
        await change(gateway.broker, Rehydrate("default", "alice"))
        reset = await alice.until("reset")
        assert time.monotonic() - before < SOON_SECONDS
        assert reset["reason"] == "snapshot"
        assert [frame["record"]["id"] for frame in await alice.records(3)] == ["r0", "r1", "r2"]
        await gateway.append("alice", 1)
        [fourth] = await alice.records(1)
        assert fourth["record"]["id"] == "r0"
        await change(gateway.broker, Rehydrate("default"))
        await alice.until("reset")
        await bob.until("reset")
        await stranger.say("ping")
        assert (await stranger.until("pong"))["op"] == "pong"
        assert "reset" not in [frame["op"] for frame in stranger.frames]


# --- the log -----------------------------------------------------------------------------------------------------------------


async def rows(url: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return await last(connection, 50)
    finally:
        await connection.close()


async def test_each_change_has_one_row_however_many_gateways_write_it(nats_server: NatsServer, postgres: str) -> None:
    async with (
        gateway_on(nats_server, postgres_url=postgres) as gateway,
        gateway_on(nats_server, postgres_url=postgres, topology_ready=True),
    ):
        await change(gateway.broker, PUSH, who="ann")
        await change(gateway.broker, PUSH, restore=True, percent=10, who="ben")

        async def logged() -> list[Any]:
            found = await rows(postgres)
            return found if len(found) == 2 else []

        newest, oldest = await eventually(logged)
        assert (oldest.action, oldest.who, oldest.why, oldest.before) == ("kill", "ann", "outage", None)
        assert json.loads(bytes(oldest.after)) == {"kind": "kill", "channel": "push"}
        assert (newest.action, newest.who, newest.number) == ("restore", "ben", 2)
        assert json.loads(bytes(newest.after)) == {"kind": "kill", "channel": "push", "percent": 10}


async def test_a_change_made_while_postgresql_is_away_gets_its_row_later(
    nats_server: NatsServer, postgres: str
) -> None:
    admin = await asyncpg.connect(postgres)
    try:
        await admin.execute("ALTER TABLE control_log RENAME TO gone")
        async with gateway_on(nats_server, postgres_url=postgres) as gateway:
            await change(gateway.broker, PUSH)
            await eventually(lambda: gateway.context.controls.document.controls)
            await admin.execute("ALTER TABLE gone RENAME TO control_log")
            await eventually(lambda: rows(postgres))
    finally:
        await admin.close()


async def test_rows_leave_the_log_when_nobody_looks_for_them_any_more(broker: Broker, postgres: str) -> None:
    await change(broker, PUSH)
    changes = (await ControlStore(broker).read()).document.changes
    await write_to(postgres, changes)
    admin = await asyncpg.connect(postgres)
    try:
        await admin.execute("UPDATE control_log SET id = 'old', at = now() - make_interval(days => $1)", KEPT_DAYS + 1)
        await write_to(postgres, changes)
        assert [row.id for row in await rows(postgres)] == [changes[0].id]
    finally:
        await admin.close()


# --- over HTTP ---------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def operated(nats: NatsServer, postgres: str) -> AsyncIterator[tuple[TestGateway, str]]:
    """A gateway, and the API key of an operator."""
    connection = await asyncpg.connect(postgres, timeout=20)
    try:
        key = (await KeyTable(connection).create(None, [])).key
    finally:
        await connection.close()
    async with with_keys(nats, postgres) as gateway:

        async def ready() -> bool:
            return (await asked(gateway, key))[0] == 200

        await eventually(ready)
        yield gateway, key


async def asked(gateway: TestGateway, key: str, body: Any = None, query: str = "") -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}"}
    method = "GET" if body is None else "POST"
    url = f"{gateway.url}/v1/controls{query}"
    async with gateway.http.request(method, url, json=body, headers=headers) as response:
        answer: dict[str, Any] = await response.json(content_type=None)
        return response.status, answer


async def test_an_operator_sets_and_restores_controls_over_http(
    patient: None, nats_server: NatsServer, postgres: str
) -> None:
    async with operated(nats_server, postgres) as (gateway, key):
        assert await asked(gateway, key) == (200, {"version": 0, "controls": [], "changes": []})
        order = {"control": {"kind": "kill", "channel": "push"}, "why": "fcm is down"}
        status, shown = await asked(gateway, key, order)
        assert status == 200
        [inforce] = shown["controls"]
        assert inforce["control"] == {"kind": "kill", "channel": "push"}
        assert (inforce["why"], inforce["who"][:8]) == ("fcm is down", "api-key ")
        conflict = await asked(gateway, key, order, f"?version={shown['version'] - 1}")
        assert (conflict[0], conflict[1]["code"]) == (409, "version_conflict")
        step = {"control": {**order["control"], "percent": 50}, "why": "better", "restore": True}  # type: ignore[dict-item]
        _, shown = await asked(gateway, key, step, f"?version={shown['version']}")
        assert shown["controls"][0]["control"]["percent"] == 50
        nobody = {"control": {**order["control"], "percent": 0}, "why": "no", "restore": True}  # type: ignore[dict-item]
        status, problem = await asked(gateway, key, nobody)
        assert (status, problem["field"]) == (400, "control.percent"), (
            "0 is a number that was said: it lets nobody through"
        )
        whole = {**order, "restore": True}
        assert (await asked(gateway, key, whole))[1]["controls"] == []


NO_CONTROLS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"kind": "kill"}, "control.tenant"),
    ({"kind": "kill", "channel": "pusj"}, "control.channel"),
    ({"kind": "kill", "chanel": "push", "tenant": "acme"}, "chanel"),
    ({"kind": "throttle", "tenant": "acme", "per_minute": -1}, "control.per_minute"),
    ({"kind": "pause", "lane": "fast"}, "control.lane"),
    ({"kind": "stop"}, "control"),
)


async def test_a_control_that_cannot_be_obeyed_is_refused_with_the_field(
    patient: None, nats_server: NatsServer, postgres: str
) -> None:
    async with operated(nats_server, postgres) as (gateway, key):
        for control, field in NO_CONTROLS:
            status, problem = await asked(gateway, key, {"control": control, "why": "x"})
            assert (status, problem["code"]) == (400, "invalid_body")
            assert field in problem["field"]
        assert (await asked(gateway, key))[1]["version"] == 0


async def test_services_and_users_change_no_controls(patient: None, nats_server: NatsServer, postgres: str) -> None:
    async with operated(nats_server, postgres) as (gateway, _):
        assert (await asked(gateway, "sk_test_0123456789"))[0] == 403
        order = {"control": {"kind": "kill", "channel": "push"}, "why": "x"}
        assert (await asked(gateway, "sk_test_0123456789", order))[0] == 403
        assert (await ControlStore(gateway.broker).read()).version == 0
