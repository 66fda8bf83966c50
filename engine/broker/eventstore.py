"""Appending to EVENTS and BULK for the gateway, by the rules of `seamark.protocol.appends`."""

from __future__ import annotations

import time
from collections.abc import Mapping

import structlog

from engine import metrics
from engine.broker.jetstream import Broker, PubAck
from engine.errors import Forbidden
from engine.limits import APPEND_BUDGET_SECONDS
from seamark.protocol.appends import is_same, sealed
from seamark.protocol.events import Encoded, new_event_id
from seamark.protocol.logins import login_of, secret_of

_log = structlog.get_logger("seamark.events")

_LOOK_SECONDS_MIN = 1.0


class EventStore:
    """Appends events, each at most once within the broker's window of two minutes."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        settings = broker.settings
        self._secret = secret_of(login_of(settings.url, settings.user, settings.password, settings.credentials_file))

    async def append(
        self,
        event: Encoded,
        headers: Mapping[str, str] | None = None,
        *,
        budget_seconds: float = APPEND_BUDGET_SECONDS,
    ) -> PubAck:
        """Store an event; `duplicate`: it was stored before, and nothing was added.

        Raises:
            ApiError, Unavailable, Unanswered: as `Broker.append`; after Unanswered the same event may be appended again.
        """
        deadline = time.monotonic() + budget_seconds
        msg_id = event.msg_id if self._secret is None else sealed(event.msg_id, self._secret)
        ack = await self._broker.append(
            event.subject, event.payload, headers, msg_id=msg_id, budget_seconds=budget_seconds
        )
        if not ack.duplicate or self._secret is not None:
            return ack
        left = max(_LOOK_SECONDS_MIN, deadline - time.monotonic())
        if await self._holds(event, ack, left):
            return ack
        metrics.event_ids_taken.inc()
        _log.warning(
            "event_id_taken", remedy="let publishers have accounts of their own: nats/accounts.conf", seq=ack.seq
        )
        # Nobody can have foreseen this one. Another publication of the event is caught by its claim.
        again = await self._broker.append(
            event.subject,
            event.payload,
            headers,
            msg_id=f"{event.msg_id}:{new_event_id()}",
            budget_seconds=max(_LOOK_SECONDS_MIN, deadline - time.monotonic()),
        )
        return again._replace(duplicate=False)

    async def _holds(self, event: Encoded, ack: PubAck, timeout_seconds: float) -> bool:
        """Whether the message stored where `ack` says is this event; False also where reading is not allowed."""
        try:
            stored = await self._broker.leader_next(ack.stream, ">", ack.seq, timeout_seconds=timeout_seconds)
        except Forbidden:
            return False
        return stored is not None and stored.seq == ack.seq and is_same(event, stored.subject, stored.payload)
