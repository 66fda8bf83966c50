"""What JetStream answers, as values: acknowledgements, stored messages and the state of streams."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from engine.broker import wire
from engine.broker.connection import Delivery
from engine.errors import ApiError, Unanswered

EPOCH_KEY = "seamark.epoch"
PARTITIONS_KEY = "seamark.partitions"

WATERMARK_KEY = "seamark.watermark_bytes"
"""Of a stream with schedules: how much it may hold. It has no `max_bytes`, for it would drop what is oldest."""


class PubAck(NamedTuple):
    """The broker's word that a message is stored; for a batch `seq` is that of its last message."""

    stream: str
    seq: int
    duplicate: bool = False


class Stored(NamedTuple):
    """A stored message. `headers` is its raw block; on Direct Get the broker's own `Nats-*` lines are in it."""

    subject: str
    seq: int
    time: str
    headers: bytes
    payload: bytes


class Page(NamedTuple):
    """One prefix-consistent view of one replica, possibly stale. `more`: it has further messages behind the last one."""

    records: list[Stored]
    more: bool


class Heads(NamedTuple):
    """The last sequence of each subject that has one, as one replica sees it; `up_to` is how far that replica has come."""

    seqs: dict[str, int]
    up_to: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a stream's leader says of it. `epoch` and `partitions` are None when its metadata has none.

    `oldest_at`: when its first message was stored, of an empty stream the last it had, in Unix seconds; trimmed ones are older.
    `asked_at` is the same clock's time of this answer, `replicas` are the copies beside the leader's.
    """

    name: str
    epoch: str | None
    partitions: int | None
    first_seq: int
    last_seq: int
    messages: int
    config: dict[str, Any] = field(repr=False)
    oldest_at: float = math.inf
    bytes: int = 0
    subjects: int = 0
    asked_at: float = math.inf
    replicas: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata without the server's own notes."""
        return own_metadata(self.config)


def own_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a stream or consumer without the server's own notes."""
    return {key: value for key, value in (config.get("metadata") or {}).items() if not key.startswith("_nats.")}


class _PubAckReply(msgspec.Struct):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: dict[str, Any] | None = None


_decode_ack = msgspec.json.Decoder(_PubAckReply).decode


def pub_ack(payload: bytes) -> PubAck:
    """The acknowledgement in the answer to a write.

    Raises:
        ApiError: the server refused it. Unanswered: the answer is not JetStream's.
    """
    try:
        reply = _decode_ack(payload)
    except msgspec.DecodeError as error:
        raise Unanswered(f"not an answer of JetStream: {payload[:80]!r}") from error
    if reply.error is not None:
        raise ApiError(*error_facts(reply.error))
    if not reply.seq:
        raise Unanswered(f"not an answer of JetStream: {payload[:80]!r}")
    return PubAck(reply.stream, reply.seq, reply.duplicate)


def error_facts(error: Mapping[str, Any]) -> tuple[int, int, str]:
    """The arguments of an `ApiError`, from the `error` of an answer."""
    return error.get("code", 0), error.get("err_code", 0), error.get("description", "refused")


def direct_stored(message: Delivery) -> Stored:
    """A message that Direct Get sent."""
    subject, seq, at = (
        wire.last_header(message.headers, name) or b""
        for name in (b"Nats-Subject", b"Nats-Sequence", b"Nats-Time-Stamp")
    )
    # The broker takes any bytes for a token.
    return Stored(subject.decode("utf-8", "replace"), int(seq), at.decode(), message.headers, message.payload)


def leader_stored(message: Mapping[str, Any]) -> Stored:
    """A message that the leader sent."""
    return Stored(
        message["subject"],
        message["seq"],
        message["time"],
        base64.b64decode(message.get("hdrs") or ""),
        base64.b64decode(message.get("data") or ""),
    )


def stream_state(stream: str, answer: Mapping[str, Any]) -> StreamState:
    """What the leader of `stream` said of it."""
    config, state = answer["config"], answer["state"]
    metadata = config.get("metadata") or {}
    partitions = metadata.get(PARTITIONS_KEY)
    return StreamState(
        name=stream,
        epoch=metadata.get(EPOCH_KEY),
        partitions=int(partitions) if partitions and partitions.isdecimal() else None,
        first_seq=state["first_seq"],
        last_seq=state["last_seq"],
        messages=state["messages"],
        config=config,
        oldest_at=datetime.fromisoformat(state["first_ts" if state["messages"] else "last_ts"]).timestamp(),
        bytes=state["bytes"],
        subjects=state.get("num_subjects", 0),
        asked_at=datetime.fromisoformat(answer["ts"]).timestamp(),
        replicas=(answer.get("cluster") or {}).get("replicas") or (),
    )
