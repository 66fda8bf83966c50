"""Devices on the Python SDK that write into a ledger what goes over the wire, and what their app is given."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from chaos.ledger import Ledger
from seamark.backoff import Backoff
from seamark.client.connection import Connection
from seamark.client.items import Live, Record, Reset
from seamark.client.receiver import Advance, Deliver, Joined, Outcome, Restore
from seamark.client.session import Session
from seamark.protocol.cursor import START, parse_cursor
from seamark.protocol.frames import Ack, ClientFrame, Hello
from tests.support.network import BadNetwork
from tests.support.tokens import token


class Sessions:
    """Writes the sessions of one device into a ledger, one after the other."""

    def __init__(self, ledger: Ledger, user: str, device: str) -> None:
        self._ledger = ledger
        self._user = user
        self._device = device
        self._number = 0
        self._call = 0
        self.name = ""
        """Of the newest session."""
        self.begun = False
        """Whether that one has a position."""
        self.acknowledged = 0
        """The highest sequence that was."""

    def ask(self, cursor: str | None) -> None:
        """Another session is asked for."""
        self._number += 1
        self.name, self.begun = f"{self._user}/{self._device}/{self._number}", False
        asked = None if cursor in (None, START) else _place(cursor)
        facts = {"session": self.name, "user": self._user, "device": self._device, "cursor": asked}
        self._call = self._ledger.invoke(self._user, "open", **facts)

    def begin(self, cursor: str, reason: str | None = None) -> None:
        """It stands: resumed at `cursor`, or put there for a reason."""
        if self.begun:
            self.ask(None)
        self.begun = True
        how = {"resumed": reason is None, "reason": reason, "start": _place(cursor)}
        self._ledger.end(self._call, self._user, "open", "ok", session=self.name, **how)

    def deliver(self, cursor: str, event: str | None = None, prev: int | None = None) -> None:
        """It was given an event, or only a position."""
        epoch, seq = _place(cursor)
        self._ledger.note(self._user, "deliver", session=self.name, epoch=epoch, seq=seq, prev=prev, event=event)

    def acknowledge(self, session: str, cursor: str) -> None:
        """It has said that it is done with everything up to there."""
        epoch, seq = _place(cursor)
        self._ledger.note(self._user, "ack", session=session, epoch=epoch, seq=seq)
        self.acknowledged = max(self.acknowledged, seq)

    def settle(self) -> None:
        """It has been given the time to get everything."""
        if self.begun:
            self._ledger.note(self._user, "settle", session=self.name)


def _place(cursor: str) -> list[Any]:
    at = parse_cursor(cursor)
    return [at.epoch, at.seq]


def _watch(session: Session, sessions: Sessions) -> None:
    """Write down where the session asks to resume, and each ack that goes out on it."""
    send = session.send

    async def watched(frame: ClientFrame) -> bool:
        if isinstance(frame, Hello):
            sessions.ask(frame.cursor)
        name = sessions.name
        sent = await send(frame)
        if sent and isinstance(frame, Ack):
            sessions.acknowledge(name, frame.cursor)
        return sent

    session.send = watched  # type: ignore[method-assign]


class WatchedConnection(Connection):
    """A connection that writes down what goes over the wire: where it asks to resume, what it is given and acknowledges."""

    def __init__(self, url: str, sessions: Sessions, **options: Any) -> None:
        super().__init__(url, **options)
        self._sessions = sessions
        begins = self._uplink.begins

        def begins_watched(session: Session) -> None:
            _watch(session, sessions)
            begins(session)

        self._uplink.begins = begins_watched  # type: ignore[method-assign]

    async def _handle(self, outcome: Outcome) -> None:
        match outcome:
            case Joined(frame) if frame.resumed:
                self._sessions.begin(str(frame.cursor))
            case Restore(frame):
                self._sessions.begin(frame.cursor, frame.reason)
            case Deliver(frame):
                self._sessions.deliver(frame.cursor, msgspec.json.decode(frame.record)["id"], frame.prev)
            case Advance(to):
                self._sessions.deliver(to.cursor)
        await super()._handle(outcome)


class Device:
    """A user's device: reads its log from the start, for ever.

    In the ledger it is two devices: `wire`, with a session for each connection, and `app`, which reads one sequence over
    all of them; only a `Reset` begins another one.
    """

    def __init__(self, ledger: Ledger, user: str, url: str) -> None:
        self.user = user
        self.last_seq = 0
        self.last_event = ""
        self.resets: list[str] = []
        self._wire, self._app = Sessions(ledger, user, "wire"), Sessions(ledger, user, "app")
        self.connection = WatchedConnection(
            url, self._wire, token=lambda: token(user), device="d", cursor=START, backoff=Backoff(0.05, 1.0)
        )

    @property
    def acknowledged(self) -> int:
        """How far it has told the gateway."""
        return self._wire.acknowledged

    async def run(self) -> None:
        self._app.ask(START)
        async with self.connection as connection:
            async for item in connection.events():
                match item:
                    case Record():
                        self._deliver(item)
                    case Reset():
                        self.resets.append(item.reason)
                        self._app.begin(item.cursor, item.reason)
                    case Live():
                        self._stand(item.cursor)

    def _stand(self, cursor: str) -> None:
        """The log is read from its start; `cursor` tells the epoch."""
        if not self._app.begun:
            self._app.begin(f"{parse_cursor(cursor).epoch}.0")

    def _deliver(self, record: Record) -> None:
        self._stand(record.cursor)
        self._app.deliver(record.cursor, record.id)
        self.last_seq = record.seq
        self.last_event = record.id

    def settle(self) -> None:
        """It has been given the time to get everything."""
        for sessions in (self._wire, self._app):
            sessions.settle()


async def caught_up(found: Sequence[Device], lasts: dict[str, int]) -> bool:
    """Has every device got and acknowledged the last record of its user's log?"""
    return all(min(device.last_seq, device.acknowledged) >= lasts.get(device.user, 0) for device in found)


@contextlib.asynccontextmanager
async def devices(ledger: Ledger, users: Sequence[str], url: str) -> AsyncIterator[list[Device]]:
    """One device for each user, connected until the end."""
    found = [Device(ledger, user, url) for user in users]
    tasks = [asyncio.create_task(device.run(), name=f"device {device.user}") for device in found]
    try:
        yield found
        for task in tasks:
            assert not task.done(), task
    finally:
        for device in found:
            await device.connection.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cut_now_and_then(network: BadNetwork, rng: random.Random, pause_seconds: tuple[float, float]) -> None:
    """A device now and then loses its connection without a word, as in a tunnel, for ever."""
    while True:
        await asyncio.sleep(rng.uniform(*pause_seconds))
        network.reset_one(rng)
