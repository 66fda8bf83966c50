"""nats-py's client as the engine uses it: another parser, and no error that ends or hangs it without a reconnect.

It stands on private parts of nats-py; tests/integration/test_seam.py fails when they move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import Client

from engine.broker import wire

AT_ONCE_BYTES_MAX = 64 << 10
"""The largest read that is handled in the socket's callback. A larger one goes through the read loop, so that other tasks get
their turn. A stream reader holds as much before it pauses the socket: twice nats-py's `DEFAULT_BUFFER_SIZE`."""

RECONNECT_END_SECONDS = 0.5
"""How long after a cancellation that was lost the next one is sent."""


class EngineClient(Client):
    """nats-py's client with its parser replaced, and with those faults put right that would end or hang it without a reconnect.

    Args:
        on_refusal: called with the words of a permission violation.
    """

    def __init__(self, on_refusal: Callable[[str], None]) -> None:
        super().__init__()
        self.parser = wire.HotParser(self)
        self._ps = self.parser  # type: ignore[assignment]
        self._on_refusal = on_refusal

    async def _connect_to_server(self, s: Any) -> None:
        # nats-py forgets the socket of an attempt that failed after the TCP handshake: each would leak.
        transport = outgoing(self)
        if transport is not None:
            transport.abort()
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except (RuntimeError, ValueError) as error:
            # uvloop's word for a socket that is gone, or an INFO that is none: another attempt, not the end of all.
            raise ConnectionResetError(str(error)) from error
        transport = outgoing(self)
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection was lost while it was made")
        # The old connection may have left half a message after nats-py's own reset.
        self.parser.reset()
        self._take_at_once()

    def _take_at_once(self) -> None:
        """Have messages handled where they arrive. nats-py's read loop gets all else, and everything while it is at work.

        To wake its task for each read costs a future, a turn of the loop and three coroutines.
        """
        reader = getattr(self._transport, "_io_reader", None)
        if reader is None:
            return
        feed_reader: Callable[[bytes], None] = reader.feed_data

        def feed_data(data: bytes) -> None:
            # Unless the reader pauses it, uvloop reads on, 256 KB up to 32 times in a turn of the loop. The reader pauses it
            # above AT_ONCE_BYTES_MAX; what is handled here never gets to the reader, so it must stay below.
            is_small = len(data) <= AT_ONCE_BYTES_MAX
            if is_small and getattr(reader, "_waiter", None) is not None and self.is_connected:
                data = self.parser.take(data)
            if data:
                feed_reader(data)

        reader.feed_data = feed_data

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        await super()._close(status, do_cbs)
        # nats-py cancels its reconnecting once and looks away. An attempt that fails in that very moment takes the
        # cancellation for its own end, and the next one follows: the process would never end.
        task = self._reconnection_task
        while task is not None and task is not asyncio.current_task() and not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=RECONNECT_END_SECONDS)

    async def _process_op_err(self, e: Exception) -> None:
        # The reconnect first closes the old transport gracefully, which waits for a peer that may never read again.
        transport = outgoing(self)
        if transport is not None and not self.is_closed and not self.is_reconnecting:
            transport.abort()
        await super()._process_op_err(e)

    async def _process_err(self, err_msg: str) -> None:
        # nats-py closes for good over most of these. A server that means it closes the connection, and we reconnect.
        lowered = err_msg.lower()
        if "permissions violation" in lowered:
            self._on_refusal(err_msg)
        elif "stale connection" in lowered:
            await self._process_op_err(nats.errors.StaleConnectionError())
        else:
            self._err = nats.errors.Error(f"nats: {err_msg}")
            await self._error_cb(self._err)

    async def _process_pong(self) -> None:
        # nats-py raises over a PONG whose flush has given up, and its read loop ends.
        self._pings_outstanding = 0
        if self._pongs:
            self._pongs_received += 1
            pong = self._pongs.pop(0)
            if not pong.done():
                pong.set_result(True)

    async def _read_loop(self) -> None:
        await super()._read_loop()
        # It ends over any exception it does not know; unanswered pings would be the next to notice.
        task = asyncio.current_task()
        if self.is_connected and task is not None and task is self._reading_task and not task.cancelling():
            await self._process_op_err(nats.errors.UnexpectedEOF())


def outgoing(client: Client) -> asyncio.WriteTransport | None:
    """The socket transport under nats-py, or None before the first connect."""
    writer = getattr(client._transport, "_io_writer", None)
    return writer.transport if writer is not None else None
