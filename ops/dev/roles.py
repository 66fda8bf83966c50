"""What a development stack keeps running: roles and servers are restarted when they die, with backoff, and it is said."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ops.dev.child import Child, ServerFailed
from seamark.backoff import Backoff

BACKOFF_SECONDS_MIN = 0.5
BACKOFF_SECONDS_MAX = 10.0
CALM_SECONDS = 30.0
"""What lived this long starts with the shortest backoff again."""
STOP_SECONDS = 25.0
POLL_SECONDS = 0.1


class Role:
    """One role: `python -m ops <words>`.

    Args:
        say: called with one line whenever something happens.
    """

    def __init__(
        self, name: str, words: list[str], env: Mapping[str, str], log_path: Path, say: Callable[[str], None]
    ) -> None:
        self.name = name
        self._words = words
        self._env = env
        self._say = say
        self.child = Child(name, log_path, death_signal=signal.SIGTERM)

    def spawn(self) -> None:
        """Start it; from the thread that lives as long as the stack."""
        self.child.spawn([sys.executable, "-m", "ops", *self._words], env=self._env)

    async def keep(self) -> None:
        """Restart it for ever when it ends by itself."""
        await keep(self.child, self.spawn, self._say)

    def stop(self) -> None:
        """End it in order."""
        self.child.stop(signal.SIGTERM, STOP_SECONDS)


async def keep(child: Child, spawn: Callable[[], None], say: Callable[[str], None]) -> None:
    """Spawn a child again, for ever, when it ends by itself; say so each time. Ends by cancellation."""
    backoff = Backoff(BACKOFF_SECONDS_MIN, BACKOFF_SECONDS_MAX, jitter=0.0)
    while True:
        began = time.monotonic()
        while child.alive:  # noqa: ASYNC110 - nobody tells us but the kernel, when asked
            await asyncio.sleep(POLL_SECONDS)
        if time.monotonic() - began > CALM_SECONDS:
            backoff.succeeded()
        pause = backoff.next_seconds()
        say(f"{child.name} ended ({_why(child.exit_code)}), restarting in {pause:g} s; log: {child.log_path}")
        await asyncio.sleep(pause)
        try:
            spawn()
        except (OSError, ServerFailed) as error:  # no process or no program to be had now: the next round tries again
            say(f"{child.name} cannot be started: {error}")


def _why(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
