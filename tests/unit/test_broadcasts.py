"""A broadcast shares the loop with live records, and a session that cannot take a now message now never gets it."""

import asyncio
from types import SimpleNamespace
from typing import Any

from gateway.limits import BROADCAST_SENDS_PER_TURN
from gateway.session.broadcasts import Broadcasts
from gateway.session.registry import Sessions
from seamark.protocol.cursor import Cursor
from tests.unit.test_session import Window, follower_on

FRAME = b'{"op":"now","type":"t","data":{},"id":null}'


class Broker:
    def subscribe(self, subject: str, callback: Any) -> None:
        self.tell = callback


async def test_between_a_few_sends_of_a_broadcast_the_loop_does_what_else_there_is_to_do() -> None:
    sessions, sent, turns = Sessions(), [], [0]

    async def count_turns() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    many = 10 * BROADCAST_SENDS_PER_TURN
    for _ in range(many):
        member: Any = SimpleNamespace(tenant="acme", now=lambda frame: sent.append(turns[0]))
        sessions.open(_Hashable(member))
    broker: Any = Broker()
    broadcasts = Broadcasts(broker, sessions)
    broadcasts.start()
    counting = asyncio.create_task(count_turns())
    broker.tell(b"broadcast.acme.system.down", b"", b"", b"{}")
    async with asyncio.timeout(30):
        while len(sent) < many:
            await asyncio.sleep(0)
    counting.cancel()
    await broadcasts.close()
    assert max(sent.count(turn) for turn in set(sent)) <= BROADCAST_SENDS_PER_TURN


class _Hashable:
    def __init__(self, member: Any) -> None:
        self.tenant, self.now = member.tenant, member.now


def test_a_now_message_is_sent_after_ready_where_there_is_room_and_only_to_clients_that_declare_it() -> None:
    window = Window()
    follower = follower_on(window)
    follower.takes_now = True
    follower.now(FRAME)
    follower.resumed(Cursor("e", 1))
    window.has_room = False
    follower.now(FRAME)
    window.has_room = True
    follower.writable()
    assert [frame["op"] for frame in window.frames] == ["ready"]
    follower.now(FRAME)
    assert [frame["op"] for frame in window.frames] == ["ready", "now"]
    follower.takes_now = False
    follower.now(FRAME)
    assert len(window.frames) == 2
