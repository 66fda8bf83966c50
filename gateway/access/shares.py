"""A limited number of places for work at a time. One tenant may have only a part of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary


class NoPlace(Exception):
    """All places are taken, or all that this tenant may have. Nothing was done, so the caller may try again in a moment."""


class Shares:
    """Gives a place at once, or refuses it.

    Args:
        at_most: places in all.
        per_tenant: how many of them one tenant may have.
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
    """Gives places in the order they are asked for, and lets callers wait. Each caller sets its own deadline.

    Args:
        at_most: places in all.
        per_tenant: how many of them one tenant may have. Other tenants never wait behind what it wants beyond them.
    """

    def __init__(self, at_most: int, per_tenant: int) -> None:
        self._all = asyncio.Semaphore(at_most)
        self._per_tenant = per_tenant
        # Each semaphore lives as long as somebody holds it or waits for it.
        self._tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """A place for as long as the block runs."""
        mine = self._tenants.get(tenant)
        if mine is None:
            mine = self._tenants[tenant] = asyncio.Semaphore(self._per_tenant)
        async with mine, self._all:
            yield
