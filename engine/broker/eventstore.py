"""Publishing to EVENTS: another publisher's event must never be taken for ours (ADR 0023).

The broker calls a message a duplicate when an earlier one had the same `Nats-Msg-Id`, whoever sent that one and on whatever
subject. So a publisher that foresees another's message id could suppress its event, and the PubAck would call the event stored.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from engine import metrics
from engine.broker.addresses import login_of
from engine.broker.jetstream import Broker, PubAck, Stored
from engine.broker.settings import NatsSettings
from engine.errors import Forbidden
from engine.limits import APPEND_BUDGET_SECONDS
from seamark.protocol.events import Encoded, new_event_id
from seamark.protocol.subjects import EVENTS_STREAM

_log = structlog.get_logger("seamark.events")

_SEAL_BYTES = 16
"""Of an HMAC-SHA256: 128 bits are not guessed within the two minutes of the broker's window."""

_LOOK_SECONDS_MIN = 1.0


class _Identity(msgspec.Struct):
    """The one member of a stored event that says which event it is."""

    id: str = ""


_identity_of = msgspec.json.Decoder(_Identity).decode


class EventStore:
    """Appends events, each at most once within the broker's window of two minutes.

    A connection with a secret of its own (a password, a credentials file) seals its message ids with it: whoever publishes
    with the same login makes the same ids, and nobody else can foresee them. Without accounts there is no such secret, but then
    everybody may read: the store looks at the event that the broker calls the first one.

    Args:
        broker: a connection that may publish events.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._secret = _secret_of(broker.settings)

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
        if await self._holds(event, ack.seq, left):
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

    async def _holds(self, event: Encoded, seq: int, timeout_seconds: float) -> bool:
        """Whether the message stored at `seq` is this event; False also where reading is not allowed."""
        try:
            stored = await self._broker.leader_next(EVENTS_STREAM, "ev.>", seq, timeout_seconds=timeout_seconds)
        except Forbidden:
            return False
        return stored is not None and stored.seq == seq and _same(event, stored)


def _same(event: Encoded, stored: Stored) -> bool:
    """An event is named by tenant and id; `stored` has the subject `ev.<q>.<tenant>.<key>.<type>`."""
    try:
        id = _identity_of(stored.payload).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return f"{stored.subject.split('.')[2]}:{id}" == event.msg_id


def sealed(msg_id: str, secret: bytes) -> str:
    """A message id that only those who know the secret can foresee; the same for the same event each time."""
    seal = hmac.digest(secret, msg_id.encode(), hashlib.sha256)[:_SEAL_BYTES]
    return f"{msg_id}:{base64.urlsafe_b64encode(seal).rstrip(b'=').decode()}"


def _secret_of(settings: NatsSettings) -> bytes | None:
    """The secret that only this login knows; None: it has none."""
    login = login_of(settings.url, settings.user, settings.password, settings.credentials_file)
    if "user_credentials" in login:
        return Path(login["user_credentials"]).read_bytes()
    password = login.get("password")
    return password.encode() if password else None
