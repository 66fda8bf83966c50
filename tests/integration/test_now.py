"""Now messages and broadcasts: who is connected is shown them, nothing is stored, and nobody else is slowed down by them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from engine.broker.jetstream import NatsSettings
from engine.dispatch.relay import relaying
from engine.limits import NOW_BURST_SECONDS, NOW_PER_SECOND_OF_TENANT
from gateway.limits import BROADCAST_BURST
from ops.dev.servers import NatsServer
from seamark import Now, Publisher, PublishFailed, PublishRefused, connect
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.limits import NOW_BYTES_MAX
from tests.integration.test_events_api import KEY, add_key, post, with_keys
from tests.support.gateways import PARTITIONS, Device, TestGateway, gateway_on
from tests.support.logs import eventually
from tests.support.tokens import token

TYPING = "now.default.alice.chat.typing"


@asynccontextmanager
async def relayed(nats: NatsServer) -> AsyncIterator[TestGateway]:
    """A gateway, and a relay as a dispatcher has it."""
    async with gateway_on(nats) as gateway, relaying(NatsSettings(nats.url), PARTITIONS):
        yield gateway


@asynccontextmanager
async def listening(
    gateway: TestGateway, user: str = "alice", tenant: str = "default", **more: Any
) -> AsyncIterator[Device]:
    """A device that has caught up and takes now messages."""
    async with gateway.socket() as device:
        hello = {"token": token(user, tenant), "device": "d", "cursor": "start", "capabilities": ["now"], **more}
        await device.say("hello", **hello)
        await device.until("live")
        yield device


async def test_who_is_connected_and_declares_the_capability_is_shown_a_now_message_and_nothing_is_stored(
    nats_server: NatsServer,
) -> None:
    async with relayed(nats_server) as gateway, listening(gateway) as device, gateway.device(name="old") as old:
        await old.until("live")
        seqs = await gateway.append()
        for one in (device, old):
            await one.records(1)
        # With headers that would make it a record, were they passed on.
        forged = {"Nats-Sequence": "99", "Nats-Last-Sequence": str(seqs[-1])}
        gateway.broker.publish(TYPING, b'{"id":"n1","data":{"who": "bob"},"unknown":1}', forged)
        assert await device.next() == {"op": "now", "id": "n1", "type": "chat.typing", "data": {"who": "bob"}}
        seqs += await gateway.append()
        for one in (device, old):
            record = (await one.records(1))[0]
            assert (record["seq"], record["prev"]) == (seqs[-1], seqs[-2]), "a now message moves no position"
        assert "now" not in [frame["op"] for frame in old.frames]
        for stream in ("EVENTS", "DEAD-LETTERS"):
            assert (await gateway.broker.stream(stream)).last_seq == 0
        assert (await gateway.broker.stream(gateway.stream())).last_seq == seqs[-1]


@pytest.mark.parametrize(
    ("subject", "body"),
    [
        (TYPING, b"not json"),
        (TYPING, b'{"data":"\xff"}'),
        (TYPING, b'{"id":"a b"}'),
        (TYPING, b'{"data":"%b"}' % (b"x" * NOW_BYTES_MAX)),
        (TYPING, b'{"expires_at":"2026-01-31T12:00:00Z"}'),
        (TYPING, b'{"expires_at":"2026-01-31T12:00:00"}'),
        ("now.default.al=ice.chat.typing", b"{}"),
        ("now.default.topic=3Anews.chat.typing", b"{}"),
        ("now.default.alice.chat.typ!ng", b"{}"),
        ("now.default.alice", b"{}"),
    ],
)
async def test_what_is_no_now_message_is_dropped_and_the_next_one_relayed(
    nats_server: NatsServer, subject: str, body: bytes
) -> None:
    async with relayed(nats_server) as gateway, listening(gateway) as device:
        gateway.broker.publish(subject, body)
        gateway.broker.publish(TYPING, b'{"data":7}')
        assert (await device.next())["data"] == 7


async def test_of_two_relays_one_passes_a_message_on_and_the_other_one_goes_on_when_it_ends(
    nats_server: NatsServer,
) -> None:
    async with relayed(nats_server) as gateway, listening(gateway) as device:
        async with relaying(NatsSettings(nats_server.url), PARTITIONS):
            for number in range(50):
                gateway.broker.publish(TYPING, b'{"data":%d}' % number)
            assert sorted([(await device.next())["data"] for _ in range(50)]) == list(range(50))

        async def passed_on() -> bool:
            gateway.broker.publish(TYPING, b'{"data":50}')  # the first may still go to the one that has just ended
            await gateway.broker.flush()
            return any(frame["data"] == 50 for frame in await heard(device))

        await eventually(passed_on)


async def test_a_tenant_that_floods_is_throttled_and_another_one_is_not(nats_server: NatsServer) -> None:
    burst = NOW_BURST_SECONDS * NOW_PER_SECOND_OF_TENANT
    async with (
        relayed(nats_server) as gateway,
        listening(gateway) as device,
        listening(gateway, tenant="acme") as other,
    ):
        began = time.monotonic()
        for number in range(2 * burst):
            gateway.broker.publish(TYPING, b'{"data":%d}' % number)
        gateway.broker.publish("now.acme.alice.chat.typing", b'{"data":"still"}')
        assert (await other.next())["data"] == "still"
        told = await heard(device)
        allowed = burst + (time.monotonic() - began) * NOW_PER_SECOND_OF_TENANT
        assert burst * 0.5 < len(told) <= allowed + 1


async def heard(device: Device) -> list[dict[str, Any]]:
    """The now messages that were sent to a device so far."""
    await device.say("ping")
    await device.until("pong")
    return [frame for frame in device.frames if frame["op"] == "now"]


async def test_over_http_an_at_most_once_event_is_handed_over_and_has_no_place_in_events(
    nats_server: NatsServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many at once as ever, and hardly any afterwards, however long the requests take.
    monkeypatch.setattr("gateway.api.now.NOW_PER_SECOND_OF_TENANT", 20)
    monkeypatch.setattr("gateway.api.now.NOW_BURST_SECONDS", NOW_BURST_SECONDS * NOW_PER_SECOND_OF_TENANT // 20)
    event = {"type": "chat.typing", "to": ["alice", "bob"], "data": {"in": "room"}, "semantics": "at_most_once"}
    async with with_keys(nats_server, postgres) as gateway, relaying(NatsSettings(nats_server.url), PARTITIONS):
        async with listening(gateway, tenant="acme") as alice, listening(gateway, "bob", "acme") as bob:
            status, answer = await post(gateway, {**event, "id": "n1", "category": "chat", "send_at": None})
            assert (status, answer) == (202, {"event_id": "n1", "seq": None, "duplicate": False})
            for device in (alice, bob):
                assert await device.next() == {"op": "now", "id": "n1", "type": "chat.typing", "data": {"in": "room"}}
        for field, value in (("send_at", "2030-01-31T12:00:00Z"), ("collapse_key", "k"), ("ordering_key", "k")):
            status, problem = await post(gateway, {**event, field: value})
            assert (status, problem["code"], problem["field"]) == (400, "invalid_event", field)
        status, problem = await post(gateway, {**event, "to": [f"u{n}" for n in range(101)]})
        assert (status, problem["field"]) == (400, "to")
        status, answer = await post(gateway, {"events": [event]}, path="/v1/events/bulk")
        assert answer["results"][0]["error"]["field"] == "semantics"
        hundred = {**event, "to": [f"u{n}" for n in range(100)]}
        statuses = [(await post(gateway, hundred))[0] for _ in range(40)]
        assert statuses.count(202) >= 15
        assert set(statuses) == {202, 429}
        assert (await gateway.broker.stream("EVENTS")).last_seq == 0


async def test_the_python_sdk_publishes_now_messages_and_broadcasts_and_delivers_them(
    nats_server: NatsServer, postgres: str
) -> None:
    async with with_keys(nats_server, postgres) as gateway, relaying(NatsSettings(nats_server.url), PARTITIONS):
        await add_key(postgres, "broadcaster", ["events:write", "broadcasts:write"])
        ways = ({"nats_url": nats_server.url, "tenant": "acme"}, {"gateway_url": gateway.url, "api_key": "broadcaster"})
        async with (
            asyncio.timeout(60),
            connect(gateway.url, token=token(tenant="acme"), device="d", cursor="start") as one,
        ):
            events = one.events()
            await anext(events)  # caught up
            for way in ways:
                async with Publisher(**way) as publisher:  # type: ignore[arg-type]
                    soon = datetime.now(UTC) + timedelta(minutes=1)
                    message = {"to": "alice", "type": "chat.typing", "semantics": "at_most_once", "expires_at": soon}
                    sent = await publisher.publish(data={"in": "room"}, id="n1", **message)  # type: ignore[arg-type]
                    assert (sent.event_id, sent.seq, sent.duplicate) == ("n1", None, False)
                    assert await anext(events) == Now("chat.typing", {"in": "room"}, "n1")
                    assert await publisher.broadcast(type="system.down", data={"at": 5}, id="b1") == "b1"
                    assert await anext(events) == Now("system.down", {"at": 5}, "b1")
                    with pytest.raises(InvalidEvent, match="send_at"):
                        await publisher.publish(send_at=soon, **message)  # type: ignore[arg-type]
            async with Publisher(gateway_url=gateway.url, api_key=KEY) as publisher:
                with pytest.raises(PublishRefused):
                    await publisher.broadcast(type="system.down")


async def test_a_now_message_that_cannot_be_handed_over_is_not_said_to_be(nats_server: NatsServer) -> None:
    async with Publisher(nats_url=nats_server.url) as publisher:
        nats_server.stop()
        with pytest.raises(PublishFailed):
            await publisher.publish(to="alice", type="chat.typing", semantics="at_most_once")


async def test_a_broadcast_reaches_all_sessions_of_the_tenant_on_every_carrier_and_nobody_else(
    nats_server: NatsServer, postgres: str
) -> None:
    async with with_keys(nats_server, postgres) as gateway, AsyncExitStack() as stack:
        await add_key(postgres, "broadcaster", ["broadcasts:write"])
        mine = [await stack.enter_async_context(listening(gateway, user, "acme")) for user in ("alice", "bob", "bob")]
        other = await stack.enter_async_context(listening(gateway, "alice", "default"))
        query = {"device": "s", "cursor": "start", "capabilities": "other,now"}
        bearer = {"Authorization": f"Bearer {token('eve', 'acme')}"}
        stream = await stack.enter_async_context(
            gateway.http.get(f"{gateway.url}/v1/stream", params=query, headers=bearer)
        )
        async with asyncio.timeout(40):
            while b'"live"' not in await stream.content.readuntil(b"\n\n"):
                pass
            body = {"type": "system.maintenance", "data": {"in": "5 min"}}
            status, answer = await post(gateway, body, path="/v1/broadcasts", key="broadcaster")
            frame = {"op": "now", "id": answer["id"], **body}
            assert status == 202
            for device in mine:
                assert await device.next() == frame
            sse = await stream.content.readuntil(b"\n\n")
        assert json.loads(sse.removeprefix(b"data: ")) == frame
        gateway.broker.publish("broadcast.default.system.hello", b"{}")
        assert (await other.next())["type"] == "system.hello", "and so nothing came before it"
        assert (await post(gateway, body, path="/v1/broadcasts"))[1]["code"] == "forbidden"
        status, problem = await post(gateway, {"type": "no good"}, path="/v1/broadcasts", key="broadcaster")
        assert (status, problem["code"], problem["field"]) == (400, "invalid_body", "type")


async def test_broadcasts_beyond_a_tenants_rate_are_dropped_whoever_publishes_them(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.session.broadcasts.BROADCASTS_PER_MINUTE", 1)
    async with (
        gateway_on(nats_server) as gateway,
        listening(gateway) as device,
        listening(gateway, tenant="acme") as other,
    ):
        for number in range(3 * BROADCAST_BURST):
            gateway.broker.publish("broadcast.default.system.hello", b'{"data":%d}' % number)
        gateway.broker.publish("broadcast.acme.system.hello", b"{}")
        assert (await other.next())["op"] == "now"  # and so all that came before it has been sent, or dropped
        assert [frame["data"] for frame in await heard(device)] == list(range(BROADCAST_BURST))
