"""One connection to the broker: nats-py keeps it (auth, TLS, reconnect, pings); subscriptions and requests are hot.

What nats-py leaves open is closed here: a publish while disconnected fails at once instead of waiting in a buffer that may
be lost, requests in flight fail when the connection does, and a half-open connection is aborted, not drained for ever.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import nats.errors
import structlog
from nats.aio.subscription import Subscription as NatsSubscription
from nats.nuid import NUID

from engine.broker import wire
from engine.broker.client import EngineClient, outgoing
from engine.broker.refusals import TOO_LARGE
from engine.broker.settings import NatsSettings
from engine.errors import ApiError, BrokerError, Forbidden, Unanswered, Unavailable
from engine.limits import OUTBOUND_BYTES_MAX
from seamark.protocol.logins import login_of, shown

_log = structlog.get_logger("seamark.nats")

CONFIRM_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 10.0
CLOSE_TIMEOUT_SECONDS = 5.0
REFUSAL_LOG_SECONDS = 60.0
PING_INTERVAL_SECONDS = 3.0
"""Two unanswered pings end a half-open connection: after 9 s at most, within the time a leader election takes anyway."""

_REFUSAL = re.compile(r'for (Publish|Subscription) to "([^"]*)"')

_NO_QUEUE: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
"""Stands in for the queue of subscriptions that never use it."""


class Delivery(NamedTuple):
    """A message as slices of the read buffer; read headers with `wire.header`."""

    subject: bytes
    reply: bytes
    headers: bytes
    payload: bytes


_Waiting = tuple[Callable[[Delivery | BrokerError], None], Callable[[str], bool]]
"""Who waits for answers on a reply subject, and whether a refused subject is one it published to."""


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
            Unanswered: no PONG within 5 s, or the connection was lost. Forbidden: this user may not subscribe here.
        """
        await self._connection.flush()
        if self.subject in self._connection._refused:
            raise Forbidden(f"subscribing to {_kind(self.subject)} is not permitted to this user")

    def unsubscribe(self) -> None:
        """End the interest; messages already read are still handled."""
        self._connection._unsubscribe(self._sid)

    async def drain(self) -> None:
        """End the interest; returns once all that this server had sent before has been handled (UNSUB, PING, PONG).

        Other servers of a cluster hear of it later: what they pass on until then is dropped.

        Raises:
            Unanswered: no PONG within 5 s, or the connection was lost.
        """
        self._connection._unsubscribe(self._sid, keep_handler=True)
        try:
            await self._connection.flush()
        finally:
            self.unsubscribe()


class Connection:
    """Subscriptions, requests and writes on one connection. `nc` is the nats-py client, for control work only."""

    def __init__(self, settings: NatsSettings) -> None:
        self.settings = settings
        self.nc = EngineClient(self._on_refusal)
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_disconnect: list[Callable[[], None]] = []
        self.on_doubt: list[Callable[[], None]] = []
        self._inbox = f"{settings.inbox_prefix}.{NUID().next().decode()}".encode()
        self._tokens = itertools.count(1)
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._waiting: dict[bytes, _Waiting] = {}
        self._next_ping: asyncio.Future[bool] | None = None
        self._pings: set[asyncio.Future[bool]] = set()
        self._refused: set[str] = set()
        self._refusals_logged: dict[str, float] = {}

    async def open(self) -> None:
        """Connect, and from then on reconnect for ever.

        Raises:
            Unavailable: no server answered within 10 s.
        """
        settings = self.settings
        login = login_of(settings.url, settings.user, settings.password, settings.credentials_file)
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
                    **login,
                )
                self.subscribe(self._inbox.decode() + ".*", self._on_reply)
                await self.flush()
        except (TimeoutError, OSError, nats.errors.Error, Unanswered) as error:
            why = self.nc.last_error or error
            await self._end()
            raise Unavailable(
                f"no NATS server takes us in at {shown(settings.url)}: {type(why).__name__} {why}"
            ) from error

    @property
    def connected(self) -> bool:
        return self.nc.is_connected

    def subscribe(self, subject: str, callback: wire.Handler, *, queue: str = "") -> Subscription:
        """Register interest; `callback` runs for each message, where the socket is read. Await `confirmed()` where order matters.

        Args:
            queue: each message goes to one of those who subscribe under this name.
        """
        client = self.nc
        client._sid += 1
        sid = client._sid
        # In nats-py's own table so that it is replayed after a reconnect, but never started: no task, no queue.
        client._subs[sid] = entry = NatsSubscription(client, sid, subject, queue, pending_msgs_limit=1)
        entry._pending_queue = _NO_QUEUE  # its own would cost 3 KB for each connected user
        client.parser.handlers[b"%d" % sid] = callback
        named = f"{subject} {queue}" if queue else subject
        self._gather(b"SUB %b %d\r\n" % (named.encode(), sid))
        return Subscription(self, sid, subject)

    def _unsubscribe(self, sid: int, *, keep_handler: bool = False) -> None:
        entry = self.nc._subs.pop(sid, None)
        if not keep_handler:
            self.nc.parser.handlers.pop(b"%d" % sid, None)
        if entry is not None:
            self._refused.discard(entry.subject)
            self._gather(b"UNSUB %d\r\n" % sid)

    def _gather(self, data: bytes) -> None:
        """Write `data` with all else of this turn of the loop: a write by itself costs some 50 us."""
        if not self._gathered:
            asyncio.get_running_loop().call_soon(self._write_gathered)
        self._gathered.append(data)
        self._gathered_bytes += len(data)

    def _write_gathered(self) -> None:
        """Where this writes nothing, who waits for an answer has been failed, and a reconnect replays subscriptions."""
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        transport = outgoing(self.nc)
        if gathered and transport is not None and self.nc.is_connected and not transport.is_closing():
            transport.write(b"".join(gathered))

    def write(self, data: bytes) -> None:
        """Hand raw protocol bytes to the socket.

        Raises:
            Unavailable: not connected, or more than 64 MiB wait to be written: the broker has stopped reading.
        """
        transport = outgoing(self.nc)
        if transport is None or not self.nc.is_connected or transport.is_closing():
            raise Unavailable("not connected to NATS")
        if transport.get_write_buffer_size() + self._gathered_bytes > OUTBOUND_BYTES_MAX:
            raise Unavailable(f"NATS has not read {OUTBOUND_BYTES_MAX >> 20} MiB that wait to be written")
        self._gather(data)

    def publish(
        self,
        subject: str | bytes,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        reply: str | bytes = b"",
    ) -> None:
        """Core NATS, at most once, no answer.

        Raises:
            Unavailable: as `write`. ApiError: 10054, larger than the server takes.
        """
        lines = wire.header_lines(headers) if headers else b""
        self._check_size(len(lines) + len(payload))
        self.write(wire.encode_publish(_bytes(subject), _bytes(reply), lines, payload))

    def _check_size(self, size: int) -> None:
        """The server would close the connection over it, and with it whatever else is in flight."""
        if size > self.nc.max_payload:
            raise ApiError(
                413, TOO_LARGE, f"a message of {size} bytes is above the server's max_payload of {self.nc.max_payload}"
            )

    def expect(self, callback: Callable[[Delivery | BrokerError], None], concerns: Callable[[str], bool]) -> bytes:
        """A reply subject whose messages go to `callback`; an error says that none will come. End it with `forget`.

        Args:
            concerns: is this subject, which the server refuses, one of those published to?
        """
        token = b"%x" % next(self._tokens)
        self._waiting[token] = callback, concerns
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
            Forbidden: this user may not publish there. ApiError: 10054, larger than the server takes.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Delivery] = loop.create_future()
        reply = self.expect(functools.partial(settle, answer), subject.__eq__)
        # A timer by itself: `asyncio.timeout` costs five times as much, and this is asked for each job.
        silence = loop.call_later(timeout_seconds, _give_up, answer, subject, timeout_seconds)
        try:
            self.publish(subject, payload, headers, reply)
            delivery = await answer
        finally:
            silence.cancel()
            self.forget(reply)
        if not delivery.payload and wire.status(delivery.headers) == 503:
            raise Unavailable(f"nobody answers on {_kind(subject)}")
        return delivery

    async def flush(self) -> None:
        """Returns once the server has processed all that was written before.

        Raises:
            Unanswered: not within 5 s, or the connection was lost.
        """
        ping = self._next_ping
        if ping is None:
            # All who ask in this turn of the loop share a PING; who asks later has written later and needs another.
            loop = asyncio.get_running_loop()
            ping = self._next_ping = loop.create_future()
            loop.call_soon(self._ping, ping)
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_SECONDS):
                answered = await asyncio.shield(ping)
        except TimeoutError as error:
            raise Unanswered("the NATS server did not answer a ping") from error
        if not answered:
            raise Unanswered("the connection to NATS was lost before it answered a ping")

    def _ping(self, ping: asyncio.Future[bool]) -> None:
        self._next_ping = None
        if not self.nc.is_connected:
            ping.set_result(False)
            return
        self._pings.add(ping)
        ping.add_done_callback(self._pings.discard)
        self.nc._pongs.append(ping)
        self._gather(b"PING\r\n")
        self._write_gathered()  # at once: nats-py's own pings must not come between this one and its place in the queue

    async def close(self) -> None:
        """Write what waits and close, within about ten seconds; requests in flight fail."""
        if self.nc.is_connected:
            try:
                await self.flush()
            except Unanswered:
                _log.warning("closed_unanswered")
                transport = outgoing(self.nc)
                if transport is not None:
                    transport.abort()
        self._fail_waiting()
        await self._end()

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await self.nc.close()
        except (TimeoutError, OSError) as error:
            _log.warning("connection_closed_badly", error=type(error).__name__)

    def _on_reply(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        waiting = self._waiting.get(subject[len(self._inbox) + 1 :])
        if waiting is not None:
            waiting[0](Delivery(subject, reply, headers, payload))

    def _fail_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for callback, _ in waiting.values():
            callback(Unanswered("the connection to NATS was lost before the answer"))
        for ping in list(self._pings):
            if not ping.done():  # one answered in this very turn is still here
                ping.set_result(False)

    def _on_refusal(self, words: str) -> None:
        """A permission violation: it names the subject, not who asked, so everyone who asked for that subject fails."""
        found = _REFUSAL.search(words)
        what, subject = (found[1], found[2]) if found else ("", "")
        if what == "Subscription":
            self._refused.add(subject)
        elif what == "Publish":
            for callback in [callback for callback, concerns in self._waiting.values() if concerns(subject)]:
                callback(Forbidden(f"publishing to {_kind(subject)} is not permitted to this user"))
        now, kind = time.monotonic(), f"{what} {_kind(subject)}" if found else words[:200]
        if now - self._refusals_logged.get(kind, -REFUSAL_LOG_SECONDS) >= REFUSAL_LOG_SECONDS:
            self._refusals_logged[kind] = now
            _log.error("nats_forbids", what=kind, user=self.settings.user)

    async def _on_disconnect(self) -> None:
        self._gathered, self._gathered_bytes = [], 0
        if not self.nc.is_closed:
            _log.warning("nats_disconnected")
        self._fail_waiting()
        self._refused.clear()
        _call(self.on_disconnect)

    async def _on_reconnect(self) -> None:
        _log.info("nats_reconnected")
        _call(self.on_reconnect)

    async def _on_error(self, error: Exception) -> None:
        # While there is no connection each attempt fails, four times a second; that it is gone has been said once.
        say = _log.warning if self.nc.is_connected else _log.debug
        say("NATS error", error=type(error).__name__, detail=str(error)[:200])
        _call(self.on_doubt)


def _call(callbacks: Iterable[Callable[[], None]]) -> None:
    """Each of them, whatever another one does: an exception here would end nats-py's tasks without a word."""
    for callback in list(callbacks):
        try:
            callback()
        except Exception:
            _log.exception("connection_callback_failed")


def _give_up(answer: asyncio.Future[Delivery], subject: str, seconds: float) -> None:
    settle(answer, Unanswered(f"no answer on {_kind(subject)} within {seconds} s"))


def settle(future: asyncio.Future[Delivery], outcome: Delivery | BrokerError) -> None:
    """Resolve `future` with what came, unless its waiter has given up."""
    if future.done():
        return
    if isinstance(outcome, BrokerError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _kind(subject: str) -> str:
    """A subject fit for logs and errors: users' subjects keep only their first two tokens."""
    return (
        subject if subject.startswith("$JS.API") and "DIRECT.GET" not in subject else ".".join(subject.split(".")[:2])
    )
