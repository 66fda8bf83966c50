"""Devices on the Python SDK that write what they are given into a ledger."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence

import jwt

from chaos.ledger import Ledger
from engine.cursor import parse_cursor
from seamark.client.backoff import Backoff
from seamark.client.connection import Connection
from seamark.client.items import Live, Record, Reset
from tests.support.network import BadNetwork
from tests.support.roles import SECRET


class Device:
    """A user's device: reads its log from the start, for ever. A `Reset` begins another session in the ledger."""

    def __init__(self, ledger: Ledger, user: str, url: str) -> None:
        self.user = user
        self.records = 0
        self.last_seq = 0
        self.resets: list[str] = []
        self._ledger = ledger
        self._sessions = 0
        self._name = ""
        self.connection = Connection(
            url,
            token=lambda: jwt.encode({"sub": user, "tenant": "default", "exp": time.time() + 3600}, SECRET, "HS256"),
            device="d",
            cursor="start",
            backoff=Backoff(0.05, 1.0),
        )

    async def run(self) -> None:
        async with self.connection as connection:
            async for item in connection.events():
                match item:
                    case Record():
                        self._deliver(item)
                    case Reset():
                        self.resets.append(item.reason)
                        self._open(item.cursor, item.reason)
                    case Live() if not self._name:
                        self._open(item.cursor, None)

    def _open(self, cursor: str, reason: str | None) -> None:
        """`cursor` tells the epoch; without a reason the log is read from its start."""
        self._sessions += 1
        self._name = f"{self.user}/{self._sessions}"
        at = parse_cursor(cursor)
        facts = {"session": self._name, "user": self.user}
        call = self._ledger.invoke(self.user, "open", **facts, device="d", cursor=None)
        start = [at.epoch, at.seq if reason else 0]
        self._ledger.end(call, self.user, "open", "ok", **facts, resumed=reason is None, reason=reason, start=start)

    def _deliver(self, record: Record) -> None:
        if not self._name:
            self._open(record.cursor, None)
        at = parse_cursor(record.cursor)
        place = {"session": self._name, "epoch": at.epoch, "seq": record.seq}
        self._ledger.note(self.user, "deliver", **place, prev=None, event=record.id)
        self.records += 1
        self.last_seq = record.seq

    def settle(self) -> None:
        """It has been given the time to get everything."""
        if self._name:
            self._ledger.note(self.user, "settle", session=self._name)


async def caught_up(found: Sequence[Device], lasts: dict[str, int]) -> bool:
    """Has every device got the last record of its user's log?"""
    return all(device.last_seq >= lasts.get(device.user, 0) for device in found)


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
