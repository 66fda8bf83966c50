"""An atomic batch on the wire: all its messages in one buffer (ADR-50)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from secrets import token_urlsafe

import msgspec

from engine.broker import wire
from engine.broker.connection import Delivery, settle
from engine.errors import BrokerError

_ID_BYTES = 6
"""Enough to differ from the ids of the 50 batches that a stream takes at once, and no more: it is stored with each message."""


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A message of an atomic batch. `headers` are raw lines, each ended by CRLF."""

    subject: str
    payload: bytes
    headers: bytes = b""

    @property
    def named_headers(self) -> dict[str, str]:
        """The headers by name, as `Broker.append` takes them."""
        lines = (line.partition(":") for line in self.headers.decode().split("\r\n") if line)
        return {name: value.strip() for name, _, value in lines}


def encode_batch(messages: Sequence[Outgoing], reply: bytes, lines: bytes = b"") -> bytes:
    """The protocol bytes of a batch; the server answers on `reply`. Each message has `lines` beside its own."""
    opening = b"NATS/1.0\r\n%bNats-Batch-Id:%b\r\nNats-Batch-Sequence:" % (lines, token_urlsafe(_ID_BYTES).encode())
    last, answered, parts = len(messages), reply + b" ", list[bytes]()
    fixed = len(opening) + len(b"\r\n\r\n")
    for number, message in enumerate(messages, 1):
        own, payload, digits = message.headers, message.payload, b"%d" % number
        # Only the first and the last are answered: the first proves a leader took the batch, the last that it committed.
        answer = answered if number == 1 or number == last else b""  # noqa: PLR1714 - a tuple costs more
        if number == last:
            own = b"Nats-Batch-Commit:1\r\n" + own
        size = fixed + len(digits) + len(own)
        whole = size + len(payload)
        # The head by one format: its parts, joined with all the others, took twice as long. A payload would be copied once more.
        head = b"HPUB %b %b%d %d\r\n%b%b\r\n%b\r\n" % (
            message.subject.encode(),
            answer,
            size,
            whole,
            opening,
            digits,
            own,
        )
        parts += (head, payload, b"\r\n")
    return b"".join(parts)


def settle_batch(future: asyncio.Future[Delivery], outcome: Delivery | BrokerError) -> None:
    """An empty answer without a status is the server's nod to the first message of a batch: not the end yet."""
    if isinstance(outcome, BrokerError) or outcome.payload or wire.status(outcome.headers):
        settle(future, outcome)
