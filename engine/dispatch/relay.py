"""Passes now messages on: from where services publish them to the live subject of their user, checked, bounded, never stored.

Services may not publish on live subjects, where a message with the right headers passes for a record of the log. So a relay
stands between: it takes nothing over but the checked body.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import structlog

from engine import metrics
from engine.broker.jetstream import Broker, NatsSettings, connect
from engine.buckets import Buckets
from engine.errors import BrokerError
from engine.limits import NOW_BURST_SECONDS, NOW_PER_SECOND, NOW_PER_SECOND_OF_TENANT
from seamark.protocol import now
from seamark.protocol.errors import InvalidEvent, InvalidToken
from seamark.protocol.subjects import partition_of

_log = structlog.get_logger("seamark.now")

QUEUE: Final = "relay"
SAID_SECONDS: Final = 10.0
"""Between two lines of the log that say why messages were not passed on: who publishes there gets no answer."""

_FATE = {fate: metrics.now_messages.labels(fate) for fate in ("relayed", "invalid", "expired", "throttled", "lost")}


class Relay:
    """Relays now messages as one of a queue group, of which each message reaches one.

    A tenant may have so many relayed in a second, and all tenants together so many; what is beyond is dropped, for
    the process has stored records to care for.
    """

    def __init__(self, broker: Broker, partitions: int) -> None:
        self._broker = broker
        self._partitions = partitions
        self._of_tenants = _per_second(NOW_PER_SECOND_OF_TENANT)
        self._of_all = _per_second(NOW_PER_SECOND)
        self._said_at = -SAID_SECONDS

    async def start(self) -> None:
        """Listen.

        Raises:
            Unanswered: the broker did not confirm it. Forbidden: this user may not listen there.
        """
        await self._broker.subscribe("now.>", self._on_message, queue=QUEUE).confirmed()

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        fate = self._pass_on(subject, payload)
        _FATE[fate].inc()

    def _pass_on(self, subject: bytes, payload: bytes) -> str:
        tenant = subject.split(b".", 2)[1]
        # Before anything is looked at: this is all that a flood of messages costs.
        if not self._of_tenants.take(tenant) or not self._of_all.take(b""):
            self._say("too many", tenant)
            return "throttled"
        try:
            to = now.parse_subject(subject)
            frame = now.frame_of(to.type, payload, now.utc_now())
        except (InvalidToken, InvalidEvent) as error:
            self._say(error.reason if isinstance(error, InvalidEvent) else "subject", tenant)
            return "invalid"
        if frame is None:
            return "expired"
        partition = partition_of(to.tenant, to.user, self._partitions)
        try:
            # Without headers: no message that came here can bring the sequence of a record.
            self._broker.publish(f"live.{partition}.{to.tenant}.{to.user}", frame)
        except BrokerError:
            return "lost"
        return "relayed"

    def _say(self, why: str, tenant: bytes) -> None:
        at = time.monotonic()
        if at - self._said_at >= SAID_SECONDS:
            self._said_at = at
            _log.warning("now_message_not_relayed", why=why, tenant=tenant.decode(errors="replace")[:128])


def _per_second(most: int) -> Buckets:
    return Buckets(60 * most, burst=NOW_BURST_SECONDS * most)


@asynccontextmanager
async def relaying(settings: NatsSettings, partitions: int) -> AsyncIterator[Relay]:
    """A relay at work, on a connection of its own: a flood of messages must not cut the one that dispatches.

    Raises:
        Unavailable: no server answered. Unanswered, Forbidden: see `Relay.start`.
    """
    broker = await connect(dataclasses.replace(settings, name=f"{settings.name}-relay"))
    try:
        relay = Relay(broker, partitions)
        await relay.start()
        yield relay
    finally:
        await broker.close()
