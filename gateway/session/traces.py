"""The spans of one session: of followed records that it was sent, of what its device says of them, and of its way to the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from opentelemetry.trace import Span, SpanContext

from engine import metrics
from engine.traces import names
from engine.traces.contexts import followed_in, traceparent_of
from engine.traces.spans import Spans
from gateway.log.message import Message
from seamark.protocol.subjects import encode_token

REMEMBERED: Final = 8
"""Followed records of a session of which something may still be said. Of older ones no more spans come."""

RESUMED_MAX: Final = 16
"""Deliveries of one resume that have spans: a device that was away for a week may have missed thousands of followed records."""

_UNFOLLOWED: Final = metrics.traces_unfollowed.labels("resume")


class _Sent(NamedTuple):
    """A followed record that was sent, `at` Unix nanoseconds; `context` is that of its delivery."""

    seq: int
    id: str
    at: int
    context: SpanContext


class _Id(msgspec.Struct):
    id: str = ""


_decode = msgspec.json.Decoder(_Id).decode


class SessionTraces:
    """What is remembered of one session, so that its followed records have all their spans.

    A WebSocket lasts for hours and is no span. `resume` lasts until everything missed was sent; there is one where a followed
    record was among it, and else as often as for any other thing that nobody has decided about.

    Args:
        tenant: of its user.
    """

    __slots__ = (
        "_acked",
        "_begun_at",
        "_missed",
        "_missed_followed",
        "_outcome",
        "_resume",
        "_sent",
        "_spans",
        "_tenant",
    )

    def __init__(self, spans: Spans, tenant: str) -> None:
        self._spans = spans
        self._tenant = encode_token(tenant)
        self._missed = self._missed_followed = 0
        self._begun_at = time.time_ns()  # 0: it has caught up
        self._outcome = ""
        self._resume: Span | None = None
        self._sent: deque[_Sent] = deque(maxlen=REMEMBERED)
        self._acked = 0

    def delivered(self, seq: int, message: Message, epoch: str) -> None:
        """A record was sent. Of one that is not to be shown (`skip`) only the position was: it has no span and does not count."""
        if message.skip:
            return
        if self._begun_at:
            self._missed += 1
        origin = followed_in(message.headers)
        if origin is None or not self._room():
            return
        stored_at = int(datetime.fromisoformat(message.time).timestamp() * 1e9) if message.time else None
        if stored_at is not None and self._begun_at and self._resume is None:
            self._resume = self._spans.begin_apart(names.RESUME, (), {}, self._begun_at)
        about = {names.MESSAGE_ID: f"{epoch}.{seq}"}
        span = self._spans.begin(names.DELIVER, origin, about, stored_at=stored_at, within=self._resume)
        span.end()
        try:
            id = _decode(message.body).id
        except (msgspec.DecodeError, UnicodeDecodeError):
            id = ""
        self._sent.append(_Sent(seq, id, time.time_ns(), span.get_span_context()))

    def _room(self) -> bool:
        """Whether one more delivery may have a span."""
        if self._begun_at and self._missed_followed >= RESUMED_MAX:
            _UNFOLLOWED.inc()
            return False
        if not self._spans.room(self._tenant):
            return False
        if self._begun_at:
            self._missed_followed += 1
        return True

    def acknowledged(self, seq: int) -> None:
        """The device has everything up to `seq`."""
        if self._sent:
            now = time.time_ns()
            for sent in self._sent:
                if self._acked < sent.seq <= seq:
                    since = sent.at if self._spans.is_fresh(sent.at, now) else now
                    self._spans.begin(names.ACK, sent.context, {}, since=since, stored_at=sent.at).end()
        self._acked = max(self._acked, seq)

    def reading(self, ids: Collection[str], up_to: int | None) -> Span | None:
        """The user says that he has read these records, or all up to a sequence: the span of that, where one is followed."""
        for sent in reversed(self._sent):
            if sent.id in ids or (up_to is not None and sent.seq <= up_to):
                return self._spans.begin(names.READ, sent.context, {}, stored_at=sent.at)
        return None

    def newest(self, after: int, up_to: int) -> str | None:
        """What a receipt about this range belongs to: the delivery of the newest followed record in it."""
        for sent in reversed(self._sent):
            if after < sent.seq <= up_to:
                return traceparent_of(sent.context)
        return None

    def adopted(self, outcome: str) -> None:
        """The session begins, or begins anew: sequences from before may mean other records now."""
        self._outcome = outcome
        self._sent.clear()
        self._acked = 0

    def caught_up(self) -> None:
        """All that was missed is sent."""
        if not self._begun_at:
            return
        if self._resume is None and self._spans.by_chance() and self._spans.room(self._tenant):
            self._resume = self._spans.begin_apart(names.RESUME, (), {}, self._begun_at)
        self._end()

    def close(self) -> None:
        """The session is over."""
        if self._begun_at:
            self._outcome = "left"
        self._end()

    def _end(self) -> None:
        self._begun_at = 0
        if self._resume is not None:
            self._resume.set_attributes({names.OUTCOME: self._outcome, names.MESSAGE_COUNT: self._missed})
            self._resume.end()
            self._resume = None
