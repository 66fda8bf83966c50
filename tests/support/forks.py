"""Python processes without the second that each takes to load other people's packages.

A server loads those packages once and forks for every process that a test asks for. What is forked is a process as any other,
with memory, session, descriptors, arguments, environment and end of its own; this project's modules it loads by itself, as
`python -m` has them loaded. Tests start hundreds of roles and commands: loading took a third of the time of all tests.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ops.dev.child import death_signal_setter

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = (
    "aiohttp.web", "alembic.command", "asyncpg", "jinja2", "jwt", "msgspec", "nats.aio.client", "opentelemetry.propagate",
    "prometheus_client", "psutil", "redis.asyncio", "rich.progress", "rich.table", "sqlalchemy.ext.asyncio", "structlog",
    "typer._adapters", "uvloop",
)  # fmt: skip
NUMBER_BYTES: Final = 16
"""Room for a number in digits: the length of a request, a process id, an exit code."""


class Fork:
    """A forked process, with what `subprocess.Popen` says of one."""

    def __init__(self, status: socket.socket) -> None:
        self._status = status
        self.pid = int(status.recv(NUMBER_BYTES))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """How it ended; TimeoutExpired when it runs on."""
        if self.returncode is None:
            waiting = (
                select.poll()
            )  # not `select`: the number of a descriptor may be above 1023 beside a fleet of devices
            waiting.register(self._status, select.POLLIN)
            if not waiting.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._status.recv(NUMBER_BYTES) or -signal.SIGKILL)  # nothing: the server has died
            self._status.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since, and we are not told yet
                os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


_lock = threading.Lock()
_control: socket.socket | None = None


def fork(
    words: list[str],
    *,
    env: Mapping[str, str],
    cwd: Path = ROOT,
    stdin: int,
    stdout: int,
    stderr: int,
    death_signal: int = signal.SIGKILL,
) -> Fork:
    """Run `python -m <words>` in a session of its own; it gets `death_signal` when the process of the tests ends."""
    status, theirs = socket.socketpair()
    request = json.dumps(
        {"words": words, "env": dict(env), "cwd": str(cwd), "death_signal": int(death_signal)}
    ).encode()
    with theirs, _lock:  # one request after the other, whatever thread it comes from
        control = _server()
        socket.send_fds(control, [_number(len(request))], [stdin, stdout, stderr, theirs.fileno()])
        control.sendall(request)
    return Fork(status)


def _number(value: int) -> bytes:
    return b"%*d" % (NUMBER_BYTES, value)


def _server() -> socket.socket:
    """The socket of the server, which is started when it is first needed and ends with this process."""
    global _control
    if _control is None:
        _control, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(argv, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        atexit.register(_end, _control, process)
    return _control


def _end(control: socket.socket, server: subprocess.Popen[bytes]) -> None:
    control.close()
    server.wait()


# --- the server -------------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for every request until nobody can ask any more. In a forked process it returns what that one is to run."""
    waking, woken = socket.socketpair()
    waking.setblocking(False)
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, waking], [], [])
        if waking in ready:
            waking.recv(4096)
            _report_ended(running)
        if control in ready:
            length, descriptors, _, _ = socket.recv_fds(control, NUMBER_BYTES, 4)
            if not length:
                return None
            asked = json.loads(control.recv(int(length), socket.MSG_WAITALL))
            prepare = death_signal_setter(asked["death_signal"])
            pid = os.fork()
            if not pid:
                _become(asked, descriptors)
                if prepare is not None:
                    prepare()
                return asked
            running[pid] = socket.socket(fileno=descriptors[3])
            running[pid].send(_number(pid))
            for descriptor in descriptors[:3]:
                os.close(descriptor)


def _report_ended(running: dict[int, socket.socket]) -> None:
    """Tell of every process that has ended to whoever asked for it."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as told, contextlib.suppress(OSError):  # whoever asked may be gone
            told.send(_number(os.waitstatus_to_exitcode(status)))


def _become(asked: dict[str, Any], descriptors: list[int]) -> None:
    """Make this fork what `exec` would make of it: nothing of the server's is left but loaded packages."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    os.closerange(3, 4096)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = asked["words"]


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    gc.freeze()  # else every fork looks through all packages when it ends, and gets a copy of their memory by that
    if (task := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        runpy.run_module(task["words"][0], run_name="__main__", alter_sys=True)
