"""What is never stored, over HTTP: `POST /v1/events` with `at_most_once`, and `POST /v1/broadcasts`.

202 says that the broker was handed the message, nothing more: who is connected gets it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from engine.broker.jetstream import Broker
from engine.buckets import Buckets
from engine.errors import BrokerError
from engine.limits import NOW_BURST_SECONDS, NOW_PER_SECOND_OF_TENANT
from gateway.access.principals import Scope, Service
from gateway.access.throttles import Throttles
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, UNAVAILABLE, Kind, Problem
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import EventId, new_event_id
from seamark.protocol.limits import NOW_BYTES_MAX
from seamark.protocol.now import encode, encode_broadcast

THROTTLED: Final = Kind(429, "throttled")
TOO_MANY_MESSAGES: Final = Kind(429, "too_many_messages")

_NOT_SENT: Final = "the broker was not reached: nothing was sent"


class NowMessages:
    """Publishes now messages within a tenant's rate, which is that of one relay."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._rate = Buckets(60 * NOW_PER_SECOND_OF_TENANT, burst=NOW_BURST_SECONDS * NOW_PER_SECOND_OF_TENANT)

    def publish(
        self, tenant: str, *, to: Sequence[str], type: str, id: str, data: Any, fields: Mapping[str, Any]
    ) -> None:
        """Hand one message for each user to the broker.

        Raises:
            InvalidEvent: with the field at fault. Problem: too many, or the broker is away.
        """
        messages = encode(to=to, type=type, tenant=tenant, id=id, data=data, fields=fields)
        _take(self._rate, tenant, len(messages), "now messages")
        try:
            for message in messages:
                self._broker.publish(message.subject, message.payload)
        except BrokerError as error:
            raise Problem(UNAVAILABLE, _NOT_SENT) from error


class Broadcast(msgspec.Struct, forbid_unknown_fields=True):
    """A message for all who are connected."""

    type: str
    data: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    id: EventId | None = None


class BroadcastSent(msgspec.Struct):
    """`id`: what devices see as the message's id."""

    id: str


@Endpoint(
    "POST",
    "/v1/broadcasts",
    scope=Scope.BROADCASTS_WRITE,
    status=202,
    body_bytes=NOW_BYTES_MAX,
    refuses=(INVALID_BODY, THROTTLED, TOO_MANY_MESSAGES, UNAVAILABLE),
)
async def broadcast(call: Call[Service, None, Broadcast]) -> BroadcastSent:
    """Show a message to all who are connected now. It is not stored: who comes later never sees it."""
    body, tenant = call.body, call.principal.tenant
    id = body.id or new_event_id()
    try:
        message = encode_broadcast(type=body.type, tenant=tenant, id=id, data=body.data)
    except InvalidEvent as error:
        raise Problem(INVALID_BODY, error.detail, field=None if error.reason == "json" else error.reason) from error
    await check_throttles(call.context.throttles, tenant, body.type)
    _take(call.context.broadcast_rate, tenant, 1, "broadcasts")
    try:
        call.context.broker.publish(message.subject, message.payload)
        await call.context.broker.flush()
    except BrokerError as error:
        raise Problem(UNAVAILABLE, _NOT_SENT) from error
    return BroadcastSent(id)


async def check_throttles(throttles: Throttles, tenant: str, type: str) -> None:
    """Pass an event of a type that may be published now, and count it.

    Raises:
        Problem: 429.
    """
    wait = await throttles.wait_seconds(tenant, type)
    if wait:
        said = "the operator lets this tenant publish fewer events of this type"
        raise Problem(THROTTLED, said, retry_after_seconds=math.ceil(wait))


def _take(rate: Buckets, tenant: str, count: int, what: str) -> None:
    if not rate.take(tenant, count):
        wait = max(1, round(rate.wait_seconds(tenant, count)))
        raise Problem(TOO_MANY_MESSAGES, f"too many {what} of this tenant: wait", retry_after_seconds=wait)
