"""Simulated worlds: one of each seed is run, and no time passes in them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import pytest


class World(Protocol):
    """One course of events, drawn from a seed."""

    async def run(self) -> None:
        """Let it happen."""

    def faults(self) -> list[str]:
        """What became of the promises that does not hold."""


def no_time_passes(patch: pytest.MonkeyPatch) -> None:
    """Whoever sleeps lets others go on, and wakes up at once."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def at_once(seconds: float) -> None:
        await sleep(0)

    patch.setattr(asyncio, "sleep", at_once)


async def violations(world_of: Callable[[int], World], seeds: Iterable[int]) -> dict[int, list[str]]:
    """The faults of the worlds that have any, by seed."""
    found = {}
    for seed in seeds:
        world = world_of(seed)
        await asyncio.wait_for(world.run(), 20)
        if faults := world.faults():
            found[seed] = faults
    return found
