"""When a position cannot be continued, the device is told so and why; when it can, it is never told otherwise."""

import asyncio
import contextlib
import json

import pytest

from engine.broker.jetstream import Outgoing
from engine.dispatch.source import EVENTS
from engine.log.writer import MarkedWriter, Ownership, read_mark
from engine.topology import server as topology
from ops.dev.servers import NatsServer
from tests.support.gateways import Device, TestGateway, gateway_on
from tests.support.logs import eventually


async def reset_of(device: Device) -> tuple[dict[str, object], dict[str, object]]:
    ready, reset = await device.next(), await device.next()
    assert (ready["op"], ready["cursor"], ready["resumed"]) == ("ready", None, False)
    assert (reset["op"], reset["reason"]) == ("reset", ready["reason"])
    return ready, reset


async def recreate(gateway: TestGateway) -> None:
    """The stream of alice's log is deleted and made anew: another epoch, sequences from 1."""
    await gateway.broker.api(f"STREAM.DELETE.{gateway.stream()}", {})
    await topology.ensure(gateway.broker, "dev")


async def cursor_after(gateway: TestGateway, count: int) -> str:
    await gateway.append(count=count)
    async with gateway.device() as device:
        return str((await device.records(count))[-1]["cursor"])


async def test_a_cursor_of_a_recreated_stream_is_reset_and_the_new_log_follows(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        cursor = await cursor_after(gateway, 3)
        await recreate(gateway)
        await gateway.append(count=2)
        async with gateway.device(cursor=cursor) as device:
            _, reset = await reset_of(device)
            records = await device.records(2)
    assert reset["reason"] == "epoch"
    assert str(reset["cursor"]).split(".")[0] != cursor.split(".", maxsplit=1)[0]
    assert [frame["seq"] for frame in records] == [1, 2]


async def test_a_connected_session_learns_that_its_stream_was_recreated(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=5)
        async with gateway.device() as device:
            old = (await device.until("live"))["cursor"]
            await recreate(gateway)
            seqs = await gateway.append(count=3)
            reset = await device.until("reset", timeout=30)
            records = await device.records(3)
            # An acknowledgement that crossed the reset on its way is no fault of the client.
            await device.say("ack", cursor=old)
            await device.say("ack", cursor=records[-1]["cursor"])
            await device.say("ping")
            assert (await device.until("pong"))["cursor"] == records[-1]["cursor"]
    assert reset["reason"] == "epoch"
    assert [frame["seq"] for frame in records] == seqs == [1, 2, 3]


async def test_no_record_of_a_log_that_is_made_anew_under_traffic_is_shown_as_one_of_the_log_before_it(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first copies look as if they followed: higher sequences, and nothing of this user before them."""
    monkeypatch.setattr("gateway.log.watch.WATCH_SECONDS", 600.0)  # it is the copies that tell of the new log
    written: list[tuple[str, int]] = []
    async with gateway_on(nats_server) as gateway:
        p = gateway.partition()
        crowd = [user for user in map(str, range(200)) if gateway.partition(user) == p]

        async def writer() -> tuple[str, MarkedWriter]:
            """As a dispatcher writes, from a mark that an operator has set."""
            marked, epoch = EVENTS.marked(p, p), (await gateway.broker.stream(gateway.stream())).epoch or ""
            found = await read_mark(gateway.broker, marked)
            owner = Ownership(len(written) + 1, "owner", "eeeeeeee")
            facts = {"epoch": epoch, "found": found, "mark": found.mark, "start_seq": len(written)}
            return epoch, await MarkedWriter.take_over(gateway.broker, marked, owner, **facts)

        async def write(rounds: int, others: int) -> None:
            epoch, log = await writer()
            for _ in range(rounds):
                messages = [Outgoing(gateway.subject(crowd[n % len(crowd)]), b"{}") for n in range(others)]
                body = json.dumps({"id": f"r{len(written)}", "kind": "notification", "of": epoch}).encode()
                await log.append([*messages, Outgoing(gateway.subject(), body)], len(written) + 1)
                written.append((epoch, log._placed.seq - 1))

        async with gateway.device() as device:
            await device.until("live")
            for logs in range(3):
                if logs:
                    await recreate(gateway)
                await write(rounds=5, others=0 if logs == 0 else 40 * logs)
                shown: list[tuple[str, int]] = []
                while len(shown) < 5:
                    frame = await device.next()
                    if frame["op"] == "record":
                        epoch, seq = frame["cursor"].split(".")
                        assert frame["record"]["of"] == epoch
                        shown.append((epoch, int(seq)))
                    elif frame["op"] == "reset":
                        assert (frame["reason"], shown) == ("epoch", [])
                assert shown == written[-5:]


async def test_an_acknowledgement_of_what_the_log_has_lost_counts_for_no_record_that_took_its_place(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.log.watch.WATCH_SECONDS", 0.2)  # it takes two looks to see that the log has gone back
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=5)
        async with gateway.device() as device:
            old = (await device.until("live"))["cursor"]
            config = (await gateway.broker.api(f"STREAM.INFO.{gateway.stream()}", {}))["config"]
            await gateway.broker.api(f"STREAM.DELETE.{gateway.stream()}", {})
            await gateway.broker.api(f"STREAM.CREATE.{gateway.stream()}", config)  # the same epoch: put back, and empty
            assert (await device.until("reset", timeout=20))["reason"] == "future"
            await gateway.append(count=3)
            await device.records(3)
            await device.say("ack", cursor=old)  # it crossed the reset on its way
            await device.say("ping")
            await device.until("pong")

            async def told() -> bool:
                return any(receipt["up_to"] == 3 for receipt in await gateway.receipts())

            await eventually(told)  # and with it what was acknowledged until then
            await gateway.append(count=4)
            await device.say("ack", cursor=(await device.records(4))[-1]["cursor"])

        async def acknowledged() -> set[tuple[int, int]]:
            receipts = [receipt for receipt in await gateway.receipts() if receipt["state"] == "acknowledged"]
            return {(receipt["after"], receipt["up_to"]) for receipt in receipts}

        await eventually(acknowledged)
        assert await acknowledged() == {(0, 7)}


async def test_a_cursor_beyond_the_end_of_the_log_is_reset(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        cursor = await cursor_after(gateway, 3)
        epoch = cursor.split(".", maxsplit=1)[0]
        async with gateway.device(cursor=f"{epoch}.1000") as device:
            _, reset = await reset_of(device)
    assert reset["reason"] == "future"


@pytest.mark.parametrize("cursor", ["zzzzzzzz.5", "nonsense", "", "x" * 5_000, "-.0", "1.2.3"])
async def test_a_foreign_or_corrupt_cursor_is_reset_never_a_crash(nats_server: NatsServer, cursor: str) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=2)
        async with gateway.device(cursor=cursor) as device:
            _, reset = await reset_of(device)
            assert len(await device.records(2)) == 2
    assert reset["reason"] == "epoch"


async def test_a_cursor_of_another_users_partition_is_reset(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        cursor = await cursor_after(gateway, 2)
        other = next(user for user in map(str, range(100)) if gateway.partition(user) != gateway.partition())
        async with gateway.device(other, cursor=cursor) as device:
            _, reset = await reset_of(device)
    assert reset["reason"] == "epoch"


async def test_history_that_age_has_trimmed_is_announced(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        seqs = await gateway.append(count=10)
        async with gateway.device() as device:
            cursor = (await device.records(2))[-1]["cursor"]
        await gateway.broker.api(f"STREAM.PURGE.{gateway.stream()}", {"seq": seqs[5]})
        async with gateway.device(cursor=cursor) as device:
            # The watch may not have seen the trimming yet: then the cursor is accepted first and given up by the first page.
            reset = await device.until("reset")
            records = await device.records(5)
    assert reset["reason"] == "trimmed"
    assert [frame["seq"] for frame in records] == seqs[5:]
    assert records[0]["prev"] == int(str(reset["cursor"]).split(".")[1]) == seqs[5] - 1


async def test_a_record_erased_on_purpose_is_no_hole(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        seqs = await gateway.append(count=5)
        async with gateway.device() as device:
            cursor = (await device.records(2))[-1]["cursor"]
        for seq in seqs[1:3]:  # the cursor's own record, and the one after it
            await gateway.broker.api(f"STREAM.MSG.DELETE.{gateway.stream()}", {"seq": seq})
        async with gateway.device(cursor=cursor) as device:
            ready = await device.next()
            records = await device.records(2)
    assert ready["resumed"] is True
    assert [frame["seq"] for frame in records] == seqs[3:]


async def test_live_copies_lost_while_the_broker_restarts_are_found_in_the_log(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        before = await gateway.append(count=2)
        assert len(await device.records(2)) == 2
        nats_server.kill()
        nats_server.start()
        after = [
            (await gateway.broker.append(gateway.subject(), b'{"id":"r"}', msg_id=f"again{number}")).seq
            for number in range(3)
        ]
        records = await device.records(3, timeout=30)
    assert [frame["seq"] for frame in records] == after
    assert records[0]["prev"] == before[-1]


async def test_sessions_that_wait_for_the_same_read_share_it(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.join.feed.CHECK_AFTER_SECONDS", 600.0)  # no session lasts until its head is checked
    users = [f"user{number}" for number in range(80)]
    async with gateway_on(nats_server) as gateway:
        await asyncio.gather(*(gateway.append(user, count=2) for user in users))
        cursors = {}

        async def join(user: str, cursor: str) -> int:
            async with gateway.device(user, cursor=cursor) as device:
                ready = await device.next(timeout=20)
                assert ready["resumed"] is True
                await device.until("live")
                cursors[user] = device.frames[-1]["cursor"]
                return sum(frame["op"] == "record" for frame in device.frames)

        assert await asyncio.gather(*(join(user, "start") for user in users)) == [2] * len(users)
        before = reads(gateway)
        heads = [partition.heads for partition in gateway.context.partitions]
        async with contextlib.AsyncExitStack() as under_way:
            for reader in heads:  # as while a read is under way
                await under_way.enter_async_context(reader._turn)
            joining = asyncio.gather(*(join(user, cursors[user]) for user in users))
            await eventually(lambda: sum(len(reader._opening._waiting) for reader in heads) == len(users))
        assert await joining == [0] * len(users)
        assert reads(gateway) - before <= len(heads)


def reads(gateway: TestGateway) -> int:
    return sum(partition.heads.requests + partition.reader.requests for partition in gateway.context.partitions)
