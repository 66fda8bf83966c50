"""Devices that reconnect for ever and remember all they were given: the judges of gateways that fail."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.support.tokens import token

NOBODYS_FAULTS = ("sign_outs_unknown", "the token could not be checked in time", "no `hello` within", "a ping was not")
"""How errors begin that end a session for a while only: a gateway that cannot hear who was signed out believes nobody, and
a machine that stands still answers late. The device comes again, and goes on from its cursor."""


@dataclass
class FleetDevice:
    """One device of one user. A hole, a repetition or a step back is a fault the moment it is seen.

    It comes again at once, whatever it was told; `patient`: when it was told to.
    """

    user: str
    patient: bool = False
    cursor: str = "start"
    seqs: list[int] = field(default_factory=list)
    resets: list[str] = field(default_factory=list)
    connects: int = 0
    live: asyncio.Event = field(default_factory=asyncio.Event)
    faults: list[str] = field(default_factory=list)
    told_ms: list[int] = field(default_factory=list)
    _waits_ms: int = 0
    _held: int | None = None
    _socket: aiohttp.ClientWebSocketResponse | None = None

    async def run(self, http: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
        """Stay connected, whatever happens."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(10):
                    socket = await http.ws_connect(f"{url}/v1/ws", heartbeat=10.0)
                try:
                    self._socket = socket
                    self.connects += 1
                    await socket.send_json(
                        {"op": "hello", "token": token(self.user), "device": "d", "cursor": self.cursor}
                    )
                    async for message in socket:
                        if message.type is aiohttp.WSMsgType.TEXT:
                            self._take(json.loads(message.data))
                finally:
                    self._socket = None
                    self.live.clear()
                    await socket.close()
            await asyncio.sleep(self._waits_ms / 1000 if self.patient and self._waits_ms else rng.uniform(0.02, 0.2))
            self._waits_ms = 0

    async def reconnect(self) -> None:
        """Drop the connection, as a train in a tunnel would."""
        socket = self._socket
        if socket is not None and (connection := socket._response.connection) is not None and connection.transport:
            connection.transport.abort()

    def _take(self, frame: dict[str, Any]) -> None:
        op = frame["op"]
        if op in ("record", "skip"):
            if frame["prev"] != self._held:
                self.faults.append(f"{self.user}: prev {frame['prev']} where {self._held} was held")
            if self.seqs and frame["seq"] <= self.seqs[-1]:
                self.faults.append(f"{self.user}: {frame['seq']} after {self.seqs[-1]}")
            self.seqs.append(frame["seq"])
        elif op == "reset":
            self.resets.append(frame["reason"])
        elif op == "bye":
            self._waits_ms = frame["retry_after_ms"]
            self.told_ms.append(self._waits_ms)
        elif op == "live":
            self.live.set()
        elif op == "error" and not frame["detail"].startswith(NOBODYS_FAULTS):
            self.faults.append(f"{self.user}: {frame}")
        if frame.get("cursor"):
            self.cursor = frame["cursor"]
            self._held = int(self.cursor.split(".")[1])


@asynccontextmanager
async def fleet(
    users: Sequence[str], url: str, rng: random.Random, *, patient: bool = False
) -> AsyncIterator[list[FleetDevice]]:
    """A device for each user, connected and caught up once."""
    devices = [FleetDevice(user, patient) for user in users]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        tasks = [asyncio.create_task(device.run(http, url, rng), name=f"device-{device.user}") for device in devices]
        try:
            async with asyncio.timeout(60):
                for device in devices:
                    await device.live.wait()
            yield devices
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
