"""What a process remembers by key, where there are more keys than room: whoever owns most keys is the first to lose one."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Remembered(Generic[Thing]):
    """Things by key `<owner>/<name>`, or `<name>` of those that nobody owns. A look takes the same time however many there are.

    Where there are too many, the owner with the most loses the one that was not asked for longest. So however many keys somebody
    has, those of others stay.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._of_owner: defaultdict[str, OrderedDict[str, Thing]] = defaultdict(OrderedDict)
        # By how many they have, those first that were not asked for longest.
        self._owners: defaultdict[int, OrderedDict[str, None]] = defaultdict(OrderedDict)
        self._largest = 0

    def get(self, key: str) -> Thing | None:
        """What is remembered of a key. It counts as asked for, and is forgotten later."""
        owner = owner_of(key)
        theirs = self._of_owner.get(owner)
        if theirs is None or key not in theirs:
            return None
        theirs.move_to_end(key)
        self._owners[len(theirs)].move_to_end(owner)
        return theirs[key]

    def put(self, key: str, thing: Thing) -> None:
        """Remember something of a key of which nothing is remembered."""
        owner = owner_of(key)
        theirs = self._of_owner[owner]
        theirs[key] = thing
        self._moved(owner, len(theirs) - 1, len(theirs))
        self._largest = max(self._largest, len(theirs))
        self._count += 1
        if self._count > self._most:
            self._forget_one()

    def _forget_one(self) -> None:
        owner = next(iter(self._owners[self._largest]))
        theirs = self._of_owner[owner]
        theirs.popitem(last=False)
        self._moved(owner, self._largest, len(theirs))
        self._count -= 1
        if not theirs:
            del self._of_owner[owner]
        if self._largest not in self._owners:
            self._largest -= 1

    def _moved(self, owner: str, before: int, now: int) -> None:
        if before:
            del self._owners[before][owner]
            if not self._owners[before]:
                del self._owners[before]
        if now:
            self._owners[now][owner] = None


def owner_of(key: str) -> str:
    """Whose a key is: the tenant of an endpoint."""
    return key.rpartition("/")[0]
