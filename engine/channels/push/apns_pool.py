"""The connections to one server of APNs: few, shared, opened when they are needed, never more than a bound."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Final

import structlog

from engine.channels.push.apns_connection import Answer, ApnsConnection, NotDone

_log = structlog.get_logger("seamark.apns")

CONNECTIONS_MAX: Final = 4
"""Of one worker: 4000 requests at once. Apple counts connections, not only requests."""

CONNECT_SECONDS: Final = 10.0
"""For name, TCP, TLS and the server's SETTINGS together."""

ALIVE_SECONDS: Final = 3.0
"""How long the answer to a PING may take."""


class ApnsPool:
    """Connections to one server.

    Args:
        host, port: of the server.
        tls: whom to trust; by default the system's authorities.
    """

    def __init__(self, host: str, port: int = 443, tls: ssl.SSLContext | None = None) -> None:
        self.host = host
        self._port = port
        self._tls = tls or ssl.create_default_context()
        self._tls.set_alpn_protocols(["h2"])
        self._connections: list[ApnsConnection] = []
        self._opening = asyncio.Lock()

    async def request(self, headers: Sequence[tuple[str, str]], body: bytes, deadline_seconds: float) -> Answer:
        """Make one request, once.

        Raises:
            NotDone: it may be sent again. Unknown: it may have been sent.
        """
        until = asyncio.get_running_loop().time() + deadline_seconds
        try:
            async with asyncio.timeout_at(until):
                connection = await self._acquire()
        except TimeoutError as error:
            raise NotDone("timeout") from error
        return await connection.request(headers, body, until)

    async def close(self) -> None:
        """Close all connections, and wait for that, but not for a peer that does not answer."""
        for connection in tuple(self._connections):
            connection.abort()
            await connection.lost.wait()

    async def _acquire(self) -> ApnsConnection:
        """A connection with room, or where there may be no further one, that with the fewest requests under way."""
        while (connection := self._free()) is None:
            async with self._opening:
                if self._free() is None:
                    if len(usable := self._usable()) >= CONNECTIONS_MAX:
                        return min(usable, key=lambda one: one.load)
                    return await self._open()
        try:
            async with asyncio.timeout(ALIVE_SECONDS):
                await connection.wait_alive()
        except (TimeoutError, NotDone):
            connection.abort()
            return await self._acquire()
        return connection

    def _usable(self) -> list[ApnsConnection]:
        return [one for one in self._connections if one.usable]

    def _free(self) -> ApnsConnection | None:
        return min((one for one in self._usable() if not one.is_busy), key=lambda one: one.load, default=None)

    async def _open(self) -> ApnsConnection:
        connection: ApnsConnection | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                transport, connection = await loop.create_connection(
                    lambda: ApnsConnection(self._forget), self.host, self._port, ssl=self._tls
                )
                if transport.get_extra_info("ssl_object").selected_alpn_protocol() != "h2":
                    raise NotDone("tls")
                await connection.wait_ready()
        except BaseException as error:
            if connection is not None:
                connection.abort()
            if isinstance(error, TimeoutError | OSError):
                why = "tls" if isinstance(error, ssl.SSLError) else "connect"
                _log.warning("apns_not_reached", host=self.host, why=why, error=type(error).__name__)
                raise NotDone(why) from error
            raise
        self._connections.append(connection)
        return connection

    def _forget(self, connection: ApnsConnection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
