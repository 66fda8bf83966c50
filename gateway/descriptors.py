"""Whether this process has file descriptors left. Without one it can accept no connection, and nothing says so.

uvloop silently drops a connection that it cannot accept. So the process itself tries to open a file, once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import sys
from typing import Final

import structlog

from engine.tasks import end
from gateway import metrics
from gateway.limits import SPARE_DESCRIPTORS

_log = structlog.get_logger("seamark.descriptors")

LOOK_SECONDS: Final = 1.0
"""Between two tries: some microseconds each."""

MOST_GIVEN: Final = (65_536, 10_240)
"""Asked for where the system calls more unlimited than it gives: macOS gives 10 240, and 256 to whoever asks for nothing."""


class Descriptors:
    """The file descriptors of this process.

    Attributes:
        exhausted: there was none left at the last look; the process is not ready then.
    """

    def __init__(self) -> None:
        self.exhausted = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="descriptors")

    async def close(self) -> None:
        """Stop looking."""
        await end(self._task)

    def look(self) -> None:
        """Try to open one more file."""
        exhausted = not _one_left()
        if exhausted:
            metrics.gateway_exhausted_looks.inc()
        if exhausted and not self.exhausted:
            _log.error("out_of_file_descriptors", limit=limit(), consequence="new connections are closed unanswered",
                       remedy="raise the limit of open files of this process (LimitNOFILE, ulimit -n)")  # fmt: skip
        elif self.exhausted and not exhausted:
            _log.info("file_descriptors_free_again")
        self.exhausted = exhausted

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)


def _one_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return False
        raise
    return True


def limit() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raise the limit of open files as far as the system allows. For a process that serves nothing but a gateway."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for wanted in (most, *MOST_GIVEN) if most == resource.RLIM_INFINITY else (most,):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            return


def sessions_within_limit(wanted: int) -> int:
    """`wanted`, or fewer sessions where descriptors do not suffice: a 503 is better than a connection closed without a word."""
    possible = max(1, limit() - SPARE_DESCRIPTORS)
    if possible < wanted:
        _log.info("sessions_bounded", by="file descriptors", sessions=possible, limit=limit(), wanted=wanted)
    return min(wanted, possible)
