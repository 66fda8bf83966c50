"""Faults at random moments, drawn from a seed: what is done, to whom and when can be done again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol


class Victim(Protocol):
    """A process that can be hurt and brought back."""

    @property
    def alive(self) -> bool: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...
    def suspend(self) -> None: ...
    def resume(self) -> None: ...


class Fault(NamedTuple):
    """A kind of fault and how often it is drawn in comparison with the others."""

    name: str
    weight: float
    inject: Callable[[random.Random], Awaitable[None]]


def kill_one(
    victims: Sequence[Victim], start: Callable[[Victim, random.Random], None]
) -> Callable[..., Awaitable[None]]:
    """SIGKILL one of them, and start it again at once."""

    async def inject(rng: random.Random) -> None:
        victim = rng.choice(victims)
        victim.kill()
        start(victim, rng)

    return inject


def stop_one(
    victims: Sequence[Victim], start: Callable[[Victim, random.Random], None]
) -> Callable[..., Awaitable[None]]:
    """End one of them in good order, and start it again."""

    async def inject(rng: random.Random) -> None:
        victim = rng.choice(victims)
        await asyncio.to_thread(victim.stop)
        start(victim, rng)

    return inject


def suspend_one(victims: Sequence[Victim], seconds: tuple[float, float]) -> Callable[..., Awaitable[None]]:
    """Freeze one of them for a while."""

    async def inject(rng: random.Random) -> None:
        victim = rng.choice(victims)
        victim.suspend()
        await asyncio.sleep(rng.uniform(*seconds))
        victim.resume()

    return inject


async def torment(
    rng: random.Random,
    faults: Sequence[Fault],
    *,
    pause_seconds: tuple[float, float],
    count: int = 0,
    until: Callable[[], bool] = lambda: True,
) -> dict[str, int]:
    """Inject faults with random pauses between them: every kind once, then whatever is drawn; how often each kind was.

    Goes on until there were `count` faults, every kind among them, and `until()` holds.
    """
    drawn = dict.fromkeys((fault.name for fault in faults), 0)
    due = rng.sample(faults, len(faults))
    while due or sum(drawn.values()) < count or not until():
        await asyncio.sleep(rng.uniform(*pause_seconds))
        fault = due.pop() if due else rng.choices(faults, [fault.weight for fault in faults])[0]
        drawn[fault.name] += 1
        await fault.inject(rng)
    return drawn
