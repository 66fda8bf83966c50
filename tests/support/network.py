"""A bad network between a client and a server on loopback: delay, silence in one or both directions, resets, half-closes,
cut for a while, closed to WebSockets."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Way:
    """One direction. While `silent`, bytes are swallowed by nobody and passed on by nobody: they wait."""

    delay_seconds: float = 0.0
    refuse_upgrades: bool = False
    held: list[bytes] = field(default_factory=list)
    """What is on its way now: read here, not yet passed on."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    def silence(self) -> None:
        self._open.clear()

    def restore(self) -> None:
        self._open.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the end of the stream, which is passed on, or until nobody takes what is carried.

        Raises:
            OSError: who is read from is gone, or asks for what is refused.
        """
        while data := await reader.read(1 << 16):
            if self.refuse_upgrades and b"upgrade: websocket" in data.lower():
                raise ConnectionResetError("no upgrades here")
            self.held.append(data)
            try:
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                await self._open.wait()
            finally:
                self.held.remove(data)
            try:
                writer.write(data)
                await writer.drain()
            except (OSError, RuntimeError):  # uvloop raises the latter once a transport is closed
                return
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()


class BadNetwork:
    """Carries connections to `port` on 127.0.0.1, as badly as it is told to."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.to_server = Way()
        self.to_client = Way()
        self.refusing = False
        """New connections are reset at once."""
        self.port = 0
        self.connections = 0
        """How many have been carried."""
        self.refused = 0
        """How many were reset because of `refusing`."""

    @property
    def url(self) -> str:
        """Of an HTTP server behind it."""
        return f"http://127.0.0.1:{self.port}"

    def refuse_upgrades(self, *, on: bool = True) -> None:
        """Drop every connection that asks for a WebSocket, as some middleboxes do; `restore` does not change that."""
        self.to_server.refuse_upgrades = on

    def cut(self) -> None:
        """Reset every connection, and each new one, until `restore`."""
        self.refusing = True
        self.reset()

    def blackhole(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        self.to_server.silence()
        self.to_client.silence()

    def restore(self) -> None:
        """Everything gets through, also what waited."""
        self.refusing = False
        for way in (self.to_server, self.to_client):
            way.delay_seconds = 0.0
            way.restore()

    def reset(self) -> None:
        """RST to both sides of every connection; what was on its way is lost."""
        for pair in list(self._pairs):
            _reset(pair)

    def reset_one(self, rng: random.Random) -> None:
        """The same for one connection."""
        if self._pairs:
            _reset(rng.choice(sorted(self._pairs, key=id)))

    def half_close(self) -> None:
        """The client reads the end of the stream; what it writes still gets through."""
        for client, _ in list(self._pairs):
            with contextlib.suppress(OSError):
                client.write_eof()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            self.refused += 1
            writer.transport.abort()
            return
        try:
            there_reader, there = await asyncio.open_connection("127.0.0.1", self._target)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        if self.refusing:  # since then
            self.refused += 1
            _reset((writer, there))
            return
        self.connections += 1
        pair = (writer, there)
        self._pairs.add(pair)
        ways = [
            asyncio.create_task(self.to_server.carry(reader, there), name="to-server"),
            asyncio.create_task(self.to_client.carry(there_reader, writer), name="to-client"),
        ]
        try:
            with contextlib.suppress(OSError):  # one side is gone, so the other one is told
                await asyncio.gather(*ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._pairs.discard(pair)
            for one in pair:
                one.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="proxied")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _reset(pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
    for writer in pair:
        peer = writer.get_extra_info("socket")
        if peer is not None:
            with contextlib.suppress(OSError, ValueError):  # it has just been closed
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@contextlib.asynccontextmanager
async def bad_network(port: int) -> AsyncIterator[BadNetwork]:
    """A network to `port` on 127.0.0.1 that is good until it is told otherwise."""
    network = BadNetwork(port)
    await network.start()
    try:
        yield network
    finally:
        await network.close()
