"""The spans of one session: of followed records that it was sent, of what its device says of them, and of its way to the end.

What a device says by a request of its own has its span, too, where the same process has sent it the record not long ago.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from opentelemetry.trace import Span, SpanContext

from engine import metrics
from engine.traces import names
from engine.traces.contexts import followed_in, traceparent_of
from engine.traces.lines import about
from engine.traces.spans import Spans
from gateway.log.message import Message
from seamark.protocol.subjects import encode_token

REMEMBERED: Final = 8
"""Followed records of a session of which something may still be said. Of older ones no more spans come."""

DEVICES: Final = 1024
"""Devices of which followed records are remembered, also when their session is over: a poll ends with its answer."""

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
        device: the tenant, the user and the device.
        recent: where requests of the device find it; none: they do not.
    """

    __slots__ = (
        "_begun_at",
        "_device",
        "_missed",
        "_missed_followed",
        "_outcome",
        "_recent",
        "_resume",
        "_spans",
        "_tenant",
        "acked",
        "epoch",
        "sent",
    )

    def __init__(self, spans: Spans, device: tuple[str, str, str], recent: RecentTraces | None = None) -> None:
        self._spans = spans
        self._device, self._recent = device, recent
        self._tenant = encode_token(device[0])
        self.epoch = ""
        self._missed = self._missed_followed = 0
        self._begun_at = time.time_ns()  # 0: it has caught up
        self._outcome = ""
        self._resume: Span | None = None
        self.sent: deque[_Sent] = deque(maxlen=REMEMBERED)
        self.acked = 0

    def delivered(self, seq: int, message: Message, epoch: str) -> None:
        """A record was sent. Of one that is not to be shown (`skip`) only the position was: it has no span and does not count."""
        origin = followed_in(message.headers)
        if (origin is None and not self._begun_at) or message.skip:
            return  # so it is with nearly all
        if self._begun_at:
            self._missed += 1
        if origin is None or not self._room():
            return
        stored_at = int(datetime.fromisoformat(message.time).timestamp() * 1e9) if message.time else None
        if stored_at is not None and self._begun_at and self._resume is None:
            self._resume = self._spans.begin_apart(names.RESUME, (), {}, self._begun_at)
        said = {names.MESSAGE_ID: f"{epoch}.{seq}"}
        span = self._spans.begin(names.DELIVER, origin, said, stored_at=stored_at, within=self._resume)
        span.end()
        try:
            id = _decode(message.body).id
        except (msgspec.DecodeError, UnicodeDecodeError):
            id = ""
        if not self.sent and self._recent is not None:
            self.epoch = epoch
            before = self._recent.put(self._device, self)
            if before is not None and before.epoch == epoch:
                self.sent.extend(sent for sent in before.sent if sent.seq < seq)
                self.acked = max(self.acked, before.acked)
        self.sent.append(_Sent(seq, id, time.time_ns(), span.get_span_context()))

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
        """The device has everything up to `seq`. Nobody need say so while nothing is `sent`."""
        if self.sent and self.sent[-1].seq > self.acked:  # else all of them are acknowledged
            now = time.time_ns()
            for sent in self.sent:
                if self.acked < sent.seq <= seq:
                    since = sent.at if self._spans.is_fresh(sent.at, now) else now
                    self._spans.begin(names.ACK, sent.context, {}, since=since, stored_at=sent.at).end()
            self.acked = max(self.acked, seq)

    def read(self, ids: Collection[str], up_to: int | None) -> Span | None:
        """The user says that he has read these records, or all up to a sequence: the span of that, where one is followed."""
        for sent in reversed(self.sent):
            if sent.id in ids or (up_to is not None and sent.seq <= up_to):
                if not self._spans.room(self._tenant):
                    return None  # he may say so as often as he likes
                return self._spans.begin(names.READ, sent.context, {}, stored_at=sent.at)
        return None

    def newest(self, after: int, up_to: int) -> str | None:
        """What a receipt about this range belongs to: the delivery of the newest followed record in it."""
        for sent in reversed(self.sent):
            if after < sent.seq <= up_to:
                return traceparent_of(sent.context)
        return None

    def adopted(self, outcome: str) -> None:
        """The session begins, or begins anew: sequences from before may mean other records now."""
        self._outcome = outcome
        self.sent.clear()
        self.acked = 0

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


@contextlib.contextmanager
def reading(traces: SessionTraces | None, ids: Collection[str], up_to: int | None) -> Iterator[str | None]:
    """The span of a read mark's being stored, as long as the block runs; gives its `traceparent`. Lines of the log belong to it.

    Args:
        traces: of the session of the device. None, or nothing of this was sent to it and is followed: there is no span.
        ids, up_to: what is marked.
    """
    span = None if traces is None else traces.read(ids, up_to)
    if span is None:
        yield None
        return
    context = span.get_span_context()
    try:
        with about(context):
            yield traceparent_of(context)
    finally:
        span.end()


class RecentTraces:
    """By device, the session that was last sent a followed record. Of too many devices the oldest are forgotten."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str, str], SessionTraces] = {}

    def put(self, device: tuple[str, str, str], session: SessionTraces) -> SessionTraces | None:
        """Remember this session as the last of the device; gives the one before."""
        before = self._sessions.pop(device, None)
        self._sessions[device] = session
        if len(self._sessions) > DEVICES:
            del self._sessions[next(iter(self._sessions))]
        return before

    def of(self, device: tuple[str, str, str], epoch: str) -> SessionTraces | None:
        """The last session of a device, if it was sent records of this incarnation of the log."""
        found = self._sessions.get(device)
        return found if found is not None and found.epoch == epoch else None
