"""JetStream as the engine uses it: appends with retry rules, atomic batches in one write, Direct Get, the leader's word.

Facts behind the rules: ADR-50 (atomic batches), ADR-31 (Direct Get), and `docs/architecture.md`, "Append".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from nats.nuid import NUID

from engine.broker import wire
from engine.broker.answers import (
    Heads,
    Page,
    PubAck,
    Stored,
    StreamState,
    direct_stored,
    error_facts,
    leader_stored,
    pub_ack,
    stream_state,
)
from engine.broker.batch import Outgoing, encode_batch, settle_batch
from engine.broker.connection import Connection, Delivery, Subscription, settle
from engine.broker.refusals import BATCH_INCOMPLETE, WRONG_LAST_SEQUENCE
from engine.broker.settings import NatsSettings
from engine.broker.writes import Writes, stream_of_subject
from engine.errors import ApiError, BrokerError, OtherIncarnation, Unanswered, Unavailable
from engine.limits import APPEND_BUDGET_SECONDS, BATCH_MESSAGES_MAX, HEADS_SUBJECTS_MAX, PAGE_RECORDS
from seamark.backoff import Backoff
from seamark.protocol.appends import RETRIED_ERR_CODES

__all__ = [
    "WRONG_LAST_SEQUENCE",
    "After",
    "Broker",
    "Delivery",
    "Heads",
    "NatsSettings",
    "Outgoing",
    "Page",
    "PubAck",
    "Stored",
    "StreamState",
    "Subscription",
    "connect",
]


class After(NamedTuple):
    """The last message of a subject, which an append demands to follow: its stream and sequence, 0 for none."""

    stream: str
    seq: int


_SEQUENCE = b"\r\nNats-Sequence:"
_ids = NUID()


async def connect(settings: NatsSettings) -> Broker:
    """An open connection that reconnects for ever.

    Raises:
        Unavailable: no server answered within 10 s.
    """
    broker = Broker(settings)
    await broker.open()
    return broker


class Broker(Connection):
    """JetStream on one connection. Every call has a deadline; none hangs because the broker went away.

    Whatever asks the server raises ApiError when it refuses (10059: there is no such stream), Unavailable when nothing was done,
    and Unanswered when the outcome is unknown. Where a call promises more, it says so.
    """

    def __init__(self, settings: NatsSettings) -> None:
        super().__init__(settings)
        self.on_leader_change: list[Callable[[str, str], None]] = []
        self.writes = Writes()
        self.on_reconnect.append(self.writes.forget)

    async def open(self) -> None:
        await super().open()
        for kind in ("STREAM", "CONSUMER"):
            self.subscribe(f"$JS.EVENT.ADVISORY.{kind}.LEADER_ELECTED.>", self._on_leader_elected)

    def _on_leader_elected(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        tokens = subject.decode().split(".")
        if tokens[3] == "STREAM":
            self.writes.forget(tokens[5])
        for callback in self.on_leader_change:
            callback(tokens[5], tokens[6] if len(tokens) > 6 else "")

    async def api(
        self, method: str, body: Mapping[str, Any] | None = None, *, timeout_seconds: float = 5.0
    ) -> dict[str, Any]:
        """Call `$JS.API.<method>`."""
        payload = msgspec.json.encode(body) if body is not None else b""
        delivery = await self.request(f"$JS.API.{method}", payload, timeout_seconds=timeout_seconds)
        try:
            answer = msgspec.json.decode(delivery.payload, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise Unanswered(f"not an answer of JetStream: {delivery.payload[:80]!r}") from error
        if refused := answer.get("error"):
            raise ApiError(*error_facts(refused))
        return answer

    # --- writing -----------------------------------------------------------------------------------------------------

    async def append(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        msg_id: str | None = None,
        after: After | None = None,
        epoch: str | None = None,
        budget_seconds: float = APPEND_BUDGET_SECONDS,
    ) -> PubAck:
        """Store one message; returns only once it is stored.

        An attempt without an answer is repeated only where that cannot store twice: with a `msg_id` (the server's
        duplicate window) or `after`. What became of it is read, where that can be told (`after`), else it stays unknown.

        Args:
            msg_id: `Nats-Msg-Id`; with `after` a random one by default, by which the message is known again.
            after: what the subject's last message must be, else it is refused (10071).
            epoch: the incarnation that the stream must be in; its leader is asked before each attempt.
            budget_seconds: how long passing failures are retried; a leader election takes 4-9 s.

        Raises:
            ApiError: refused for good (full store, wrong sequence, no such stream …). OtherIncarnation: see `epoch`.
            Unavailable: not stored, budget spent. Unanswered: outcome unknown, also when only an earlier attempt's is.
        """
        lines = dict(headers or {})
        if after is not None:
            msg_id = msg_id or _ids.next().decode()
            lines["Nats-Expected-Last-Subject-Sequence"] = str(after.seq)
        if msg_id is not None:
            lines["Nats-Msg-Id"] = msg_id
        deadline = time.monotonic() + budget_seconds
        left, backoff = max(0.05, min(5.0, budget_seconds)), None
        doubt: Unanswered | None = None
        while True:
            try:
                if epoch is not None:
                    await self._check_epoch(stream_of_subject(subject) or "", epoch, left)
                ack = pub_ack((await self.request(subject, payload, lines, timeout_seconds=left)).payload)
                self.writes.stored(ack.stream)
                return ack
            except (Unanswered, Unavailable, ApiError) as error:
                if isinstance(error, Unanswered) and self.connected:
                    self.writes.not_stored(subject)
                if isinstance(error, Unanswered) and msg_id is None:
                    raise
                doubt = error if isinstance(error, Unanswered) else doubt
                if isinstance(error, ApiError) and error.err_code not in RETRIED_ERR_CODES:
                    if doubt is None:
                        raise
                    # An earlier attempt may be what this one was refused for.
                    if after is None or error.err_code != WRONG_LAST_SEQUENCE:
                        raise doubt from error
                    return await self._own(after.stream, subject, msg_id or "", error)
                backoff = backoff or Backoff(0.05, 1.0, jitter=0.5)
                pause = backoff.next_seconds()
                if deadline - time.monotonic() <= pause:
                    # What an earlier attempt has done stays unknown, however surely this one did nothing.
                    raise doubt or error from None
            await asyncio.sleep(pause)
            left = max(0.05, min(5.0, deadline - time.monotonic()))

    async def _check_epoch(self, stream: str, epoch: str, timeout_seconds: float) -> None:
        try:
            actual = (await self.stream(stream, timeout_seconds=timeout_seconds)).epoch
        except Unanswered as error:
            raise Unavailable(f"the leader of {stream} did not say which incarnation it is") from error
        if actual != epoch:
            raise OtherIncarnation(f"{stream} is in incarnation {actual}, not {epoch}")

    async def _own(self, stream: str, subject: str, msg_id: str, refusal: ApiError) -> PubAck:
        """The acknowledgement of an attempt whose answer was lost, if it is what stands there now; else raises `refusal`."""
        try:
            stored = await self.leader_last(stream, subject)
        except ApiError as error:
            raise Unanswered(f"whether an attempt was stored cannot be read: {error}") from refusal
        if stored is None or wire.header(stored.headers, b"Nats-Msg-Id") != msg_id.encode():
            raise refusal
        return PubAck(stream, stored.seq)

    async def commit(self, messages: Sequence[Outgoing], *, lines: bytes = b"", timeout_seconds: float = 5.0) -> PubAck:
        """Store all messages or none: one atomic batch, one write, one attempt.

        Args:
            lines: raw header lines that each message has beside its own.

        Raises:
            ApiError: nothing was stored, and the server said why; 10054: a message is larger than it takes.
            Unavailable: nothing was stored. Unanswered: the outcome is unknown. Forbidden: this user may not publish one of them.
        """
        if not 1 <= len(messages) <= BATCH_MESSAGES_MAX:
            raise ValueError(f"a batch has 1 to {BATCH_MESSAGES_MAX} messages, not {len(messages)}")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Delivery] = loop.create_future()
        reply = self.expect(
            lambda outcome: settle_batch(answer, outcome),
            lambda subject: any(message.subject == subject for message in messages),
        )
        # A timer by itself, as of `request`.
        silence = loop.call_later(timeout_seconds, self._unanswered, answer, messages[0].subject, timeout_seconds)
        try:
            data = encode_batch(messages, reply, lines)
            if len(data) > self.nc.max_payload:
                self._check_size(max(len(message.headers) + len(message.payload) for message in messages))
            self.write(data)
            delivery = await answer
        finally:
            silence.cancel()
            self.forget(reply)
        if wire.status(delivery.headers) == 503:
            raise Unavailable("no leader takes this batch")
        try:
            ack = pub_ack(delivery.payload)
        except ApiError as error:
            if error.err_code == BATCH_INCOMPLETE:
                self.writes.not_stored(messages[0].subject)
            raise
        self.writes.stored(ack.stream)
        return ack

    def _unanswered(self, answer: asyncio.Future[Delivery], subject: str, seconds: float) -> None:
        """A batch, whose first message has this subject, was not answered in time."""
        if not answer.done() and self.connected:
            self.writes.not_stored(subject)
        settle(answer, Unanswered(f"a batch was not answered within {seconds} s"))

    # --- reading -----------------------------------------------------------------------------------------------------

    async def stream(self, stream: str, *, timeout_seconds: float = 5.0) -> StreamState:
        """What the leader of `stream` says of it, now."""
        answer = await self.api(f"STREAM.INFO.{stream}", timeout_seconds=timeout_seconds)
        return stream_state(stream, answer)

    async def count(self, stream: str, filter_: str, *, timeout_seconds: float = 5.0) -> tuple[int, int]:
        """How many messages, and how many subjects, of `stream` match a filter, by its leader.

        It lists 100 000 subjects at most; of those beyond one message each is counted.
        """
        answer = await self.api(f"STREAM.INFO.{stream}", {"subjects_filter": filter_}, timeout_seconds=timeout_seconds)
        listed: dict[str, int] = answer["state"].get("subjects") or {}
        beyond = max(0, answer.get("total", 0) - len(listed))
        return sum(listed.values()) + beyond, len(listed) + beyond

    async def next_by_subject(
        self,
        stream: str,
        subject: str,
        seq: int,
        *,
        batch: int = PAGE_RECORDS,
        max_bytes: int = 1 << 20,
        since: datetime | None = None,
        timeout_seconds: float = 2.0,
    ) -> Page:
        """Messages of `subject` from `seq` on, or stored since then, by Direct Get from any replica: it may lag (ADR-31)."""
        begin = {"seq": max(1, seq)} if since is None else {"start_time": since.isoformat()}
        body = {"next_by_subj": subject, **begin, "batch": batch, "max_bytes": max_bytes}
        messages, end = await self._direct(stream, body, timeout_seconds)
        pending = int(wire.last_header(end, b"Nats-Num-Pending") or b"0") if wire.status(end) == 204 else 0
        return Page([direct_stored(message) for message in messages], pending > 0)

    async def last_by_subjects(self, stream: str, subjects: Sequence[str], *, timeout_seconds: float = 2.0) -> Heads:
        """The last sequence of each of at most 1000 subjects, one consistent view of one replica."""
        if not 1 <= len(subjects) <= HEADS_SUBJECTS_MAX:
            raise ValueError(f"1 to {HEADS_SUBJECTS_MAX} subjects at a time, not {len(subjects)}")
        messages, end = await self._direct(
            stream, {"multi_last": list(subjects), "batch": len(subjects)}, timeout_seconds
        )
        seqs = {}
        for message in messages:
            subject = wire.last_header(message.headers, b"Nats-Subject") or b""
            seqs[subject.decode()] = int(wire.last_header(message.headers, b"Nats-Sequence") or b"0")
        return Heads(seqs, _up_to(end))

    async def last_of_each(
        self, stream: str, subject: str, *, timeout_seconds: float = 2.0
    ) -> tuple[list[Stored], int]:
        """The last message of each of at most 1000 subjects that `subject` stands for, and how far that replica has come.

        That is 0 where there is no message.
        """
        body = {"multi_last": [subject], "batch": HEADS_SUBJECTS_MAX}
        messages, end = await self._direct(stream, body, timeout_seconds)
        return [direct_stored(message) for message in messages], _up_to(end)

    async def leader_next(self, stream: str, subject: str, seq: int, *, timeout_seconds: float = 5.0) -> Stored | None:
        """The first message of `subject` at or after `seq` as the leader sees it, or None."""
        return await self._leader_get(stream, {"next_by_subj": subject, "seq": max(1, seq)}, timeout_seconds)

    async def leader_last(self, stream: str, subject: str, *, timeout_seconds: float = 5.0) -> Stored | None:
        """The last message of `subject` as the leader sees it, or None."""
        return await self._leader_get(stream, {"last_by_subj": subject}, timeout_seconds)

    async def _leader_get(self, stream: str, body: dict[str, Any], timeout_seconds: float) -> Stored | None:
        try:
            answer = await self.api(f"STREAM.MSG.GET.{stream}", body, timeout_seconds=timeout_seconds)
        except ApiError as error:
            if error.err_code == 10037:
                return None
            raise
        return leader_stored(answer["message"])

    async def _direct(self, stream: str, body: dict[str, Any], timeout_seconds: float) -> tuple[list[Delivery], bytes]:
        """All messages of one Direct Get answer and the header block that ends it (204, or 404 when there are none)."""
        done: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        messages: list[Delivery] = []

        def on_part(outcome: Delivery | BrokerError) -> None:
            # A publisher may have written a status into a message; only a message has a sequence.
            if isinstance(outcome, BrokerError) or (wire.status(outcome.headers) and _SEQUENCE not in outcome.headers):
                settle(done, outcome)
            else:
                messages.append(outcome)

        subject = f"$JS.API.DIRECT.GET.{stream}"
        reply = self.expect(on_part, subject.__eq__)
        try:
            self.publish(subject, msgspec.json.encode(body), reply=reply)
            async with asyncio.timeout(timeout_seconds):
                end = (await done).headers
        except TimeoutError as error:
            raise Unanswered(f"no whole answer from {stream} within {timeout_seconds} s") from error
        finally:
            self.forget(reply)
        code = wire.status(end)
        if code == 503:
            raise Unavailable(f"no replica of {stream} answers")
        if code not in (204, 404):
            raise ApiError(code, 0, wire.description(end))
        return messages, end


def _up_to(end: bytes) -> int:
    return int(wire.last_header(end, b"Nats-UpTo-Sequence") or b"0")
