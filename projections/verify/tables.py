"""The verification of a projection in PostgreSQL. `projections.verify.streams` says how it is done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from engine.broker.jetstream import Broker
from projections.inbox.table import INBOX
from projections.verify.deliveries import DeliveriesVerification
from projections.verify.inbox import InboxVerification
from projections.verify.streams import Difference, Progress, StreamVerification, Verified

if TYPE_CHECKING:
    from projections.postgres.versions import Pool

__all__ = ["Difference", "Verification", "Verified"]


class Verification:
    """One verification of `inbox` or `deliveries`; iterate over `differences`, then look at `result`."""

    def __init__(
        self, broker: Broker, pool: Pool, projection: str, partitions: int, *, progress: Progress | None = None
    ) -> None:
        make = InboxVerification if projection == INBOX else DeliveriesVerification
        self._work: StreamVerification = make(broker, pool, partitions, progress)

    @property
    def result(self) -> Verified:
        """What has been looked at so far."""
        return self._work.result

    def differences(self) -> AsyncIterator[Difference]:
        """Every difference there is.

        Raises:
            StoreUnavailable, BrokerError: it could not be told. TopologyError: another incarnation of a stream.
        """
        return self._work.differences()
