"""The private parts of nats-py that the engine stands on. When one fails, nats-py has moved it: see engine/broker/client.py."""

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.protocol.parser import Parser

from engine.broker.client import EngineClient, outgoing
from engine.broker.jetstream import Broker
from engine.broker.wire import HotParser
from ops.dev.servers import NatsServer
from tests.support.logs import connected, eventually

REMEDY = "nats-py has moved a part that engine/broker/client.py or engine/broker/connection.py uses"


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_methods_are_where_they_are_overridden_and_take_what_we_pass() -> None:
    expected = {
        "_connect_to_server": ["self", "s"],
        "_process_connect_init": ["self"],
        "_process_op_err": ["self", "e"],
        "_process_err": ["self", "err_msg"],
        "_process_pong": ["self"],
        "_process_ping": ["self"],
        "_process_info": ["self", "info", "initial_connection"],
        "_process_msg": ["self", "sid", "subject", "reply", "data", "headers"],
        "_read_loop": ["self"],
    }
    found = {name: parameters(getattr(Client, name, lambda: None)) for name in expected}
    assert found == expected, REMEDY
    assert all(inspect.iscoroutinefunction(getattr(Client, name)) for name in expected), REMEDY


def test_the_parser_has_the_methods_nats_py_calls() -> None:
    assert parameters(Parser.parse) == parameters(HotParser.parse), REMEDY
    assert parameters(Parser.reset) == parameters(HotParser.reset), REMEDY
    source = inspect.getsource(Client)
    used = {word.split("(")[0].split()[0].rstrip(".,:)") for word in source.split("self._ps.")[1:]}
    assert used <= {"parse", "reset"}, REMEDY


def test_a_subscription_of_our_own_has_what_a_replay_reads() -> None:
    client = EngineClient(lambda words: None)
    entry = Subscription(client, 1, "a", pending_msgs_limit=1)
    assert (entry._max_msgs, entry._received, entry._subject, entry._queue) == (0, 0, "a", ""), REMEDY
    assert hasattr(entry, "_pending_queue"), REMEDY


async def test_the_parser_of_a_connected_client_is_ours_and_so_is_its_socket(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        assert isinstance(broker.nc._ps, HotParser), REMEDY
        assert broker.nc._ps is broker.nc.parser
        transport = outgoing(broker.nc)
        assert transport is not None, REMEDY
        assert transport is broker.nc._transport._io_writer.transport
        assert transport.get_extra_info("peername")[1] == nats_server.port
        assert isinstance(broker.nc._subs, dict), REMEDY
        assert isinstance(broker.nc._sid, int), REMEDY
        assert isinstance(broker.nc._pongs, list), REMEDY
        assert broker.nc._reading_task is not None, REMEDY
        assert broker.nc.max_payload == nats_server.max_payload_bytes, REMEDY


async def test_messages_are_handled_where_they_arrive_also_after_a_reconnect(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        tasks: list[Any] = []
        broker.subscribe("a", lambda *_: tasks.append(asyncio.current_task()))
        for number in (1, 2):
            await broker.flush()
            broker.publish("a", b"x")
            await eventually(lambda number=number: len(tasks) == number)
            # In the read loop there would be one: the stream reader has moved what tells that it waits.
            assert tasks[-1] is None, REMEDY
            await reconnect(broker, nats.errors.StaleConnectionError())


def test_no_more_is_handled_where_it_arrives_than_the_reader_itself_would_hold() -> None:
    """uvloop reads on in the same turn of the loop until somebody pauses it: megabytes would be handled without a turn."""
    client, left = EngineClient(print), list[int]()
    handled = list[bytes]()
    client.parser.handlers[b"1"] = lambda subject, reply, headers, payload: handled.append(payload)
    reader: Any = SimpleNamespace(feed_data=lambda data: left.append(len(data)), _waiter=object())
    client._transport, client._status = SimpleNamespace(_io_reader=reader), Client.CONNECTED  # type: ignore[assignment]
    client._take_at_once()
    message = b"MSG live.x 1 300\r\n" + b"x" * 300 + b"\r\n"
    few, many = message * 50, message * 1000
    reader.feed_data(few)
    assert (len(handled), left) == (50, [])
    reader.feed_data(many)
    assert (len(handled), left) == (50, [len(many)])


async def test_a_ping_of_ours_is_answered_in_the_order_of_pings(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        await asyncio.gather(broker.flush(), broker.nc.flush(), broker.flush(), broker.nc.flush())
        assert broker.nc._pongs == [], REMEDY


async def test_subscriptions_of_nats_py_itself_still_work_beside_ours(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        ours: list[bytes] = []
        broker.subscribe("a", lambda subject, reply, headers, payload: ours.append(payload))
        theirs = await broker.nc.subscribe("a")
        await broker.flush()
        await broker.nc.publish("a", b"x", headers={"H": "1"})
        message = await theirs.next_msg(timeout=30)
        assert (message.data, message.headers) == (b"x", {"H": "1"})
        await eventually(lambda: ours)  # the server serves the two in any order
        assert ours == [b"x"]


async def test_the_table_of_subscriptions_is_what_a_reconnect_replays(nats_server: NatsServer) -> None:
    async with connected(nats_server.url) as broker:
        kept = broker.subscribe("kept", lambda *_: None)
        broker.subscribe("dropped", lambda *_: None).unsubscribe()
        assert broker.nc._subs[kept._sid]._subject == "kept", REMEDY
        assert "dropped" not in {entry._subject for entry in broker.nc._subs.values()}
        await reconnect(broker, nats.errors.StaleConnectionError())
        await broker.flush()

        def subjects() -> list[str]:
            found = nats_server.monitor("/connz?subs=true").get("connections", [])
            return [subject for connection in found for subject in connection.get("subscriptions_list", [])]

        # The server may notice the end of the former connection later than the beginning of this one.
        await eventually(lambda: "dropped" not in (found := subjects()) and found.count("kept") == 1)


@pytest.mark.parametrize("method", ["_process_msg", "_process_info", "_process_ping"])
async def test_an_exception_nats_py_does_not_know_costs_a_reconnect_not_the_read_loop(
    nats_server: NatsServer, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(nats_server.url) as broker:
        failed: list[str] = []

        async def fail(*_: Any) -> None:
            failed.append(method)
            raise KeyError(method)

        with monkeypatch.context() as patch:
            patch.setattr(broker.nc, method, fail)
            again = reconnected(broker)
            raw = {
                "_process_msg": b"MSG a 999 0\r\n\r\n",
                "_process_info": b"INFO {}\r\n",
                "_process_ping": b"PING\r\n",
            }
            broker.nc._transport._io_reader.feed_data(raw[method])
            await eventually(lambda: failed)  # not until it is disconnected: that may be over in a moment
        await again
        await broker.flush()


async def reconnect(broker: Broker, error: Exception) -> None:
    again = reconnected(broker)
    await broker.nc._process_op_err(error)
    await again


def reconnected(broker: Broker) -> "asyncio.Future[None]":
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    broker.on_reconnect.append(lambda: done.done() or done.set_result(None))
    return done
