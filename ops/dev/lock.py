"""One stack per data folder: a lock that lasts as long as anything that works on the folder does."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, TextIO

from engine.errors import InvalidSetting

LEAVING_SECONDS_MAX: Final = 30.0
"""How long servers and roles of a stack that was killed may take to end: the kernel tells them, and they end in order."""

POLL_SECONDS: Final = 0.1


@contextlib.asynccontextmanager
async def locked(
    data: Path, say: Callable[[str], None], *, leaving_seconds_max: float = LEAVING_SECONDS_MAX
) -> AsyncIterator[int]:
    """Hold the lock of a folder; yields the descriptor that children inherit, and hold it with.

    A stack that is killed leaves its children for a moment, and for ever where the kernel does not tell them (macOS):
    two servers on one store would destroy it. They are waited for, and named when they stay.

    Raises:
        InvalidSetting: another stack runs on this data, or what is left of one.
    """
    with (data / "lock").open("a+") as file:
        await _take(file, data, say, leaving_seconds_max)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


async def _take(file: TextIO, data: Path, say: Callable[[str], None], leaving_seconds_max: float) -> None:
    deadline, waited = time.monotonic() + leaving_seconds_max, False
    while not _taken(file):
        owner = _owner(file)
        if owner is None or _runs(owner):
            raise InvalidSetting(
                f"a stack already runs on {data} (pid {owner or 'unknown'}): stop it, or name another --folder"
            )
        if time.monotonic() > deadline:
            raise InvalidSetting(
                f"processes of a stack that was killed (pid {owner}) still work on {data}:"
                f" `lsof {data / 'lock'}` names them; end them, or name another --folder"
            )
        if not waited:
            say(f"waiting for what is left of a stack that was killed (pid {owner})")
            waited = True
        await asyncio.sleep(POLL_SECONDS)


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _owner(file: TextIO) -> int | None:
    """The process that took the lock last; None while it has not said so."""
    file.seek(0)
    said = file.read().strip()
    return int(said) if said.isascii() and said.isdigit() else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
