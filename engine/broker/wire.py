"""The NATS client protocol on the hot path: reading messages without a task, queue or header dict, writing many at once.

nats-py parses every message with regular expressions, wraps it and hands it to a task: 35 us. Here the read buffer is
walked with `find` and registered subscriptions get slices of it: 5.5 us. Everything else (control lines, messages of
nats-py's own subscriptions) goes on to nats-py. `Client._ps` is the seam; a contract test fails when nats-py moves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import nats.errors
import structlog

Handler = Callable[[bytes, bytes, bytes, bytes], None]
"""`handler(subject, reply, headers, payload)`, synchronous: it runs where the socket is read and must be quick."""

CONTROL_LINE_BYTES_MAX = 64 << 10
"""A line longer than this is not the NATS protocol; INFO of a large cluster is the longest real one."""

MESSAGE_BYTES_MAX = 64 << 20
"""The largest `max_payload` a server can be configured for; who announces more is not a NATS server."""

_CRLF = b"\r\n"
_log = structlog.get_logger("seamark.wire")


class Sink(Protocol):
    """What the parser hands everything to that no registered handler takes (in practice nats-py's client)."""

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None: ...
    async def _process_err(self, err_msg: str) -> None: ...  # as the server wrote it: names keep their case
    async def _process_ping(self) -> None: ...
    async def _process_pong(self) -> None: ...
    async def _process_info(self, info: dict[str, Any]) -> None: ...


class _Other(NamedTuple):
    """What nats-py must handle, up to `end`: a control line, or a message: its words, and where headers and payload begin."""

    end: int
    words: Sequence[bytes] = ()
    reply: bytes = b""
    body: int = 0
    middle: int = 0


_BROKEN: Final = _Other(0)
"""This is not the NATS protocol."""


class HotParser:
    """Takes the place of nats-py's parser. `handlers` maps a subscription's id, as bytes on the wire, to its handler."""

    __slots__ = ("_chunks", "_have", "_need", "_sink", "faults", "handlers")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.handlers: dict[bytes, Handler] = {}
        self.faults = 0
        self.reset()

    def reset(self) -> None:
        """Forget a half-read message: called by nats-py whenever it changes the connection."""
        self._chunks: list[bytes] = []
        self._have = 0
        self._need = 0

    async def parse(self, data: bytes = b"") -> None:
        """Read all whole messages in what has come so far.

        Raises:
            nats.errors.ProtocolError: the bytes are not the NATS protocol; nats-py then reconnects.
        """
        data = self._joined(data)
        position = need = 0
        try:
            while True:
                position, need, other = self._walk(data, position)
                if other is None:
                    break
                position = await self._pass_on(data, position, other)
        except nats.errors.ProtocolError:
            self.reset()
            raise
        except (ValueError, IndexError, RecursionError) as error:
            self.reset()
            raise nats.errors.ProtocolError from error
        self._keep(data, position, need)

    def take(self, data: bytes) -> bytes:
        """As `parse`, without waiting: handles messages up to the first thing that has no handler; gives the bytes from there."""
        data = self._joined(data)
        position, need, other = self._walk(data, 0)
        if other is not None:
            return data[position:]
        self._keep(data, position, need)
        return b""

    def _joined(self, data: bytes) -> bytes:
        """What is to be read now, with what was kept of the reads before; nothing while not enough of it is there."""
        if not self._chunks:
            return data
        # A large payload comes in many reads: they are joined once, when all of it is there.
        self._chunks.append(data)
        self._have += len(data)
        if self._have < self._need:
            return b""
        data = b"".join(self._chunks)
        self.reset()
        return data

    def _keep(self, data: bytes, position: int, need: int) -> None:
        """Keep an incomplete message. `need`: its whole length; 0 where its first line is not complete."""
        if position < len(data):
            self._chunks.append(data[position:])
            self._have = len(data) - position
            self._need = need

    def _walk(self, data: bytes, position: int) -> tuple[int, int, _Other | None]:
        """Dispatch the messages in `data` from `position` on, as far as they have handlers.

        Returns:
            Where it has ended, how many bytes are needed from there before it is worth trying again, and what else is there.
        """
        end, find, handlers = len(data), data.find, self.handlers
        while position < end:
            line_end = find(_CRLF, position)
            if line_end < 0:
                return position, 0, _BROKEN if end - position > CONTROL_LINE_BYTES_MAX else None
            first = data[position]
            try:
                if first == 0x48:  # HMSG <subject> <sid> [reply] <header bytes> <total bytes>
                    words = data[position:line_end].split()
                    number, word = len(words) - 1, b"HMSG"
                    header_bytes, total = int(words[-2]), int(words[-1])
                elif first == 0x4D:  # MSG <subject> <sid> [reply] <bytes>
                    words = data[position:line_end].split()
                    number, word = len(words), b"MSG"
                    header_bytes, total = 0, int(words[-1])
                else:
                    return position, 0, _Other(line_end + 2)
            except (ValueError, IndexError):
                return position, 0, _BROKEN
            if number == 5:
                reply = words[3]
            elif number == 4:
                reply = b""
            else:
                return position, 0, _BROKEN
            if not 0 <= header_bytes <= total <= MESSAGE_BYTES_MAX or words[0] != word:
                return position, 0, _BROKEN
            body = line_end + 2
            stop = body + total
            if stop + 2 > end:
                return position, stop + 2 - position, None
            if data[stop : stop + 2] != _CRLF:
                return position, 0, _BROKEN
            middle = body + header_bytes
            handler = handlers.get(words[2])
            if handler is None:
                return position, 0, _Other(stop + 2, words, reply, body, middle)
            try:
                handler(words[1], reply, data[body:middle], data[middle:stop])
            except Exception:
                # An exception here would end nats-py's read loop for good, without a reconnect.
                self.faults += 1
                _log.exception(
                    "subscription_handler_failed",
                    subject_kind=words[1].split(b".", 1)[0].decode("ascii", "replace"),
                )
            position = stop + 2
        return position, 0, None

    async def _pass_on(self, data: bytes, position: int, other: _Other) -> int:
        """Have nats-py take what has no handler; returns where it ends."""
        end, words, reply, body, middle = other
        if other is _BROKEN:
            raise nats.errors.ProtocolError
        if words:
            headers = data[body:middle] if middle > body else None
            await self._sink._process_msg(int(words[2]), words[1], reply, data[middle : end - 2], headers)  # type: ignore[arg-type]
        else:
            await self._control(data[position : end - 2])
        return end

    async def _control(self, line: bytes) -> None:
        word, _, rest = line.partition(b" ")
        word = word.rstrip().upper()
        if word == b"PING":
            await self._sink._process_ping()
        elif word == b"PONG":
            await self._sink._process_pong()
        elif word == b"INFO":
            info = json.loads(rest)
            if not isinstance(info, dict):
                raise nats.errors.ProtocolError
            await self._sink._process_info(info)
        elif word == b"-ERR":
            await self._sink._process_err(rest.strip().decode("utf-8", "replace"))
        elif word != b"+OK":
            raise nats.errors.ProtocolError


def header(headers: bytes, name: bytes) -> bytes | None:
    """The first value of `name` (exact case) in a raw header block, or None. No dict is built.

    For a header that the server adds, use `last_header`: the publisher may have written a line of the same name.
    """
    return value_of(headers, line_of(name))


def line_of(name: bytes) -> bytes:
    """What `value_of` looks for: how a header of this name begins."""
    return b"\r\n%b:" % name


def value_of(headers: bytes, line: bytes) -> bytes | None:
    """As `header`, for callers that ask of every message: `line` was made once, by `line_of`."""
    start = headers.find(line)
    return None if start < 0 else _rest_of_line(headers, start + len(line))


def _rest_of_line(headers: bytes, start: int) -> bytes:
    """The value from `start` to the end of its line, which a publisher may have left out."""
    end = headers.find(_CRLF, start)
    return (headers[start:] if end < 0 else headers[start:end]).strip()


def last_header(headers: bytes, name: bytes) -> bytes | None:
    """The last value of `name`, or None: the server adds its own behind those of the publisher, who may have forged one."""
    line = line_of(name)
    start = headers.rfind(line)
    return None if start < 0 else _rest_of_line(headers, start + len(line))


def added_at_the_end(headers: bytes, name: bytes) -> bytes | None:
    """The value of a header that the server has added behind all others, or None.

    Where a publisher has left out the end of its own last line, the server's first one begins within that line.
    """
    start = headers.rfind(b"%b:" % name)
    return None if start < 0 else _rest_of_line(headers, start + len(name) + 1)


def status(headers: bytes) -> int:
    """The status in a raw header block (404, 408, 503 …), 0 when it has none."""
    if len(headers) < 12 or headers[8:9] != b" ":
        return 0
    word = headers[9:12]
    return int(word) if word.isdigit() else 0


def description(headers: bytes) -> str:
    """The words after the status."""
    return headers[12 : headers.find(_CRLF)].strip().decode("utf-8", "replace")


def header_lines(headers: Mapping[str, str] | None) -> bytes:
    """`headers` as raw lines.

    Raises:
        ValueError: a name or value holds a line break: it would smuggle another header.
    """
    if not headers:
        return b""
    lines = []
    for name, value in headers.items():
        if not name or any(c in "\r\n:" or c.isspace() for c in name) or "\r" in value or "\n" in value:
            raise ValueError(f"a header may not hold line breaks, nor its name a colon or blank: {name!r}")
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines).encode()


def encode_publish(subject: bytes, reply: bytes, lines: bytes, payload: bytes) -> bytes:
    """One PUB or HPUB as bytes. `lines` are raw header lines, each ended by CRLF, or empty."""
    if not lines:
        return b"PUB %b %b%d\r\n%b\r\n" % (subject, reply + b" " if reply else b"", len(payload), payload)
    header_bytes = len(lines) + 12
    return b"HPUB %b %b%d %d\r\nNATS/1.0\r\n%b\r\n%b\r\n" % (
        subject,
        reply + b" " if reply else b"",
        header_bytes,
        header_bytes + len(payload),
        lines,
        payload,
    )
