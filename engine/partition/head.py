"""The durable consumer of a partition as its readers use it: its position can be set, and one reader at a time holds its pin."""

from __future__ import annotations

import structlog

from engine.broker.jetstream import Broker
from engine.errors import ApiError, BrokerError, TopologyError
from engine.limits import PIN_TIMEOUT_SECONDS
from engine.partition.pulls import GROUP
from engine.partition.worker import Source

_log = structlog.get_logger("seamark.partition")


GIVE_BACK_SECONDS = 1.0
"""For each of the two questions: a process that ends waits no longer for a broker that is slow."""


class ReadingHead:
    """What a reader asks of its consumer, except for messages. Calls raise what `Broker.api` raises."""

    def __init__(self, broker: Broker, source: Source) -> None:
        self._broker = broker
        self._name = f"{source.stream}.{source.consumer}"

    async def put(self, seq: int) -> None:
        """Go on from `seq`: the next message has consumer sequence 1. The reader that holds the pin keeps it."""
        await self._broker.api(f"CONSUMER.RESET.{self._name}", {"seq": max(1, seq)})

    async def is_pinned(self) -> bool:
        """Has the server chosen a reader?"""
        return bool(await self._pins())

    async def _pins(self, timeout_seconds: float = 5.0) -> list[str]:
        info = await self._broker.api(f"CONSUMER.INFO.{self._name}", timeout_seconds=timeout_seconds)
        groups = info.get("priority_groups") or ()
        return [pin for group in groups if (pin := group.get("pinned_client_id"))]

    async def give_back(self, pin: bytes) -> None:
        """Give the pin back, so that a standby is chosen at once. After a kill it waits for the pin's time-out.

        Nothing is done if another reader has been chosen meanwhile: it would lose its own pin.
        """
        try:
            if pin.decode() not in await self._pins(timeout_seconds=GIVE_BACK_SECONDS):
                return
            unpin = f"CONSUMER.UNPIN.{self._name}"
            await self._broker.api(unpin, {"group": GROUP}, timeout_seconds=GIVE_BACK_SECONDS)
        except BrokerError as error:
            _log.debug("pin_not_given_back", consumer=self._name, error=type(error).__name__)


async def read_pin_timeout(broker: Broker, source: Source) -> float:
    """Seconds of silence after which the server gives a partition to a standby, as its consumer is configured.

    Raises:
        TopologyError: the consumer is missing.
    """
    name = f"{source.stream}.{source.consumer}"
    try:
        info = await broker.api(f"CONSUMER.INFO.{name}")
    except ApiError as error:
        raise TopologyError(f"the consumer {name} cannot be read: {error}", "Run `seamark topology apply`") from error
    nanoseconds = info["config"].get("priority_timeout")
    return nanoseconds / 1e9 if nanoseconds else PIN_TIMEOUT_SECONDS
