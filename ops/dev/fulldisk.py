"""Restarts a nats-server whose disk was full: until then it stores nothing, even when there is room again."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from enum import Enum
from typing import Final

from ops.dev.natsserver import NatsServer
from seamark.backoff import Backoff

LOOK_SECONDS: Final = 2.0

ROOM_BYTES_MIN: Final = 32 << 20
"""A restart with less would soon end where it began: a stream's file grows to 8 MB, and there are several streams."""

RESTART_SECONDS_MIN: Final = 10.0
RESTART_SECONDS_MAX: Final = 300.0
"""Bounds of the time from one restart to the next. It grows, since restarts do not mend a broken disk that looks empty."""


class Action(Enum):
    """What to do about a server that cannot write."""

    NOTHING = "nothing"
    SAY = "say that room is needed"
    RESTART = "restart"


class FullDisk:
    """Decides, look by look, what to do about one server's disk. Times are seconds on one clock."""

    def __init__(self) -> None:
        self._said = False
        self._restart_at = 0.0
        self._restarts = Backoff(RESTART_SECONDS_MIN, RESTART_SECONDS_MAX, jitter=0.0)

    def decide(self, error: str | None, free_bytes: int, now: float) -> Action:
        """What to do now that the server reports this write error (None: it can write) with so many bytes free."""
        if error is None:
            if now >= self._restart_at + RESTART_SECONDS_MAX:  # it has worked for a while
                self._restarts.succeeded()
            self._said = False
            return Action.NOTHING
        if free_bytes < ROOM_BYTES_MIN or now < self._restart_at:
            action = Action.NOTHING if self._said else Action.SAY
            self._said = True
            return action
        self._said = False
        self._restart_at = now + self._restarts.next_seconds()
        return Action.RESTART


async def keep_writable(server: NatsServer, say: Callable[[str], None]) -> None:
    """Say when a server cannot write, and stop it once there is room. Whoever keeps it running then starts it again.

    Ends by cancellation.
    """
    disk = FullDisk()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        error = await asyncio.to_thread(server.write_error)
        try:
            free = shutil.disk_usage(server.data).free
        except OSError:  # the folder is gone: the server will say more about that
            continue
        action = disk.decide(error, free, time.monotonic())
        if action is Action.SAY:
            say(
                f"{server.name} cannot write {error}; it is restarted once {ROOM_BYTES_MIN >> 20} MiB are free:"
                f" make room where {server.data} is"
            )
        elif action is Action.RESTART:
            say(f"{server.name} cannot write {error}, and there is room again: restarting it")
            await asyncio.to_thread(server.stop)
