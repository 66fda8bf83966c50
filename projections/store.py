"""Where a projection keeps its effect and its position, together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import structlog

from engine.errors import BrokerError, PartitionStopped, StepDown
from engine.partition.reader import Delivered
from seamark.protocol.errors import SeamarkError

_log = structlog.get_logger("seamark.projection")


class StoreUnavailable(SeamarkError):
    """The projection's store does not answer."""


class StoreBroken(StoreUnavailable):
    """The store answers what no outage explains: a constraint, a missing table or permission, an error of ours.

    A reader treats it as an outage. A writer stops, because trying again for ever would hide the fault.
    """

    def __init__(self, message: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = (
            remedy or "Mend what it names, or report it as a fault of Seamark. Then the partition goes on by itself."
        )


class Checkpoint(NamedTuple):
    """Everything of a stream partition up to `seq` is in the projection; `epoch` is the incarnation of the stream."""

    epoch: str
    seq: int


class Store(Protocol):
    """The effect and checkpoint of one projection of one partition, changed in one transaction."""

    async def checkpoint(self) -> Checkpoint | None:
        """The stored checkpoint, None when nothing was ever applied.

        Raises:
            StoreUnavailable: ask again.
        """

    async def apply(self, batch: Sequence[Delivered], expected: Checkpoint | None, reached: Checkpoint) -> bool:
        """Fold `batch` in and move the checkpoint from `expected` to `reached`, both or neither.

        Returns:
            False: the stored checkpoint is not `expected`; nothing was changed.

        Raises:
            StoreUnavailable: the outcome may be unknown; the stored checkpoint tells.
        """


class StoppingStore:
    """A store of which only an outage is waited for; anything else stops the partition, with the reason.

    The failed batch is tried again whenever the checkpoint is asked for. So a stopped partition finds out whether it was
    repaired, and it goes on only when that very batch is stored.
    """

    def __init__(self, store: Store, name: str, stream: str) -> None:
        self._store = store
        self._name = f"{name} of {stream}"
        self._failed: tuple[Sequence[Delivered], Checkpoint | None, Checkpoint] | None = None

    async def checkpoint(self) -> Checkpoint | None:
        """As `Store`.

        Raises:
            PartitionStopped: the checkpoint cannot be read, or the failed batch not stored, for another reason than an outage.
        """
        if self._failed is not None:
            await self.apply(*self._failed)
        try:
            return await self._store.checkpoint()
        except Exception as error:
            self._judge(error, "its checkpoint cannot be read")
            raise

    async def apply(self, batch: Sequence[Delivered], expected: Checkpoint | None, reached: Checkpoint) -> bool:
        """As `Store`.

        Raises:
            PartitionStopped: the batch cannot be stored, for another reason than an outage.
        """
        try:
            applied = await self._store.apply(batch, expected, reached)
        except Exception as error:
            if not _passes(error):
                self._failed = (batch, expected, reached)
            self._judge(error, f"records {batch[0].seq} to {batch[-1].seq} cannot be stored")
            raise
        self._failed = None
        return applied

    def _judge(self, error: Exception, what: str) -> None:
        if _passes(error):
            return
        if not isinstance(error, StoreBroken):
            _log.error("fold_failed", projection=self._name, exc_info=error)
        remedy = error.remedy if isinstance(error, StoreBroken) else StoreBroken().remedy
        reason = str(error) if isinstance(error, StoreBroken) else type(error).__name__
        raise PartitionStopped(f"{self._name}: {what}: {reason}", remedy) from error


def _passes(error: Exception) -> bool:
    """Whether it is an outage, or an error that the caller handles itself."""
    known = StoreUnavailable | BrokerError | StepDown | PartitionStopped
    return isinstance(error, known) and not isinstance(error, StoreBroken)
