"""Unread counts from the log to every device of a user."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from redis.asyncio import Redis

from engine.topology import server as topology
from gateway.log.live import UserLog
from ops.dev.servers import NatsServer, Valkey
from projections.unread import worker as unread_worker
from projections.unread.frames import SPACING_SECONDS
from projections.unread.reader import UnreadReader
from projections.unread.store import UnreadStore, read_version, write_version
from seamark.protocol.records import state_record
from tests.support.gateways import Device, TestGateway, gateway_on
from tests.support.logs import FAST, connected, eventually
from tests.support.projections import PARTITIONS, projecting


@contextlib.asynccontextmanager
async def counting(nats: NatsServer, valkey: Valkey) -> AsyncIterator[TestGateway]:
    """A gateway over a log that a projector folds."""
    async with connected(nats.url) as broker:
        await topology.ensure(broker, "dev", PARTITIONS, overrides=FAST)
    async with (
        projecting(nats.url, valkey.url),
        gateway_on(nats, topology_ready=True, redis_url=valkey.url) as gateway,
        Redis.from_url(valkey.url) as redis,
    ):
        reader = UnreadReader(redis)

        async def begun() -> bool:
            return not any([(await reader.read(p, [])).stale for p in range(PARTITIONS)])

        try:
            await eventually(begun)
        finally:
            await reader.close()  # uvloop does not end while a connection is open
        yield gateway


async def counted(device: Device, count: int, **more: Any) -> dict[str, Any]:
    """Read on until the device has been told this count, and what else the frame has to say."""
    wanted = {"op": "unread", "count": count, **more}
    async with asyncio.timeout(40):
        while True:
            frame = await device.next(40)
            if wanted.items() <= frame.items():
                return frame


def body(id: str, **fields: Any) -> bytes:
    return json.dumps({"id": id, "kind": "notification", **fields}).encode()


async def test_a_log_that_holds_nothing_has_nothing_unread_and_the_count_is_not_called_stale(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device() as phone:
        ready = await phone.until("ready")
        assert ready["unread"] == {
            "count": 0, "as_of": ready["unread"]["as_of"], "more": False, "categories": {}, "stale": False,
        }  # fmt: skip


async def test_ready_and_reset_carry_the_count_and_each_change_reaches_every_device(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with counting(nats_server, valkey) as gateway:
        async with gateway.device(name="phone") as phone, gateway.device(name="laptop") as laptop:
            for device in (phone, laptop):
                await device.until("live")
            for id, category in (("a", "mail"), ("b", "mail"), ("c", None)):
                seqs = await gateway.append(body=body(id, category=category))
            for device in (phone, laptop):
                frame = await counted(device, 3)
                expected = {"count": 3, "as_of": seqs[0], "more": False, "categories": {"mail": 2}}
                assert frame == {"op": "unread", **expected, "stale": False}
        async with gateway.device() as phone, gateway.device(cursor=None) as tablet:
            assert (await phone.until("ready"))["unread"] == {**expected, "stale": False}
            assert (await tablet.until("ready"))["unread"] == {**expected, "stale": False}
            assert (await tablet.until("reset"))["unread"] == {**expected, "stale": False}


async def test_a_reset_in_mid_session_tells_the_count(nats_server: NatsServer, valkey: Valkey) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device() as phone:
        await phone.until("live")
        for id in ("a", "b", "c"):
            await gateway.append(body=body(id))
        await counted(phone, 3)
        await gateway.broker.api(f"STREAM.DELETE.{gateway.stream()}", {})
        await topology.ensure(gateway.broker, "dev", PARTITIONS, overrides=FAST)
        reset = await phone.until("reset")
        assert reset["reason"] == "epoch"
        # The count is that of the log of before, and says so: the projector waits for its rebuild.
        assert (reset["unread"]["count"], reset["unread"]["stale"]) == (3, True)


async def test_reading_on_one_device_clears_the_other_within_one_frame(nats_server: NatsServer, valkey: Valkey) -> None:
    async with counting(nats_server, valkey) as gateway:
        await gateway.append(body=body("a", category="mail"))
        await gateway.append(body=body("b"))
        await eventually(lambda: _stored_count(valkey, gateway, 2))
        async with gateway.device(name="phone") as phone, gateway.device(name="laptop") as laptop:
            for device in (phone, laptop):
                ready = (await device.until("ready"))["unread"]
                assert ready["count"] == 2
                await device.until("live")
            await phone.say("read", ids=["a"])
            assert (await counted(phone, 1))["categories"] == {}
            await counted(laptop, 1)
            # What was counted before may be told once more, later than it was read.
            told = [frame for frame in laptop.frames if frame["op"] == "unread" and frame["as_of"] > ready["as_of"]]
            assert {frame["count"] for frame in told} == {1}, "the first frame after the read is the count without it"
            await phone.say("read", all=True)
            for device in (phone, laptop):
                await counted(device, 0)


async def test_after_an_hour_offline_both_devices_agree(nats_server: NatsServer, valkey: Valkey) -> None:
    """The laptop misses arrivals, reads, a recall and a collapse; its cursor and the count bring it to where the phone is."""
    async with counting(nats_server, valkey) as gateway:
        async with gateway.device(name="laptop") as laptop:
            await laptop.until("live")
            await gateway.append(body=body("a"))
            cursor = (await laptop.until("record"))["cursor"]
        async with gateway.device(name="phone") as phone:
            await phone.until("live")
            for id, fields in (("b", {}), ("c", {"collapse_key": "k"}), ("d", {"collapse_key": "k"}), ("e", {})):
                fields["category"] = id  # by which one count of two is told from another
                await gateway.append(body=body(id, **fields))
            await gateway.append(body=json.dumps({"id": "r", "kind": "recall", "ids": ["e"]}).encode())
            await phone.say("read", ids=["a"])
            last = await counted(phone, 2, categories={"b": 1, "d": 1})
            async with gateway.device(name="laptop", cursor=cursor) as laptop:
                ready = await laptop.until("ready")
                assert ready["unread"]["categories"] == last["categories"]
                ids = [frame["record"]["id"] for frame in await laptop.records(6)]
                assert ids[:4] == ["b", "c", "d", "e"]


async def test_a_burst_is_told_at_once_and_then_in_one_frame(nats_server: NatsServer, valkey: Valkey) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device() as phone:
        await phone.until("live")
        began = time.monotonic()
        for number in range(200):
            await gateway.append(body=body(f"e{number}"))
        await counted(phone, 200)
        frames = [frame for frame in phone.frames if frame["op"] == "unread"]
        assert [frame["count"] for frame in frames] == sorted(frame["count"] for frame in frames)
        assert len(frames) < 4 + (time.monotonic() - began) / SPACING_SECONDS, "some four a second"


async def test_what_expires_leaves_the_count_of_connected_devices(
    nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device() as phone:
        await phone.until("live")
        later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
        await gateway.append(body=body("a", expires_at=later))
        await gateway.append(body=body("b"))
        await counted(phone, 2)
        # The projector's clock, as devices hear of it from nobody else.
        clock = SimpleNamespace(time=lambda: time.time() + 7200, monotonic=time.monotonic)
        monkeypatch.setattr(unread_worker, "time", clock)
        await counted(phone, 1)


async def test_without_redis_there_is_no_count_and_everything_else_goes_on(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device(name="phone") as phone:
        await phone.until("live")
        await gateway.append(body=body("a"))
        await counted(phone, 1)
        valkey.kill()
        async with gateway.device(name="laptop") as laptop:
            assert (await laptop.until("ready"))["unread"] is None
            assert (await laptop.until("record"))["record"]["id"] == "a"
            await laptop.until("live")
            await gateway.append(body=body("b"))
            for device in (phone, laptop):
                assert (await device.until("record"))["record"]["id"] == "b"
        gateway.context.partition("default", "alice").suspect()
        assert (await phone.until("unread"))["stale"] is True
        valkey.start()
        # It has come back empty: the projector folds the log anew, and what is told again is the whole count.
        await counted(phone, 2, stale=False)


async def test_a_change_that_was_lost_on_its_way_is_told_when_counts_are_compared(
    nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device() as phone:
        await phone.until("live")
        with monkeypatch.context() as deaf:
            deaf.setattr(UserLog, "count", lambda self, frame: None)
            await gateway.append(body=body("a"))
            await eventually(lambda: _stored_count(valkey, gateway, 1))
            await asyncio.sleep(2 * SPACING_SECONDS)
        gateway.context.partition("default", "alice").suspect()
        await counted(phone, 1)
        gateway.context.partition("default", "alice").suspect()
        await gateway.append(body=body("b"))
        await counted(phone, 2)
        assert [frame["count"] for frame in phone.frames if frame["op"] == "unread"] == [1, 2], "nothing is told twice"


async def test_a_projector_that_slept_cannot_bring_an_old_count_back(nats_server: NatsServer, valkey: Valkey) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device() as phone:
        await phone.until("live")
        seqs = await gateway.append(count=1, body=body("a"))
        await counted(phone, 1)
        live = f"live.{gateway.partition()}.default.alice"
        gateway.broker.publish(live, b'{"op":"unread","count":7,"as_of":%d}' % (seqs[0] - 1))
        gateway.broker.publish(live, b'{"op":"unread","count":2,"as_of":%d}' % (seqs[0] + 1))
        assert (await phone.until("unread"))["count"] == 2


async def test_a_version_built_beside_the_live_one_takes_its_place_without_a_wrong_count(
    nats_server: NatsServer, valkey: Valkey
) -> None:
    async with counting(nats_server, valkey) as gateway, Redis.from_url(valkey.url) as redis:
        await gateway.append(count=1, body=body("a"))
        await eventually(lambda: _stored_count(valkey, gateway, 1))
        partition = gateway.partition()
        old = UnreadStore(redis, partition, version=1)
        checkpoint = await old.checkpoint()
        await old.close()
        assert checkpoint is not None
        # A version that stands at the same place and, to tell them apart, holds another count.
        for p in range(PARTITIONS):
            epoch = (await gateway.broker.stream(f"LOG-{p}")).epoch
            assert epoch is not None
            built = UnreadStore(redis, p, version=2)
            assert await built.begin(checkpoint._replace(epoch=epoch))
            await built.close()
        await write_version(redis, 2)
        assert await read_version(redis) == 2
        await eventually(lambda: _stored_count(valkey, gateway, 0))
        await gateway.append(body=body("b"))
        await eventually(lambda: _stored_count(valkey, gateway, 1))


async def _stored_count(valkey: Valkey, gateway: TestGateway, count: int) -> bool:
    async with Redis.from_url(valkey.url) as redis:
        reader = UnreadReader(redis)
        counts = await reader.read(gateway.partition(), ["default.alice"])
        await reader.close()
        return bool(counts.users) and counts.users[0].count == count


@pytest.mark.parametrize("kind", ["read", "archive"])
async def test_a_record_up_to_a_sequence_clears_all_before_it(
    kind: Any, nats_server: NatsServer, valkey: Valkey
) -> None:
    async with counting(nats_server, valkey) as gateway, gateway.device() as phone:
        await phone.until("live")
        seqs = [(await gateway.append(body=body(id)))[0] for id in "abc"]
        await counted(phone, 3)
        _, record = state_record(kind, tenant="default", user="alice", device="phone", up_to=seqs[1])
        await gateway.append(body=record)
        await counted(phone, 1)


async def test_where_nothing_is_counted_a_read_asks_once(valkey: Valkey) -> None:
    async def asked() -> int:
        told = await redis.info("commandstats")
        return sum(told.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))

    async with Redis.from_url(valkey.url) as redis:
        reader = UnreadReader(redis)
        try:
            await reader.read(0, ["acme.anna"])
            before = await asked()
            for _ in range(10):
                assert (await reader.read(0, ["acme.anna"])).checkpoint is None
            assert await asked() - before == 10
        finally:
            await reader.close()
