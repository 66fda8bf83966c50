"""All endpoints: the API is what stands here, and `GET /openapi.json` describes it."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from gateway.api.acks import acknowledge
from gateway.api.controls import change_controls, show_controls
from gateway.api.events import publish_event, publish_events
from gateway.api.inbox import inbox_page, mark_archived, mark_read
from gateway.api.now import broadcast
from gateway.api.proof import trace_notification
from gateway.api.transactions import cancel_transaction
from gateway.carriers.poll import poll_records
from gateway.carriers.sse import follow_stream
from gateway.carriers.ws import follow_socket
from gateway.health import healthz, readyz
from gateway.http.endpoint import Call, Endpoint
from gateway.http.openapi import document


@Endpoint("GET", "/openapi.json")
async def openapi(call: Call[None, None, None]) -> Annotated[msgspec.Raw, dict[str, Any]]:
    """This document."""
    return _DOCUMENT


ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    publish_event,
    publish_events,
    broadcast,
    cancel_transaction,
    follow_socket,
    follow_stream,
    poll_records,
    acknowledge,
    inbox_page,
    mark_read,
    mark_archived,
    trace_notification,
    show_controls,
    change_controls,
    healthz,
    readyz,
    openapi,
)

_DOCUMENT: Final = msgspec.Raw(msgspec.json.encode(document(ENDPOINTS)))
