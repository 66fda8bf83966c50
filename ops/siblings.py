"""Processes that do the same work side by side: started, watched, replaced and ended by a parent that does none of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from ops.dev.child import death_signal_setter
from ops.exitcode import FAILED, MISCONFIGURED
from seamark.backoff import Backoff

_log = structlog.get_logger("seamark.siblings")

UP_VARIABLE: Final = "SEAMARK_UP_FD"
"""Names the pipe through which a child says that it is up."""

RESTART_SECONDS_MIN: Final = 1.0
RESTART_SECONDS_MAX: Final = 30.0
"""Pause before a child is started again: doubled each time, and short again once it has been up."""

POLL_SECONDS: Final = 0.2

STOP_SECONDS_MAX: Final = 23.0
"""For all together, from the signal on: a little more than a role itself takes, less than whoever ends this parent gives."""


def say_up() -> None:
    """In a child: tell the parent, if there is one, that this process has begun to serve."""
    descriptor = os.environ.pop(UP_VARIABLE, None)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.write(int(descriptor), b"1")
            os.close(int(descriptor))


def run_siblings(
    role: str,
    argv: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    stop_seconds_max: float | None = None,
) -> int:
    """Keep one process per environment running until SIGTERM or SIGINT; to be called in the main thread.

    A process that ends by itself is replaced, and that is said. One that asks for another configuration (78) before it
    was ever up ends all: it will not be the only one. Later the others go on to serve, and it is tried again.

    Args:
        stop_seconds_max: for all together, from the signal on, where the role takes longer than most; none: `STOP_SECONDS_MAX`.

    Returns:
        78 when it ended for a configuration, else the worst exit code of an end that was asked for.
    """
    stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    siblings = [_Sibling(role, number, argv, env) for number, env in enumerate(environments)]
    while not stopping:
        for sibling in siblings:
            if sibling.look() == MISCONFIGURED and not sibling.ever_up:  # it has said what is wrong
                _end(siblings, stop_seconds_max)
                return MISCONFIGURED
        time.sleep(POLL_SECONDS)
    return _end(siblings, stop_seconds_max)


def environment_with(**given: str) -> dict[str, str]:
    """Ours with these variables in it, for a child."""
    # The same said by a file would stand against them.
    rest = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in given}
    return {**rest, **given}


class _Sibling:
    """One of the processes, and when it is due to be started again."""

    def __init__(self, role: str, number: int, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.ever_up = False
        self._role, self._number = role, number
        self._argv, self._env = argv, env
        self._process: subprocess.Popen[bytes] | None = None
        self._up = -1
        self._due_at = 0.0
        self._restarts = Backoff(RESTART_SECONDS_MIN, RESTART_SECONDS_MAX, jitter=0.0)

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process that runs, as far as is known; None while there is none."""
        return self._process

    def look(self) -> int | None:
        """Start it where that is due. The exit code of a process that has ended since the last look, else None."""
        if self._process is None:
            if time.monotonic() >= self._due_at:
                self._start()
            return None
        code = self._process.poll()
        if code is None:
            return None
        self._process = None
        if self._was_up():
            self.ever_up = True
            self._restarts.succeeded()
        self._wait(code=code)
        return code

    def _start(self) -> None:
        self._up, says = os.pipe()
        os.set_blocking(self._up, False)
        try:
            self._process = subprocess.Popen(
                self._argv,
                env={**self._env, UP_VARIABLE: str(says)},
                pass_fds=(says,),
                preexec_fn=death_signal_setter(signal.SIGTERM),  # noqa: PLW1509 - it makes one system call
            )
        except OSError as error:  # no process to be had now
            os.close(self._up)
            self._wait(why=str(error))
        finally:
            os.close(says)

    def _was_up(self) -> bool:
        """Whether the process that has ended said so, all its life long."""
        try:
            return os.read(self._up, 1) != b""
        except OSError:
            return False
        finally:
            os.close(self._up)

    def _wait(self, **why: object) -> None:
        pause = self._restarts.next_seconds()
        _log.error(f"{self._role}_process_ended", number=self._number, restart_seconds=pause, **why)
        self._due_at = time.monotonic() + pause


def _end(siblings: Sequence[_Sibling], stop_seconds_max: float | None) -> int:
    """End all together; the worst of their exit codes."""
    running = [sibling.process for sibling in siblings if sibling.process is not None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + (STOP_SECONDS_MAX if stop_seconds_max is None else stop_seconds_max)
    return max((_ended(process, deadline) for process in running), default=0)


def _ended(process: subprocess.Popen[bytes], deadline: float) -> int:
    """The exit code of a process that was asked to end."""
    try:
        code = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return FAILED
    if code in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT):  # asked before it could listen to signals
        return 0
    return code if code >= 0 else FAILED
