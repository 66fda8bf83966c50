"""Which events a dispatcher follows, and for which of their users (ADR 0046). No I/O."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec
from opentelemetry.trace import SpanContext

from engine.broker import wire
from engine.broker.jetstream import Outgoing
from engine.traces.contexts import as_version_00, followed, traceparent_of, unfollowed
from engine.traces.spans import Spans
from seamark.protocol.events import Accepted

FOLLOWED_USERS_MAX: Final = 16
"""Of one event: each is some five more spans, and one event may be for 10 000 users."""

_TRACE: Final = b'"trace":"'
_LINES: Final = (
    (wire.line_of(b"traceparent"), wire.line_of(b"tracestate")),
    (wire.line_of(b"Traceparent"), wire.line_of(b"Tracestate")),
)


class Following(NamedTuple):
    """How an event is followed.

    Attributes:
        context: what all of its spans belong to.
        begins: nobody before the dispatcher had a span of it, so its own is the first.
        stored_at: when the event was stored, in Unix nanoseconds.
        users: the tokens of those whose records are followed on; None: all.
    """

    context: SpanContext
    begins: bool
    stored_at: int
    users: frozenset[str] | None = None


def trace_in(headers: bytes) -> tuple[bytes | None, bytes | None]:
    """`traceparent` and `tracestate` as a publisher has sent them: with a small t or, as from Go's libraries, a capital one."""
    if headers.find(b"raceparent:") >= 0:  # of most events this one look is all
        for parent, state in _LINES:
            if value := wire.value_of(headers, parent):
                found = wire.value_of(headers, state)
                # Where a publisher has left out the end of this line, the server's own header has become a part of it.
                return as_version_00(value), None if found is None or b"Nats-" in found else found
    return None, None


def following(spans: Spans, accepted: Accepted, stored_at: int) -> tuple[Accepted, Following | None]:
    """The event with the context that goes into its records, and how it is followed; None: it is not.

    A publisher's decision counts. Where it has made none, `first_context` decides: here as in the gateway that accepts an event.
    """
    context, begins = followed(accepted.traceparent), not accepted.traceparent
    if begins:
        event = accepted.event
        context = spans.first(accepted.at.tenant_token, event.id, critical=event.priority == "critical")
        if context is not None:
            accepted = msgspec.structs.replace(accepted, traceparent=traceparent_of(context).encode())
    if context is None:
        return accepted, None
    users, step = accepted.recipients, -(-len(accepted.recipients) // FOLLOWED_USERS_MAX)
    few = None if step <= 1 else frozenset(user.token for user in users[::step])
    return accepted, Following(context, begins, stored_at, few)


def not_followed(message: Outgoing) -> Outgoing:
    """A record of an event that is followed, for a user who is not."""
    # The record's own `trace` is the last of that name: its data stands before, and in text quotation marks are escaped.
    before, said, rest = message.payload.rpartition(_TRACE)
    head, named, lines = message.headers.partition(b"traceparent: ")
    return msgspec.structs.replace(
        message, payload=before + said + unfollowed(rest), headers=head + named + unfollowed(lines)
    )
