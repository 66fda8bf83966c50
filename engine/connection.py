"""One connection to the broker: nats-py keeps it (auth, TLS, reconnect, pings); subscriptions and requests are hot.

What nats-py leaves open is closed here: a publish while disconnected fails at once instead of waiting in a buffer that may
be lost, requests in flight fail when the connection does, and a half-open connection is aborted, not drained for ever.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.subscription import Subscription as NatsSubscription
from nats.nuid import NUID

from engine import wire
from engine.errors import Unanswered, Unavailable
from engine.limits import OUTBOUND_BYTES_MAX

_log = structlog.get_logger("seamark.nats")

CONFIRM_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 10.0
PING_INTERVAL_SECONDS = 3.0
"""Two unanswered pings end a half-open connection: after 9 s at most, within the time a leader election takes anyway."""


_NO_QUEUE: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
"""Stands in for the queue of subscriptions that never use it."""


@dataclass(frozen=True, slots=True)
class NatsSettings:
    """Where the broker is and who we are to it.

    `inbox_prefix` keeps one role's replies unreadable for others (`nats/accounts.conf`). `url` may name several servers,
    separated by commas.
    """

    url: str
    user: str | None = None
    password: str | None = None
    credentials_file: str | None = None
    name: str = "seamark"
    inbox_prefix: str = "_INBOX"


class Delivery(NamedTuple):
    """A message as slices of the read buffer; read headers with `wire.header`."""

    subject: bytes
    reply: bytes
    headers: bytes
    payload: bytes


class _Client(Client):
    """nats-py's client, with its parser replaced and its reconnect unable to hang on a dead socket."""

    def __init__(self) -> None:
        super().__init__()
        self.parser = wire.HotParser(self)
        self._ps = self.parser  # type: ignore[assignment]

    async def _process_op_err(self, e: Exception) -> None:
        # The reconnect first closes the old transport gracefully, which waits for a peer that may never read again.
        transport = outgoing(self)
        if transport is not None and not self.is_closed and not self.is_reconnecting:
            transport.abort()
        await super()._process_op_err(e)


def outgoing(client: Client) -> asyncio.WriteTransport | None:
    """The socket transport under nats-py, or None before the first connect."""
    writer = getattr(client._transport, "_io_writer", None)
    return writer.transport if writer is not None else None


class Subscription:
    """Interest in a subject with a synchronous handler. It survives reconnects until `unsubscribe`."""

    __slots__ = ("_connection", "_sid", "subject")

    def __init__(self, connection: Connection, sid: int, subject: str) -> None:
        self._connection = connection
        self._sid = sid
        self.subject = subject

    async def confirmed(self) -> None:
        """Returns once the server has processed this subscription (SUB, PING, PONG; one PING serves all that wait).

        Raises:
            Unanswered: no PONG within 5 s.
        """
        await self._connection.flush()

    def unsubscribe(self) -> None:
        """End the interest; messages already read are still handled."""
        self._connection._unsubscribe(self._sid)


class Connection:
    """Subscriptions, requests and writes on one connection. `nc` is the nats-py client, for control work only."""

    def __init__(self, settings: NatsSettings) -> None:
        self.settings = settings
        self.nc = _Client()
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_disconnect: list[Callable[[], None]] = []
        self.on_doubt: list[Callable[[], None]] = []
        self._inbox = f"{settings.inbox_prefix}.{NUID().next().decode()}".encode()
        self._tokens = itertools.count(1)
        self._waiting: dict[bytes, Callable[[Delivery | None], None]] = {}
        self._flushing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, and from then on reconnect for ever.

        Raises:
            Unavailable: no server answered within 10 s.
        """
        settings = self.settings
        options: dict[str, Any] = {"user": settings.user, "password": settings.password} if settings.user else {}
        if settings.credentials_file:
            options["user_credentials"] = settings.credentials_file
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await self.nc.connect(
                    servers=settings.url.split(","),
                    name=settings.name,
                    inbox_prefix=settings.inbox_prefix,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.25,  # type: ignore[arg-type]
                    ping_interval=PING_INTERVAL_SECONDS,  # type: ignore[arg-type]
                    max_outstanding_pings=2,
                    connect_timeout=2,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnect,
                    reconnected_cb=self._on_reconnect,
                    **options,
                )
        except (TimeoutError, OSError, nats.errors.Error) as error:
            await self.nc.close()
            raise Unavailable(f"no NATS server answers at {_shown(settings.url)}: {error}") from error
        self.subscribe(self._inbox.decode() + ".*", self._on_reply)
        await self.flush()

    @property
    def connected(self) -> bool:
        return self.nc.is_connected

    def subscribe(self, subject: str, callback: wire.Handler) -> Subscription:
        """Register interest; `callback` runs in the read loop for each message. Await `confirmed()` where order matters."""
        client = self.nc
        client._sid += 1
        sid = client._sid
        # In nats-py's own table so that it is replayed after a reconnect, but never started: no task, no queue.
        client._subs[sid] = entry = NatsSubscription(client, sid, subject, pending_msgs_limit=1)
        entry._pending_queue = _NO_QUEUE  # its own would cost 3 KB for each connected user
        client.parser.handlers[b"%d" % sid] = callback
        if client.is_connected:
            self.write(b"SUB %b %d\r\n" % (subject.encode(), sid))
        return Subscription(self, sid, subject)

    def _unsubscribe(self, sid: int) -> None:
        self.nc._subs.pop(sid, None)
        self.nc.parser.handlers.pop(b"%d" % sid, None)
        if self.nc.is_connected:
            self.write(b"UNSUB %d\r\n" % sid)

    def write(self, data: bytes) -> None:
        """Hand raw protocol bytes to the socket.

        Raises:
            Unavailable: not connected, or more than 64 MiB wait to be written: the broker has stopped reading.
        """
        transport = outgoing(self.nc)
        if transport is None or not self.nc.is_connected or transport.is_closing():
            raise Unavailable("not connected to NATS")
        if transport.get_write_buffer_size() > OUTBOUND_BYTES_MAX:
            raise Unavailable(f"NATS has not read {OUTBOUND_BYTES_MAX >> 20} MiB that wait to be written")
        transport.write(data)

    def publish(
        self,
        subject: str | bytes,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        reply: str | bytes = b"",
    ) -> None:
        """Core NATS, at most once, no answer. Raises Unavailable as `write` does."""
        self.write(wire.encode_publish(_bytes(subject), _bytes(reply), wire.header_lines(headers), payload))

    def expect(self, callback: Callable[[Delivery | None], None]) -> bytes:
        """A reply subject whose messages go to `callback`; None says that the connection was lost. End it with `forget`."""
        token = b"%x" % next(self._tokens)
        self._waiting[token] = callback
        return self._inbox + b"." + token

    def forget(self, reply: bytes) -> None:
        """No more answers are expected on `reply`."""
        self._waiting.pop(reply[len(self._inbox) + 1 :], None)

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        timeout_seconds: float = 2.0,
    ) -> Delivery:
        """One question, one answer.

        Raises:
            Unavailable: nobody listens there, or not connected: nothing was done.
            Unanswered: no answer in time, or the connection was lost: the outcome is unknown.
        """
        answer: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        reply = self.expect(lambda delivery: _settle(answer, delivery))
        try:
            self.write(wire.encode_publish(subject.encode(), reply, wire.header_lines(headers), payload))
            async with asyncio.timeout(timeout_seconds):
                delivery = await answer
        except TimeoutError as error:
            raise Unanswered(f"no answer on {_kind(subject)} within {timeout_seconds} s") from error
        finally:
            self.forget(reply)
        if not delivery.payload and wire.status(delivery.headers) == 503:
            raise Unavailable(f"nobody answers on {_kind(subject)}")
        return delivery

    async def flush(self) -> None:
        """Returns once the server has processed all that was written before.

        Raises:
            Unanswered: not within 5 s.
        """
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush(), name="nats-flush")
            self._flushing.add_done_callback(_retrieved)
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_SECONDS):
                await asyncio.shield(self._flushing)
        except (TimeoutError, nats.errors.Error) as error:
            raise Unanswered("the NATS server did not answer a ping") from error

    async def _flush(self) -> None:
        # All who ask before the task starts share its PING; who asks later needs a PING of his own.
        self._flushing = None
        await self.nc.flush(timeout=int(CONFIRM_TIMEOUT_SECONDS))

    async def close(self) -> None:
        """Write what waits and close; requests in flight fail."""
        if self.nc.is_connected:
            try:
                await self.flush()
            except Unanswered:
                _log.warning("closing without an answer from the server")
        self._fail_waiting()
        await self.nc.close()

    def _on_reply(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        waiting = self._waiting.get(subject[len(self._inbox) + 1 :])
        if waiting is not None:
            waiting(Delivery(subject, reply, headers, payload))

    def _fail_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for callback in waiting.values():
            callback(None)

    async def _on_disconnect(self) -> None:
        _log.warning("disconnected from NATS")
        self._fail_waiting()
        for callback in self.on_disconnect:
            callback()

    async def _on_reconnect(self) -> None:
        _log.info("reconnected to NATS")
        for callback in self.on_reconnect:
            callback()

    async def _on_error(self, error: Exception) -> None:
        _log.warning("NATS error", error=type(error).__name__, detail=str(error)[:200])
        for callback in self.on_doubt:
            callback()


def _settle(future: asyncio.Future[Delivery], delivery: Delivery | None) -> None:
    if future.done():
        return
    if delivery is None:
        future.set_exception(Unanswered("the connection to NATS was lost before the answer"))
    else:
        future.set_result(delivery)


def _retrieved(task: asyncio.Task[None]) -> None:
    """Whoever waited has seen the error; if all gave up before, it is no news to anybody."""
    if not task.cancelled():
        task.exception()


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _kind(subject: str) -> str:
    """A subject fit for logs and errors: users' subjects keep only their first two tokens."""
    return (
        subject if subject.startswith("$JS.API") and "DIRECT.GET" not in subject else ".".join(subject.split(".")[:2])
    )


def _shown(url: str) -> str:
    """`url` without what stands before an @: passwords do not belong into errors."""
    return ",".join(part.split("@")[-1] for part in url.split(","))
