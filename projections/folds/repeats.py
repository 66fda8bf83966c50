"""Which notifications repeat an earlier one: the rule that all folds of a log share (ADR 0016).

An id may stand twice in a log: the deduplication store was lost, or its horizon has passed, and the event was published
again. A notification whose id is among the last `REMEMBERED_MAX` of its user changes nothing, whatever became of the first
one: what was read, archived, recalled or superseded must not be unread again. One that comes later than that takes the
place of the first one, and is new: it counts, and it stands in the list as unread, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

REMEMBERED_MAX: Final = 128
"""How many of a user's newest notifications are remembered by id: at 40 a day these are three days, as long as ids are claimed.
Of those that do not count any more, Redis keeps up to twice as many before it drops the oldest: 7 KB a user, in the compact form
of a hash, which is searched from one end to the other."""


def fingerprint(id: str) -> str:
    """64 bits of an id, as hexadecimal digits: what Redis keeps of it. By SHA-1, for a script has nothing else."""
    return hashlib.sha1(id.encode(), usedforsecurity=False).hexdigest()[:16]


class Remembered:
    """The newest notifications of one user, by id.

    Args:
        since: ids that came before, each with the number of notifications that came after it.
        bound: how many are remembered.
    """

    __slots__ = ("_added", "_bound", "_numbers")

    def __init__(self, since: Mapping[str, int] | None = None, bound: int = REMEMBERED_MAX) -> None:
        self._bound = bound
        self._added = 0
        newest_last = sorted(since.items(), key=lambda item: -item[1]) if since else ()
        self._numbers = {id: -1 - count for id, count in newest_last}

    def add(self, id: str) -> bool:
        """Add a notification. False: it repeats an earlier one, and nothing has changed."""
        number = self._numbers.get(id)
        if number is not None:
            if self._added - number <= self._bound:
                return False
            del self._numbers[id]
        self._numbers[id] = self._added
        self._added += 1
        if len(self._numbers) > self._bound:
            del self._numbers[next(iter(self._numbers))]
        return True
