"""A door to a nats-server that knows the handshake, to hang up in the middle of it."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

from ops.dev.servers import HOST, NatsServer


class HangingUp:
    """A way to a server on which connections are reset at a stage of their handshake."""

    def __init__(self, server: NatsServer) -> None:
        self._target = server.port
        self.stage = ""
        self.hung_up = 0
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drop()
        self._server.close()

    def drop(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there = await asyncio.open_connection(HOST, self._target)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        self._open |= {writer, there}
        try:
            if self.stage:
                await self._hang_up(writer, there_reader, there, reader)
            else:
                await asyncio.gather(self._pump(reader, there), self._pump(there_reader, writer))
        finally:
            self._open -= {writer, there}
            writer.transport.abort()
            there.transport.abort()

    async def _hang_up(
        self,
        writer: asyncio.StreamWriter,
        there_reader: asyncio.StreamReader,
        there: asyncio.StreamWriter,
        reader: asyncio.StreamReader,
    ) -> None:
        info = await there_reader.readline()
        if self.stage == "info":
            writer.write(info)
        elif self.stage == "half info":
            writer.write(info[: len(info) // 2])
        elif self.stage == "no info":
            writer.write(b"INFO\r\n")
        elif self.stage == "pong":
            writer.write(info)
            for _ in range(2):
                there.write(await reader.readline())
            writer.write(await there_reader.readline())
        await writer.drain()
        # Zero seconds of linger: a reset, not an end of file.
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hung_up += 1

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
