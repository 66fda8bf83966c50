"""Where a projection keeps its effect and its position, together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from engine.partition.reader import Delivered


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
