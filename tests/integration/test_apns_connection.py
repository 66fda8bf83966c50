"""The connection to APNs: whatever happens to it, each push has one outcome, and nothing is sent twice behind the worker's back.

Each test is a trap of aioapns 4.0 or h2, or of the protocol.
"""

import asyncio
import inspect
import json
from collections import Counter

import aioapns.connection
import h2.connection
import pytest

from engine.channels.channel import Outcome
from engine.channels.push import apns_pool
from engine.channels.push.apns import ApnsSender
from engine.channels.push.apns_connection import ApnsConnection
from engine.channels.push.apns_pool import ApnsPool
from engine.channels.push.signing import ApnsToken
from ops.dev.providers.faults import Answers, GoesAway, Hangs, Late, NoTls, Resets, ResetsStream, SlowBody
from tests.support.pushing import DEVICE, KEY_ID, TEAM_ID, Apple, apple, apple_key

WAIT_SECONDS = 20.0


def connections(one: Apple) -> list[ApnsConnection]:
    return one.sender._pools["production"]._connections


async def kinds(tasks: list[asyncio.Task[Outcome]]) -> Counter[str]:
    async with asyncio.timeout(WAIT_SECONDS):
        done = await asyncio.gather(*tasks, return_exceptions=True)
    return Counter(one.kind if isinstance(one, Outcome) else type(one).__name__ for one in done)


async def under_way(one: Apple, count: int) -> None:
    """Until so many requests have met their fault."""
    async with asyncio.timeout(WAIT_SECONDS):
        while len(one.production.faults.met) < count:
            await asyncio.sleep(0.01)


def many(one: Apple, count: int, **members: object) -> list[asyncio.Task[Outcome]]:
    return [asyncio.create_task(one.send(key=f"k{index}", **members)) for index in range(count)]  # type: ignore[arg-type]


async def test_when_a_connection_is_lost_after_one_request_was_cancelled_all_the_others_end() -> None:
    """aioapns raises at the cancelled one, and the others wait for ever."""
    async with apple() as one:
        await one.send()
        one.production.faults.stand(Hangs())
        tasks = many(one, 100)
        await under_way(one, 100)
        tasks[3].cancel()
        await asyncio.wait(tasks[3:4])
        for connection in tuple(one.production.connections):
            connection.abort()
        assert await kinds(tasks) == {"ambiguous": 99, "CancelledError": 1}


async def test_streams_that_are_reset_end_and_give_their_places_back() -> None:
    async with apple() as one:
        await one.send()
        one.production.faults.stand(ResetsStream())
        assert await kinds(many(one, 100)) == {"ambiguous": 100}
        one.production.faults.clear()
        assert await kinds(many(one, 100)) == {"ok": 100}
        assert one.production.connected == 1
        assert [connection.load for connection in connections(one)] == [0]


async def test_a_stream_that_was_refused_was_not_begun_and_may_be_sent_again() -> None:
    async with apple() as one:
        one.production.faults.script([ResetsStream(refused=True)])
        assert (await one.send()).kind == "transient"


@pytest.mark.parametrize(("status", "kind"), [(400, "permanent"), (403, "permanent"), (503, "transient")])
async def test_an_error_without_a_body_is_an_answer(status: int, kind: str) -> None:
    async with apple() as one:
        one.production.faults.script([Answers(status=status)])
        assert (await one.send()).kind == kind


async def test_a_body_that_comes_byte_by_byte_is_read_whole() -> None:
    async with apple() as one:
        one.production.gone[DEVICE] = 1_764_000_000_000
        one.production.faults.script([SlowBody(seconds=0.002)])
        outcome = await one.send()
    assert outcome.code == "410/Unregistered"
    assert outcome.target_invalid_at is not None


async def test_a_connection_goes_on_after_any_number_of_errors() -> None:
    """Until it is told that what it sent was read, a server may send 64 KiB."""
    async with apple() as one:
        await one.send()
        body = json.dumps({"reason": "BadPriority", "more": "x" * 1000})
        one.production.faults.stand(Answers(status=400, body=body))
        for _ in range(4):
            assert await kinds(many(one, 50)) == {"permanent": 50}
        assert one.production.connected == 1


async def test_more_than_64_kib_of_requests_wait_for_room_and_are_all_sent() -> None:
    async with apple() as one:
        await one.send()
        assert await kinds(many(one, 200, message={"body": "x" * 3800})) == {"ok": 200}
        assert one.production.connected == 1
        assert one.production.log.repeated() == {}


async def test_no_more_requests_are_under_way_than_the_server_allows() -> None:
    """Apple allows one until the first was accepted; whoever sends more is refused."""
    async with apple() as one:
        one.production.faults.script([Late(seconds=0.2)])
        assert await kinds(many(one, 50)) == {"ok": 50}
        assert one.production.log.accepted == 50


async def test_goaway_leaves_what_was_begun_to_be_answered_and_the_rest_to_another_connection() -> None:
    async with apple() as one:
        await one.send()
        one.production.faults.script([Late(seconds=0.5)] * 10 + [GoesAway(answers=True)])
        assert await kinds(many(one, 11)) == {"ok": 11}
        assert (await one.send(key="after")).kind == "ok"
        assert one.production.connected == 2
        assert set(Counter(message.id for message in one.production.log.messages()).values()) == {1}
        async with asyncio.timeout(WAIT_SECONDS):  # the old one is closed when all is answered
            while len(connections(one)) > 1:
                await asyncio.sleep(0.01)


async def test_what_goaway_says_was_not_begun_may_be_sent_again() -> None:
    async with apple() as one:
        await one.send()
        one.production.faults.script([GoesAway()])
        assert (await one.send()).kind == "transient"
        assert (await one.send()).kind == "ok"
        assert one.production.connected == 2


@pytest.mark.parametrize("accepts", [False, True])
async def test_a_broken_connection_is_said_to_be_and_nothing_is_sent_again(accepts: bool) -> None:
    """aioapns' pool sends up to five times what may have been sent."""
    async with apple() as one:
        one.production.faults.script([Resets(accepts=accepts)])
        outcome = await one.send()
        assert (outcome.kind, outcome.code) == ("ambiguous", "connection_lost")
        assert one.production.log.accepted == int(accepts)
        assert (await one.send(key="b")).kind == "ok"


async def test_no_answer_in_time_is_ambiguous_and_takes_only_itself_along() -> None:
    async with apple() as one:
        await one.send()
        one.production.faults.script([Hangs(accepts=True)])
        slow = asyncio.create_task(one.send(key="slow", seconds=1.0))
        await under_way(one, 1)
        others = await kinds(many(one, 20))
        outcome = await slow
        assert (outcome.kind, outcome.code) == ("ambiguous", "timeout")
        assert others == {"ok": 20}
        assert one.production.connected == 1
        assert [connection.load for connection in connections(one)] == [0]


async def test_a_peer_that_has_fallen_silent_is_given_up() -> None:
    """As a machine that lost power, or was stopped: TCP would try for a quarter of an hour."""
    async with apple() as one:
        await one.send()
        for connection in one.production.connections:
            connection._transport.pause_reading()
        assert (await one.send(key="lost", seconds=0.5)).kind == "ambiguous"
        assert (await one.send(key="next")).kind == "ok"
        assert one.production.connected == 2


async def test_a_connection_that_a_network_forgot_while_idle_costs_no_push(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apns_pool, "ALIVE_SECONDS", 0.3)
    async with apple() as one:
        await one.send()
        for connection in one.production.connections:
            connection._transport.pause_reading()
        for ours in connections(one):
            ours.heard_at -= 60
        assert (await one.send(key="next")).kind == "ok", "it was asked first, and did not answer"
        assert one.production.connected == 2


async def test_an_idle_connection_that_answers_is_used_again() -> None:
    async with apple() as one:
        await one.send()
        for ours in connections(one):
            ours.heard_at -= 60
        assert (await one.send(key="next")).kind == "ok"
        assert one.production.connected == 1


async def test_tls_that_fails_is_transient_and_nothing_has_left() -> None:
    async with apple() as one:
        one.production.faults.script([NoTls()])
        outcome = await one.send()
        assert outcome.kind == "transient"
        assert outcome.code in ("tls", "connect"), "uvloop may report the alert as a reset"
        assert (await one.send()).kind == "ok"


async def test_a_server_that_is_not_apples_gets_nothing() -> None:
    async with apple() as one:
        pool = ApnsPool("127.0.0.1", one.production.port)  # trusts public authorities only
        sender = ApnsSender(
            "apple", ApnsToken(apple_key(), KEY_ID, TEAM_ID), pools={"production": pool, "sandbox": pool}
        )
        outcome = await Apple(sender, one.production, one.sandbox).send()
        assert (outcome.kind, outcome.code) == ("transient", "tls")
        assert one.production.faults.met == []
        assert one.production.log.accepted == 0


async def test_nobody_there_is_transient() -> None:
    async with apple() as one:
        await one.production.stop()
        outcome = await one.send()
    assert (outcome.kind, outcome.code) == ("transient", "connect")


async def test_there_are_never_more_connections_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apns_pool, "CONNECTIONS_MAX", 2)
    async with apple() as one:
        one.production.faults.script([Late(seconds=0.3)] * 4)
        assert await kinds(many(one, 60)) == {"ok": 60}
        assert one.production.connected <= 2


async def test_closing_ends_what_is_under_way_and_leaves_no_connection() -> None:
    async with apple() as one:
        await one.send()
        one.production.faults.stand(Hangs())
        tasks = many(one, 5)
        await under_way(one, 5)
        await one.sender.close()
        assert await kinds(tasks) == {"ambiguous": 5}
        assert connections(one) == []


def test_what_is_overridden_is_still_there() -> None:
    """Fails when a new aioapns or h2 has moved it: then the guard has to be read again."""
    base = aioapns.connection.APNsTLSClientProtocol
    for name in (
        "connection_made",
        "connection_lost",
        "data_received",
        "flush",
        "close",
        "on_connection_terminated",
        "is_busy",
    ):
        assert hasattr(base, name), name
    assert list(inspect.signature(base.__init__).parameters) == [
        "self", "apns_topic", "loop", "on_connection_lost", "auth_provider",
    ]  # fmt: skip
    assert "state_machine" in vars(h2.connection.H2Connection())
    assert list(inspect.signature(h2.connection.H2Connection._receive_goaway_frame).parameters) == ["self", "frame"]
