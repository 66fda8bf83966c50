"""Places that many want at a time: so many in all, and no more than a part of them for one tenant."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary


class NoPlace(Exception):
    """All places are taken, or all that one tenant may have. Nothing was done: come back in a moment."""


class Shares:
    """Places that are had at once or not at all.

    Args:
        at_most: places in all.
        per_tenant: of which one tenant may have so many.
    """

    def __init__(self, at_most: int, per_tenant: int) -> None:
        self._at_most, self._per_tenant = at_most, per_tenant
        self._taken: Counter[str] = Counter()
        self._count = 0

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """A place for as long as the block runs.

        Raises:
            NoPlace: there is none for this tenant now.
        """
        if self._count >= self._at_most or self._taken.get(tenant, 0) >= self._per_tenant:
            raise NoPlace
        self._count += 1
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._count -= 1
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]


class Queue:
    """Places that are waited for, in the order of asking; whoever waits has a deadline of its own.

    Args:
        at_most: places in all.
        per_tenant: of which one tenant may have so many; others never wait behind what it wants beyond them.
    """

    def __init__(self, at_most: int, per_tenant: int) -> None:
        self._all = asyncio.Semaphore(at_most)
        self._per_tenant = per_tenant
        # Kept by those who use them.
        self._tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """A place for as long as the block runs."""
        mine = self._tenants.get(tenant)
        if mine is None:
            mine = self._tenants[tenant] = asyncio.Semaphore(self._per_tenant)
        async with mine, self._all:
            yield
