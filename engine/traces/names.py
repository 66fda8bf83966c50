"""What spans are called and what they may say: names and attributes by OpenTelemetry's messaging conventions (v1.44.0).

The lists are closed. A subject is named by its template, never as it is: users are in it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from opentelemetry.trace import SpanKind

EVENT: Final = "events.{tenant}.{key}.{type}"
BULK: Final = "bulk.{tenant}.{key}.{type}"
LATER: Final = "wait.{partition}.{tenth}.{tenant}"
LOG: Final = "log.{partition}.{tenant}.{user}"
RECEIPT: Final = "rcpt.{partition}.{tenant}.{user}"
JOB: Final = "job.{channel}.{lane}.{tenant}.{user}"

ATTEMPT_NUMBER: Final = "seamark.attempt"
CHANNEL: Final = "seamark.channel"
ERROR: Final = "error.type"
GROUP: Final = "messaging.consumer.group.name"
MESSAGE_COUNT: Final = "messaging.batch.message_count"
"""How many messages the batch has that this one was in; of `APPEND`, `STORE_JOB` and `RESUME`, how many the span is about."""

MESSAGE_ID: Final = "messaging.message.id"
OUTCOME: Final = "seamark.outcome"
"""What came of it. Of `DISPATCH`: appended, put_off, duplicate, dead, or why its records are withheld (cancelled, expired); of
`RESUME`: resumed, the reason of a reset, or left; of `ATTEMPT`: an `OutcomeKind`; of `BURY`: dead."""

PRIORITY: Final = "seamark.priority"
PROVIDER: Final = "seamark.provider"
TENANT: Final = "seamark.tenant"
TYPE: Final = "seamark.type"

ATTRIBUTES: Final = frozenset({
    ATTEMPT_NUMBER, CHANNEL, ERROR, GROUP, MESSAGE_COUNT, MESSAGE_ID, OUTCOME, PRIORITY, PROVIDER, TENANT, TYPE,
    "http.request.method", "http.response.status_code", "http.route", "messaging.destination.template",
    "messaging.operation.name", "messaging.operation.type", "messaging.system",
})  # fmt: skip
"""All that spans of roles say, those of requests over HTTP included."""


class Hop(NamedTuple):
    """One kind of span.

    Attributes:
        name: what is done, in a word of Seamark: the conventions' `messaging.operation.name`.
        type: what that is to the conventions: their `messaging.operation.type`.
        destination: the template of the subjects that it is done with.
    """

    name: str
    type: str
    destination: str
    kind: SpanKind

    @property
    def title(self) -> str:
        """The span's name."""
        return f"{self.name} {self.destination}"

    @property
    def attributes(self) -> dict[str, str]:
        """What all its spans say."""
        return {
            "messaging.system": "nats",
            "messaging.operation.name": self.name,
            "messaging.operation.type": self.type,
            "messaging.destination.template": self.destination,
        }


ACCEPT: Final = Hop("accept", "send", EVENT, SpanKind.PRODUCER)
"""A gateway has an event stored."""

ACCEPT_BULK: Final = ACCEPT._replace(destination=BULK)

ROUND: Final = Hop("dispatch round", "process", EVENT, SpanKind.CONSUMER)
"""A dispatcher works on consecutive events of EVENTS; those of BULK and LATER have their own destination (`RoundSpans`)."""

DISPATCH: Final = Hop("dispatch", "process", EVENT, SpanKind.CONSUMER)
"""What a dispatcher does with one of them, with the same destination."""

APPEND: Final = Hop("append", "send", LOG, SpanKind.PRODUCER)
"""A dispatcher stores the event's records in one partition."""

PUT_OFF: Final = APPEND._replace(destination=LATER)
"""A dispatcher stores the event in LATER, until it is due."""

DELIVER: Final = Hop("deliver", "process", LOG, SpanKind.CONSUMER)
"""A gateway hands a record to a device's connection."""

ACK: Final = Hop("ack", "settle", LOG, SpanKind.CLIENT)
"""From the moment a record was sent until the device has said that it has it."""

READ: Final = Hop("read", "send", LOG, SpanKind.PRODUCER)
"""A gateway has stored that the user has read."""

RESUME: Final = Hop("resume", "receive", LOG, SpanKind.CLIENT)
"""A gateway brings a device from its cursor to the end of its log."""

STORE_RECEIPT: Final = Hop("receipt", "send", RECEIPT, SpanKind.PRODUCER)
"""A fact about delivery is stored."""

PLAN: Final = Hop("plan", "process", LOG, SpanKind.CONSUMER)
"""A planner decides by which channels a notification goes."""

STORE_JOB: Final = Hop("job", "send", JOB, SpanKind.PRODUCER)
"""A planner has stored what is to be sent of a notification: so many jobs, now or by a schedule."""

ATTEMPT: Final = Hop("attempt", "process", JOB, SpanKind.CLIENT)
"""A worker tries a job at a provider."""

BURY: Final = Hop("bury", "send", JOB, SpanKind.PRODUCER)
"""The dead letter of a job is stored: by a worker, planner or projector."""

FOLD: Final = Hop("fold", "process", LOG, SpanKind.CONSUMER)
"""A projector takes a record into a projection; `GROUP` says which."""

FOLD_RECEIPT: Final = FOLD._replace(destination=RECEIPT)
