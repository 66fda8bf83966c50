"""Publishing straight into the streams of events, over a connection to the broker."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from seamark.client.errors import Again, PublishRefused
from seamark.protocol.appends import RETRIED_ERR_CODES, is_same, sealed
from seamark.protocol.events import Encoded
from seamark.protocol.logins import inbox_prefix_of, login_of, secret_of, shown
from seamark.protocol.now import Passing

log = logging.getLogger("seamark.client")

CONNECT_SECONDS: Final = 4.0
CLOSE_SECONDS: Final = 3.0
FLUSH_SECONDS: Final = 3.0
PING_SECONDS: Final = 3.0
"""Two unanswered pings end a half-open connection: after 9 s at most."""

_REFUSED: Final = re.compile(r'permissions violation for publish to "([^"]*)"')


@contextlib.contextmanager
def _lost_socket() -> Iterator[None]:
    """Where uvloop runs the loop, writing into a socket that was lost in this moment is a `RuntimeError`, elsewhere nothing.

    Raises:
        ConnectionResetError: instead.
    """
    try:
        yield
    except RuntimeError as error:
        if "handler is closed" not in str(error):
            raise
        raise ConnectionResetError(str(error)) from error


class _Stored(msgspec.Struct):
    subject: str
    data: bytes = b""


class _Answer(msgspec.Struct):
    """What JetStream answers to an append, or to the question what is stored."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    message: _Stored | None = None
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class OverNats:
    """A connection that is made anew with the next attempt when it was lost: nats-py would keep attempts in a buffer meanwhile.

    Args:
        url: servers separated by commas.
        inbox_prefix: where answers arrive; as `nats/accounts.conf` has it, if absent.
    """

    attempt_seconds: Final = 5.0

    def __init__(
        self,
        url: str,
        user: str | None = None,
        password: str | None = None,
        credentials_file: str | None = None,
        inbox_prefix: str | None = None,
    ) -> None:
        self._url = url
        self.address = shown(url)
        self._login = login_of(url, user, password, credentials_file)
        self._inbox_prefix = inbox_prefix or inbox_prefix_of(url, user)
        self._secret = secret_of(self._login)
        self._salt = secrets.token_bytes(16)
        self._client: Client | None = None
        self._is_open = False
        self._connecting = asyncio.Lock()
        self._inbox = ""
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[str, asyncio.Future[Msg]]] = {}

    async def open(self) -> None:
        """Connect.

        Raises:
            Again: no server takes us in.
        """
        self._is_open = True
        await self._connected()

    async def close(self) -> None:
        """Write what waits and close; attempts under way fail."""
        self._is_open = False
        client, self._client = self._client, None
        if client is not None:
            await _close(client)
        await self._on_closed()

    async def attempt(self, event: Encoded, trace: Mapping[str, str]) -> tuple[int, bool]:
        """Publish once, under a message id that is the same for every attempt.

        Returns: its sequence in its stream, and whether it was stored before.

        Raises:
            Again: another attempt may succeed. PublishRefused: none will.
        """
        msg_id = event.msg_id if self._secret is None else sealed(event.msg_id, self._secret)
        ack = await self._append(event, trace, msg_id)
        if ack.duplicate and self._secret is None and not await self._holds(event, ack):
            log.warning("another publisher has used the id of an event; let publishers have accounts of their own")
            # Nobody can have foreseen this one. Another publication of the event is caught by its claim.
            ack = await self._append(event, trace, sealed(event.msg_id, self._salt))
        return ack.seq, ack.duplicate

    async def pass_on(self, messages: Sequence[Passing]) -> None:
        """Publish what is never stored, once.

        Raises:
            Again: it may not have been published. PublishRefused: it was not.
        """
        client = await self._connected()
        refused: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        keys = {f"now {next(self._numbers)}": message.subject.lower() for message in messages}
        self._waiting.update({key: (subject, refused) for key, subject in keys.items()})
        try:
            with _lost_socket():
                for message in messages:
                    await client.publish(message.subject, message.payload)
                await client.flush(FLUSH_SECONDS)  # type: ignore[arg-type]  # a refusal comes before the answer to a ping
            if refused.done():
                refused.result()
        except (nats.errors.Error, OSError) as failed:
            raise Again(failed) from failed
        finally:
            for key in keys:
                del self._waiting[key]

    async def _append(self, event: Encoded, trace: Mapping[str, str], msg_id: str) -> _Answer:
        ack = await self._ask(event.subject, event.payload, {**trace, "Nats-Msg-Id": msg_id})
        if ack.error is not None:
            if ack.error.get("err_code") in RETRIED_ERR_CODES:
                raise Again(str(ack.error.get("description")))
            raise PublishRefused(ack.error.get("code", 0), ack.error)
        if not ack.seq:
            raise Again("not an answer of JetStream")
        return ack

    async def _holds(self, event: Encoded, ack: _Answer) -> bool:
        """Whether the message stored where `ack` says is this event; False also where reading is not allowed."""
        try:
            found = await self._ask(f"$JS.API.STREAM.MSG.GET.{ack.stream}", b'{"seq":%d}' % ack.seq)
        except PublishRefused:
            return False
        return found.message is not None and is_same(event, found.message.subject, found.message.data)

    # -- the connection ------------------------------------------------------------------------------------------------

    async def _ask(self, subject: str, payload: bytes, headers: Mapping[str, str] | None = None) -> _Answer:
        client = await self._connected()
        reply = f"{self._inbox}.{next(self._numbers)}"
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting[reply] = subject.lower(), answer
        try:
            with _lost_socket():
                await client.publish(subject, payload, reply=reply, headers=None if headers is None else dict(headers))
            message = await answer
            if not message.data:
                raise Again("nobody answers there")
            return _decode(message.data)
        except nats.errors.MaxPayloadError as refused:
            raise PublishRefused(413, {"description": f"it is larger than the server takes: {refused}"}) from refused
        except (nats.errors.Error, OSError, msgspec.DecodeError) as failed:
            raise Again(failed) from failed
        finally:
            del self._waiting[reply]

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None or not self._client.is_connected:
                client = await self._connect()
                if not self._is_open:  # closed meanwhile: nobody would ever close this one
                    await _close(client)
                    raise Again("the publisher was closed")
                self._client = client
            return self._client

    async def _connect(self) -> Client:
        client = Client()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await client.connect(
                    servers=self._url.split(","),
                    name="seamark-publisher",
                    inbox_prefix=self._inbox_prefix,
                    allow_reconnect=False,
                    reconnect_time_wait=0.25,  # type: ignore[arg-type]
                    connect_timeout=2,
                    ping_interval=PING_SECONDS,  # type: ignore[arg-type]
                    max_outstanding_pings=2,
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    **self._login,
                )
                self._inbox = client.new_inbox()
                with _lost_socket():
                    await client.subscribe(f"{self._inbox}.*", cb=self._on_reply)
        except BaseException as failed:
            await _close(client)
            if isinstance(failed, (TimeoutError, OSError, nats.errors.Error)):
                said = Again(client.last_error or failed)
                raise Again(f"no NATS server takes us in at {self.address}: {said}") from failed
            raise
        return client

    async def _on_reply(self, message: Msg) -> None:
        if message.subject in self._waiting:
            _settle(self._waiting[message.subject][1], message)

    async def _on_error(self, error: Exception) -> None:
        log.debug("NATS error: %s", error)
        refused = _REFUSED.search(str(error).lower())
        for subject, answer in self._waiting.values():
            if refused is not None and subject == refused[1]:
                _settle(answer, PublishRefused(403, {"description": f"this user may not publish to {subject}"}))

    async def _on_closed(self) -> None:
        for _, answer in self._waiting.values():
            _settle(answer, Again("the connection was lost before the answer"))


async def _close(client: Client) -> None:
    with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
        async with asyncio.timeout(CLOSE_SECONDS):
            await client.close()


def _settle(answer: asyncio.Future[Msg], outcome: Msg | Exception) -> None:
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
