"""The log in the simulated world of `joinsim`: the leader's view is the whole, a replica's is a prefix of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

from gateway.join.port import LogState
from seamark.protocol.cursor import Cursor


class Broken(AssertionError):
    """A promise was not kept."""


class Record:
    """A record of the user followed. `gone` says why it is not owed to anybody any more."""

    __slots__ = ("born", "epoch", "gone", "prev", "seq")

    def __init__(self, epoch: str, seq: int, prev: int, born: float) -> None:
        self.epoch = epoch
        self.seq = seq
        self.prev = prev
        self.born = born
        self.gone: Literal["", "erased", "trimmed", "lost"] = ""

    def __repr__(self) -> str:
        return f"<{self.epoch}.{self.seq} prev {self.prev} {self.gone}>"


def seq_of(record: Record) -> int:
    return record.seq


def incarnation(epoch: str) -> int:
    """Epochs of this world are numbered: the higher one is the later."""
    return int(epoch[1:])


class View:
    """A prefix of what happened to the log: the leader's is the whole, a replica's may end earlier."""

    def __init__(self) -> None:
        self.epoch = "e0"
        self.first = 1
        self.last = 0
        self.records: list[Record] = []

    def apply(self, operation: tuple[Any, ...]) -> None:
        kind = operation[1]
        if kind == "append":
            _, _, seq, record = operation
            self.last = seq
            if record is not None:
                self.records.append(record)
        elif kind == "erase":
            if operation[2] in self.records:
                self.records.remove(operation[2])
        elif kind == "trim":
            self.first = operation[2]
            self.records = [record for record in self.records if record.seq >= self.first]
        elif kind == "recreate":
            self.epoch, self.first, self.last, self.records = operation[2], 1, 0, []
        else:
            self.last = operation[2]
            self.records = [record for record in self.records if record.seq <= self.last]
            self.first = min(self.first, self.last + 1)

    def state(self) -> LogState:
        return LogState(self.epoch, self.first, self.last)

    def head(self) -> int:
        return self.records[-1].seq if self.records else 0

    def since(self, seq: int, limit: int) -> tuple[list[Record], bool]:
        start = bisect_left(self.records, seq, key=seq_of)
        return self.records[start : start + limit], len(self.records) > start + limit


class Replica(View):
    def __init__(self) -> None:
        super().__init__()
        self.applied = 0
        self.lag = 0.0


class Projections:
    """Folds of the log: behind it, and after an incident at a place that it does not know."""

    def __init__(self, lag: float) -> None:
        self.lag = lag
        self.rebuild_at = 0.0
        self.at = Cursor("e0", 0)

    def checkpoint(self, now: float, leader: View, operations: Sequence[tuple[Any, ...]]) -> Cursor:
        if now < self.rebuild_at:
            return self.at
        seq = min(self.at.seq if self.at.epoch == leader.epoch else 0, leader.last)
        for operation in reversed(operations):
            if operation[1] in {"recreate", "back"}:
                break
            if operation[1] == "append" and operation[0] <= now - self.lag:
                seq = max(seq, operation[2])
                break
        self.at = Cursor(leader.epoch, seq)
        return self.at
