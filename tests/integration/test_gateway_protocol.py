"""The protocol `seamark.v1` over real WebSockets and a real nats-server."""

import asyncio
import contextlib
import json
import time

import aiohttp
import pytest
from structlog.testing import capture_logs

from gateway.options import Times
from ops.dev.servers import NatsServer
from seamark.protocol.close_codes import TABLE
from tests.support.gateways import QUICK, Device, TestGateway, again_and_again, gateway_on
from tests.support.logs import eventually, of_clients
from tests.support.tokens import token


async def test_a_device_that_says_start_gets_the_log_from_its_oldest_record_then_live_ones(
    nats_server: NatsServer,
) -> None:
    async with gateway_on(nats_server) as gateway:
        stored = await gateway.append(count=3)
        async with gateway.device() as device:
            ready = await device.next()
            assert (ready["op"], ready["resumed"], ready["unread"]) == ("ready", True, None)
            records = await device.records(3)
            live = await device.until("live")
            stored += await gateway.append(count=2)
            records += await device.records(2)
    assert [frame["seq"] for frame in records] == stored
    epoch = ready["cursor"].split(".")[0]
    assert [frame["cursor"] for frame in records] == [f"{epoch}.{seq}" for seq in stored]
    assert live["cursor"] == f"{epoch}.{stored[2]}"
    held = [int(ready["cursor"].split(".")[1]), *stored[:-1]]
    assert [frame["prev"] for frame in records] == held
    assert records[0]["record"] == {"id": "r0", "kind": "notification"}


async def test_a_device_resumes_from_its_cursor_with_exactly_what_it_missed(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=3)
        async with gateway.device() as device:
            cursor = (await device.records(3))[-1]["cursor"]
        await gateway.append("bob", count=2)
        missed = await gateway.append(count=300)
        async with gateway.device(cursor=cursor) as device:
            ready = await device.next()
            records = await device.records(300)
            await device.until("live")
    assert (ready["cursor"], ready["resumed"]) == (cursor, True)
    assert [frame["seq"] for frame in records] == missed
    assert [frame["prev"] for frame in records] == [int(cursor.split(".")[1]), *missed[:-1]]


async def test_without_a_cursor_a_device_gets_a_reset_and_the_log_from_there(
    nats_server: NatsServer,
) -> None:
    async with gateway_on(nats_server) as gateway:
        before = await gateway.append(count=3)
        async with gateway.device(cursor=None) as device:
            ready, reset = [await device.next() for _ in range(2)]
            old = await device.records(3)
            live = await device.until("live")
            after = await gateway.append(count=1)
            record = (await device.records(1))[0]
    assert (ready["op"], ready["cursor"], ready["resumed"], ready["reason"]) == ("ready", None, False, "new")
    assert (reset["op"], reset["reason"], reset["inbox"], reset["unread"]) == ("reset", "new", [], None)
    assert reset["stale"], "there is no inbox to take a snapshot of: the log is all there is"
    assert [int(reset["cursor"].split(".")[1]) + 1, *(frame["seq"] for frame in old[1:])] == before
    assert live["cursor"].endswith(f".{before[-1]}")
    assert (record["seq"], record["prev"]) == (after[0], before[-1])


async def test_all_sessions_of_a_user_see_the_same_records_and_what_one_reads_the_others_learn(
    nats_server: NatsServer,
) -> None:
    async with gateway_on(nats_server) as gateway:
        async with gateway.device(name="phone") as phone, gateway.device(name="laptop") as laptop:
            await phone.until("live")
            await laptop.until("live")
            sent = await gateway.append(count=2)
            assert [frame["seq"] for frame in await phone.records(2)] == sent
            assert [frame["seq"] for frame in await laptop.records(2)] == sent
            await phone.say("read", ids=["r0"])
            for device in (phone, laptop):
                record = (await device.records(1))[0]["record"]
                assert (record["kind"], record["ids"], record["device"]) == ("read", ["r0"], "phone")
            await laptop.say("read", all=True)
            for device in (phone, laptop):
                record = (await device.records(1))[0]["record"]
                assert (record["kind"], record["up_to"], record["device"]) == ("read", sent[-1] + 1, "laptop")
            assert len(gateway.context.partitions[gateway.partition()].logs) == 1
        await eventually(lambda: not gateway.context.partitions[gateway.partition()].logs)


async def test_a_record_that_is_not_for_the_screen_moves_the_cursor_without_its_body(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(headers={"Seamark-Skip": "1"})
        async with gateway.device() as device:
            first = (await device.records(1))[0]
            await device.until("live")
            await gateway.append(headers={"Seamark-Skip": "1"})
            await gateway.append(body=b"")
            await gateway.append(body=b"no json")
            skips = await device.records(3)
    assert [frame["op"] for frame in (first, *skips)] == ["skip"] * 4
    assert [frame["prev"] for frame in (first, *skips)] == [0, 1, 2, 3]
    assert set(first) == {"op", "seq", "prev", "cursor"}


async def test_what_a_device_was_sent_and_has_acknowledged_is_stored_as_ranges(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        async with gateway.device() as device:
            await device.until("live")
            await gateway.append(count=3)
            cursor = (await device.records(3))[-1]["cursor"]
            await eventually(gateway.receipts)
            await device.say("ack", cursor=cursor)
            await eventually(lambda: acknowledged_up_to(gateway, 3))
            await gateway.append(count=2)
            await device.say("ack", cursor=(await device.records(2))[-1]["cursor"])
            await eventually(lambda: acknowledged_up_to(gateway, 5))
        receipts = await gateway.receipts()
    epoch = cursor.split(".")[0]
    assert {receipt["subject"] for receipt in receipts} == {f"rcpt.{gateway.partition()}.default.alice"}
    assert {(receipt["user"], receipt["channel"], receipt["device"]) for receipt in receipts} == {
        ("alice", "inapp", "phone")
    }
    assert {receipt["epoch"] for receipt in receipts} == {epoch}
    acknowledged = [receipt for receipt in receipts if receipt["state"] == "acknowledged"]
    # One that a slow broker did not answer in time is told again.
    assert list(dict.fromkeys((receipt["after"], receipt["up_to"]) for receipt in acknowledged)) == [(0, 3), (3, 5)]
    assert receipts[0]["state"] == "sent"
    assert 0 <= receipts[0]["after"] < receipts[0]["up_to"] <= 3


async def acknowledged_up_to(gateway: TestGateway, seq: int) -> bool:
    """Whether that is stored. What was sent may be told in several receipts before."""
    found = await gateway.receipts()
    return any(receipt["state"] == "acknowledged" and receipt["up_to"] == seq for receipt in found)


async def test_a_pong_carries_the_position_verified_and_moves_the_cursor(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        await gateway.append()
        cursor = (await device.records(1))[0]["cursor"]
        await device.say("ping")
        assert await device.until("pong") == {"op": "pong", "cursor": cursor, "seq": 1}


async def test_a_refreshed_token_keeps_the_session_beyond_the_first_ones_expiry(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.socket() as device:
        expiry = time.monotonic() + 3.0
        # Both at once: a machine that is held up meanwhile must not let the first one expire before the second is there.
        await device.say("hello", token=token(seconds=3.0), device="d", cursor="start")
        await device.say("refresh", token=token(seconds=600))
        await device.until("live")
        await eventually(lambda: time.monotonic() > expiry + 0.2)
        await device.say("ping")
        await device.until("pong")


async def test_an_unread_count_of_the_projector_is_passed_on_and_nothing_else_is(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        live = gateway.subject().replace("log.", "live.", 1)
        gateway.broker.publish(live, b'{"op":"close"}')
        gateway.broker.publish(live, b'{"op":"unread","count":3,"as_of":7}')
        assert await device.next() == {"op": "unread", "count": 3, "as_of": 7}


# --- the ends of a session ------------------------------------------------------------------------------------------

ACK = json.dumps({"op": "ack", "cursor": "abcdefgh.99"})
BAD_FRAMES = {
    "not json": ("{", "truncated"),
    "not utf-8": (b'{"op":"\xff"}', "utf"),
    "no op": ("{}", "op"),
    "wrong type": ('{"op":"ack","cursor":7}', "cursor"),
    "a list": ("[]", "array"),
    "ack of what was never sent": (ACK, "never sent"),
    "not a cursor": ('{"op":"ack","cursor":"x"}', "cursor"),
    "hello twice": ('{"op":"hello","token":"x","device":"d"}', "before"),
    "read of nothing": ('{"op":"read"}', "exactly one"),
    "read of two kinds": ('{"op":"read","all":true,"ids":["x"]}', "exactly one"),
    "read of too many": (json.dumps({"op": "read", "ids": ["x"] * 501}), "500"),
    "nested deeply": ("[" * 30_000, ""),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
async def test_a_bad_frame_ends_the_session_with_4400_one_log_line_and_no_leak(
    nats_server: NatsServer, case: str
) -> None:
    data, reason = BAD_FRAMES[case]
    async with gateway_on(nats_server) as gateway:
        with capture_logs() as lines:
            async with gateway.device() as device:
                await device.until("live")
                if isinstance(data, bytes):
                    await device.socket.send_frame(data, aiohttp.WSMsgType.TEXT)
                else:
                    await device.socket.send_str(data)
                code, said = await device.closed()
            await nothing_is_left(gateway)
    assert code == 4400
    assert reason in said.lower()
    assert device.frames[-1]["op"] == "error"
    assert [(line["event"], line["code"]) for line in of_clients(lines)] == [("session_closed", 4400)]


async def nothing_is_left(gateway: TestGateway) -> None:
    """No session, no subscription and nobody who waits in the gateway."""

    def nothing() -> bool:
        partitions = gateway.context.partitions  # each asks its leader now and then, whoever is connected
        return (
            not len(gateway.context.sessions)
            and not any(partition.logs or partition.watch._questions._waiting for partition in partitions)
            and set(gateway.context.broker.nc._subs) == gateway.subscriptions
        )

    await eventually(nothing)


async def test_an_ack_beyond_the_last_frame_sent_is_a_bad_frame(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        cursor = (await device.until("live"))["cursor"]
        await device.say("ack", cursor=f"{cursor.split('.')[0]}.1")
        assert (await device.closed())[0] == 4400


async def test_an_error_names_the_frame_that_it_is_about(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        for frame, code in (
            ({"op": "read", "id": "a", "up_to": "zzzzzzzz.1"}, "stale_cursor"),
            ({"op": "read", "up_to": "zzzzzzzz.1"}, "stale_cursor"),
            ({"op": "nonsense", "id": "b"}, "unknown_op"),
            ({"op": "ack", "id": "c", "cursor": 7}, "bad_frame"),
        ):
            await device.socket.send_json(frame)
            error = await device.next()
            assert (error["code"], error.get("id")) == (code, frame.get("id"))
        assert (await device.closed())[0] == 4400


async def test_every_position_that_a_client_is_sent_has_its_number_beside_it(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=2)
        async with gateway.device(cursor=None) as resetting, gateway.device() as resuming:
            for device in (resetting, resuming):
                await device.records(2)
                await device.until("live")
                await device.say("ping")
                await device.until("pong")
                for frame in device.frames:
                    cursor = frame.get("cursor")
                    assert frame.get("seq") == (None if cursor is None else int(cursor.split(".")[1])), frame
        assert {frame["op"] for frame in resetting.frames} == {"ready", "reset", "record", "live", "pong"}


async def test_the_first_frame_must_be_hello(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.socket() as device:
        await device.say("ping")
        assert (await device.closed())[0] == 4400


async def test_a_binary_frame_is_a_bad_frame(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.socket() as device:
        await device.socket.send_bytes(b'{"op":"ping"}')
        assert (await device.closed())[0] == 4400


@pytest.mark.parametrize("size", [65_537, 1 << 20])
async def test_a_frame_above_64_kib_ends_the_session_with_4413(nats_server: NatsServer, size: int) -> None:
    async with gateway_on(nats_server) as gateway:
        with capture_logs() as lines:
            async with gateway.device() as device:
                await device.until("live")
                await device.socket.send_str(" " * size)
                code, _ = await device.closed()
            await nothing_is_left(gateway)
    assert code == 4413
    assert [(line["event"], line["code"]) for line in of_clients(lines)] == [("session_closed", 4413)]


async def test_a_frame_of_64_kib_is_taken(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        await device.socket.send_str('{"op":"ping"}'.ljust(65_536))
        assert (await device.next())["op"] == "pong"


WRONG_TOKENS = {
    "garbage": "x.y.z",
    "empty": "",
    "another secret": token(secret="another secret that is long enough as well"),
    "expired": token(seconds=-1),
    "huge": "x" * 9_000,
    "no tenant": token(tenant=None),  # type: ignore[arg-type]
    "a user that cannot be": token(user=""),
    "a user with the name of a topic": token(user="topic:news"),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
async def test_a_wrong_token_ends_the_session_with_4401(nats_server: NatsServer, case: str) -> None:
    async with gateway_on(nats_server) as gateway:
        with capture_logs() as lines:
            async with gateway.socket() as device:
                await device.say("hello", token=WRONG_TOKENS[case], device="d")
                code, _ = await device.closed()
            await nothing_is_left(gateway)
    assert code == 4401
    assert [(line["event"], line["code"]) for line in of_clients(lines)] == [("session_closed", 4401)]
    assert not any(part in str(lines) for part in WRONG_TOKENS[case].split(".") if len(part) > 20)


async def test_no_hello_in_time_ends_the_session_with_a_code_that_lets_the_client_come_back(
    nats_server: NatsServer,
) -> None:
    async with gateway_on(nats_server, times=QUICK) as gateway:
        with capture_logs() as lines:
            async with gateway.socket() as device:
                code, reason = await device.closed()
            await nothing_is_left(gateway)
    assert (code, "hello" in reason) == (4407, True)
    assert next(row for row in TABLE if row.code == code).reconnect
    assert [line["event"] for line in of_clients(lines)] == ["session_closed"]


async def test_a_token_that_expires_in_mid_session_ends_it_with_4401(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        for seconds in (1.0, 4.0, 16.0):
            with capture_logs() as lines:
                async with gateway.socket() as device:
                    began = time.time()
                    await device.say("hello", token=token(seconds=seconds), device="d", cursor="start")
                    code, reason = await device.closed(timeout=60)
                    lasted = time.time() - began
                await nothing_is_left(gateway)
            began_in_time = any(frame["op"] == "live" for frame in device.frames)
            if began_in_time:
                break  # else a busy machine took longer to open the session than the token was good for
    assert began_in_time
    assert (code, "expired" in reason) == (4401, True)
    assert seconds * 0.9 < lasted < seconds + 14.0
    assert [line["event"] for line in of_clients(lines)] == ["session_closed"]


async def test_a_token_that_expires_between_two_pings_ends_the_session_no_later(nats_server: NatsServer) -> None:
    times = Times(ping_seconds=40.0, pong_seconds=40.0)
    async with gateway_on(nats_server, times=times) as gateway, gateway.socket() as device:
        began = time.time()
        await device.say("hello", token=token(seconds=1.3), device="d", cursor="start")
        assert (await device.closed(timeout=60))[0] == 4401
        assert 1.2 < time.time() - began < 25  # the first ping is due after forty seconds


async def test_a_refresh_for_another_user_ends_the_session_with_4403(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        await device.say("refresh", token=token("bob"))
        assert (await device.closed())[0] == 4403


async def test_a_client_that_answers_no_ping_ends_with_4408(nats_server: NatsServer) -> None:
    times = Times(hello_seconds=2.0, ping_seconds=0.4, pong_seconds=0.4)
    async with gateway_on(nats_server, times=times) as gateway, gateway.socket(autoping=False) as device:
        await device.say("hello", token=token(), device="d", cursor="start")
        assert (await device.closed())[0] == 4408


async def test_a_client_that_answers_pings_stays(nats_server: NatsServer) -> None:
    times = Times(hello_seconds=1.0, ping_seconds=0.3, pong_seconds=1.0)
    async with gateway_on(nats_server, times=times) as gateway, gateway.device() as device:
        await device.until("live")
        [session] = gateway.context.sessions.everyone()
        pings = asyncio.create_task(device.socket.receive(), name="answers pings")
        sent: set[float] = set()

        def pinged() -> bool:
            sent.add(session._pulse._pinged_at)
            return len(sent - {0.0}) >= 3  # each but the first was sent since the one before it was answered

        await eventually(pinged)
        assert not pings.done()
        await gateway.append()
        assert "record" in (await pings).data


async def test_the_longest_silent_of_too_many_sessions_of_a_user_goes_with_4409(nats_server: NatsServer) -> None:
    async with (
        gateway_on(nats_server, sessions_per_user=2) as gateway,
        gateway.device(name="one") as one,
        gateway.device(name="two") as two,
    ):
        await one.until("live")
        await two.until("live")
        async with gateway.device("bob") as other, gateway.device(name="three") as three:
            assert (await one.closed())[0] == 4409
            await three.until("live")
            await other.until("live")
            await gateway.append()
            for device in (two, three):
                assert len(await device.records(1)) == 1


async def test_a_phone_that_flaps_takes_its_own_places_and_never_the_desktops(nats_server: NatsServer) -> None:
    async with (
        gateway_on(nats_server, sessions_per_user=3) as gateway,
        gateway.device(name="desktop") as desktop,
        contextlib.AsyncExitStack() as left_behind,
    ):
        await desktop.until("live")
        for _ in range(6):
            phone = await left_behind.enter_async_context(gateway.device(name="phone"))
            await phone.until("live")
        await gateway.append()
        assert len(await desktop.records(1)) == len(await phone.records(1)) == 1


async def test_polls_end_no_session(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server, sessions_per_user=1) as gateway, gateway.device(name="desktop") as desktop:
        cursor = (await desktop.until("live"))["cursor"]
        headers = {"Authorization": f"Bearer {token()}"}

        async def poll(wait: float) -> int:
            params = {"device": "watch", "cursor": cursor, "wait": str(wait)}
            async with gateway.http.get(f"{gateway.url}/v1/records", params=params, headers=headers) as answer:
                return answer.status

        waiting = asyncio.create_task(poll(20), name="poll")
        await eventually(lambda: len(gateway.context.sessions) == 2)
        assert await poll(0) == 200
        assert await waiting == 409, "one more poll than a user may have makes the oldest give way"
        await gateway.append()
        assert len(await desktop.records(1)) == 1


async def test_too_many_frames_end_the_session_with_4429(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        async with again_and_again(lambda: device.say("ping")):
            assert (await device.closed(timeout=60))[0] == 4429


@pytest.mark.parametrize(("origin", "status"), [
    ("https://evil.example", 403), ("https://app.example.evil", 403), ("null", 403),
    ("https://app.example", 101), (None, 101),
])  # fmt: skip
async def test_only_listed_origins_may_open_a_session(nats_server: NatsServer, origin: str | None, status: int) -> None:
    headers = {"Origin": origin} if origin is not None else {}
    async with gateway_on(nats_server, origins=("https://app.example",)) as gateway:
        with capture_logs() as lines:
            if status == 101:
                async with gateway.socket(headers=headers) as device:
                    await device.say("hello", token=token(), device="d", cursor="start")
                    await device.until("live")
            else:
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await gateway.http.ws_connect(f"{gateway.url}/v1/ws", headers=headers)
                assert refused.value.status == status
        await nothing_is_left(gateway)
    assert [line["event"] for line in of_clients(lines)] == ([] if status == 101 else ["request_refused"])


async def test_a_client_that_closes_or_vanishes_leaves_nothing_behind(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        with capture_logs() as lines:
            async with gateway.device() as device:
                await device.until("live")
                await device.socket.close()
                assert device.socket.close_code == 1000
            async with gateway.device() as device:
                await device.until("live")
                connection = device.socket._response.connection
                assert connection is not None
                assert connection.transport is not None
                connection.transport.abort()
            await nothing_is_left(gateway)
    assert not of_clients(lines)


async def hello_with_header(device: Device) -> None:
    await device.say("hello", device="d", cursor="start")
    await device.until("live")


async def test_the_token_may_come_with_the_handshake_instead(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        async with gateway.socket(headers={"Authorization": f"Bearer {token()}"}) as device:
            await hello_with_header(device)
        async with gateway.socket() as device:
            await device.say("hello", device="d")
            assert (await device.closed())[0] == 4401
