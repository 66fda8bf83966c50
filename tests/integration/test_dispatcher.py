"""The dispatcher on a real nats-server and Valkey."""

import pytest
from prometheus_client import REGISTRY

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.log import stalls
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.subjects import encode_token, partition_of
from tests.support.logs import FAST, all_records, connected, dispatching, eventually, publish
from tests.support.overlays import QUICK_DISK

PARTITIONS = 4


async def count_records(broker: Broker) -> int:
    return len(await all_records(broker, PARTITIONS))


async def test_an_event_becomes_one_record_in_each_named_users_log(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url):
            users = ["alice", "bob@example.com", "carol", "dave", "erin", "alice"]
            ack = await publish(broker, to=users, type="demo.hello", data={"text": "hi"}, id="e1", key="room")
            await eventually(lambda: at_least(broker, 5))
            entries = await all_records(broker, PARTITIONS)
    assert sorted(entry.user for entry in entries) == ["alice", "bob@example.com", "carol", "dave", "erin"]
    for entry in entries:
        assert entry.stored.subject.split(".")[1:3] == [str(home(entry.user)), "default"]
        assert entry.record["id"] == "e1"
        assert entry.record["data"] == {"text": "hi"}
        assert entry.record["event"]["seq"] == ack.seq


async def test_publishing_an_event_again_adds_nothing_even_without_a_message_id(
    patient: None, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url):
            for key in ("alice", "alice", "other"):
                await publish(broker, deduplicated=False, to=["alice"], type="demo.hello", id="e1", key=key)
            await publish(broker, to=["alice"], type="demo.hello", id="e2")
            await publish(broker, to=["alice"], type="demo.hello", id="e3", key="other")
            await eventually(lambda: at_least(broker, 3))
            entries = await all_records(broker, PARTITIONS)
    assert sorted(entry.id for entry in entries) == ["e1", "e2", "e3"]


async def test_an_event_that_waits_for_redis_because_it_must_not_repeat_raises_the_alarm_of_a_stall(
    nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "STALL_SECONDS", 0.5)

    def stalled() -> float:
        return REGISTRY.get_sample_value("seamark_dispatcher_append_stalled", {"stream": "claims"}) or 0.0

    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url):
            await publish(broker, to=["alice"], type="demo.hello", id="e1")
            await eventually(lambda: at_least(broker, 1))
            valkey.kill()
            await publish(broker, to=["alice"], type="demo.hello", id="e2", semantics="effectively_once")
            await eventually(lambda: stalled() == 1)
            valkey.start()
            await eventually(lambda: at_least(broker, 2))
            await eventually(lambda: stalled() == 0)


async def test_invalid_events_become_dead_letters_with_the_reason_and_do_not_stop_the_others(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    bodies = {
        "json": b"{not json",
        "schema": b'{"id":7,"to":["alice"]}',
        "to": b'{"id":"x","to":[]}',
        "id": b'{"id":"has blank","to":["alice"]}',
        "disagreement": b'{"id":"x","to":["alice"],"tenant":"other"}',
        "data": b'{"id":"x","to":["alice"],"data":"' + b"x" * 300_000 + b'"}',
    }
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url):
            for body in bodies.values():
                await broker.append("events.default.alice.demo.hello", body)
            await broker.append("events.default.al=ice.demo.hello", b'{"id":"y","to":["alice"]}')
            await broker.append("events.default.alice.demo.hello", b'{"id":"bad-utf8","to":["alice"],"data":"\xff"}')
            nested = b"[" * 50_000 + b"]" * 50_000
            await broker.append("events.default.alice.demo.hello", b'{"id":"deep","to":["alice"],"data":%b}' % nested)
            await publish(broker, to=["alice"], type="demo.hello", id="good")
            await eventually(lambda: at_least(broker, 1))
            await eventually(lambda: dead_letters(broker, len(bodies) + 3))
            entries = await all_records(broker, PARTITIONS)
            dead = await whole_stream(broker, "DEAD-LETTERS", "dlq.>")
    assert [entry.id for entry in entries] == ["good"]
    reasons = [letter.headers.split(b"Seamark-Reason: ")[1].split(b"\r\n")[0].decode() for letter in dead]
    assert sorted(reasons) == sorted([*bodies, "subject", "json", "json"])
    assert {letter.payload for letter in dead} >= set(bodies.values())


@pytest.mark.parametrize(
    "lines",
    [b"NATS/1.0\r\ntraceparent:", b"NATS/1.0\r\ntraceparent:\r\n", b"NATS/1.0", b"\r\n\r\n", b"x", b"X-Nats-Pin-Id:"],
)
async def test_an_event_whose_headers_have_no_end_waits_for_no_other(
    nats_server: NatsServer, valkey: Valkey, lines: bytes
) -> None:
    """The server stores whatever bytes a publisher calls headers, and puts its own behind them."""
    event = b'{"id":"e1","to":["alice"],"data":{}}'
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        # It is the first that a reader is handed out: by its headers the reader learns that it was chosen.
        words = b"HPUB events.default.k.demo.hello %d %d" % (len(lines), len(lines) + len(event))
        broker.write(b"%b\r\n%b%b\r\n" % (words, lines, event))
        await broker.flush()
        async with dispatching(nats_server.url, valkey.url):
            await eventually(lambda: at_least(broker, 1), seconds=15)


async def test_trace_context_travels_from_the_event_to_the_record(nats_server: NatsServer, valkey: Valkey) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url):
            headers = {"traceparent": parent, "tracestate": "vendor=1"}
            await broker.append("events.default.alice.demo.hello", b'{"id":"e1","to":["alice"]}', headers)
            [entry] = await eventually(lambda: all_records(broker, PARTITIONS))
    assert entry.record["trace"] == parent
    assert f"traceparent: {parent}\r\n".encode() in entry.stored.headers
    assert b"tracestate: vendor=1\r\n" in entry.stored.headers


@pytest.mark.overlay(QUICK_DISK)
async def test_a_standby_takes_over_and_keeps_the_order_of_every_key(nats_server: NatsServer, valkey: Valkey) -> None:
    users = [f"user{i}" for i in range(40)]
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)

        async def load(count: int, start: int) -> None:
            for i in range(start, start + count):
                await publish(broker, to=[users[i % 40]], type="demo.n", id=f"e{i}", data={"n": i})

        async with dispatching(nats_server.url, valkey.url):
            await load(200, 0)
            async with dispatching(nats_server.url, valkey.url):
                await load(200, 200)
        async with dispatching(nats_server.url, valkey.url):
            await load(200, 400)
            await eventually(lambda: at_least(broker, 600))
        entries = await all_records(broker, PARTITIONS)
    assert len(entries) == 600
    for user in users:
        numbers = [entry.record["data"]["n"] for entry in entries if entry.user == user]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) == 15


async def test_ten_thousand_recipients_get_one_record_each(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        async with dispatching(nats_server.url, valkey.url):
            users = [f"user-{i}" for i in range(10_000)]
            await publish(broker, to=users, type="demo.all", id="big", key="room")
            await publish(broker, to=["user-7"], type="demo.one", id="small", key="room")
            await eventually(lambda: at_least(broker, 10_001), every_seconds=0.3)
            entries = await all_records(broker, PARTITIONS)
    assert len(entries) == 10_001
    assert {entry.user for entry in entries if entry.id == "big"} == set(users)
    assert [entry.id for entry in entries if entry.user == "user-7"] == ["big", "small"]


async def at_least(broker: Broker, records: int) -> bool:
    return await count_records(broker) >= records


async def dead_letters(broker: Broker, count: int) -> bool:
    return (await broker.stream("DEAD-LETTERS")).messages >= count


def home(user: str) -> int:
    return partition_of("default", encode_token(user), PARTITIONS)
