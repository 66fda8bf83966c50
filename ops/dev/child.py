"""A server as a child process: it dies with its parent, its end is noticed, its port is free when it starts."""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypedDict

READY_SECONDS_MAX = 60.0
"""How long a server may take until it answers. Generous: a loaded machine recovers a big store slowly, and a server that
has really failed is noticed at once by its exit."""

POLL_SECONDS = 0.02
"""Pause between two looks at a server that is not ready yet."""

_PR_SET_PDEATHSIG = 1


class Rights(TypedDict, total=False):
    """Whose rights a process has and where it stands: arguments of `subprocess.Popen`."""

    user: int
    group: int
    extra_groups: list[int]
    cwd: str


OURS: Final = Rights()


class ServerFailed(RuntimeError):
    """A server did not start, did not become ready in time, or ended by itself; the message carries the end of its log."""


def free_port(host: str = "127.0.0.1", *, row: int = 1) -> int:
    """Find a TCP port that nobody listens on and that nobody else has found; the first of `row` such ports in a row.

    Ports are taken below the range the system gives to outgoing connections: a client that reconnects for ever to a port
    inside that range while its server is down may otherwise be given that very port, connect to itself and block the restart.
    """
    for _ in range(64):
        first = _dice.choice(PORTS)
        if all(is_free(port, host) and _claim(port) for port in range(first, first + row)):
            return first
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _claim(port: int) -> bool:
    """Whether it is ours now: no other process here is given it until we end, or have claimed many others since.

    Only Linux has the abstract socket names this needs. Elsewhere other processes do not know of it.
    """
    claim = port
    if _NAMES:
        with socket.socket(socket.AF_UNIX) as name:
            try:
                name.bind(f"\0seamark-port-{port}")  # lives in the network namespace, as ports do, and dies with us
            except OSError:
                return False
            claim = name.detach()
    elif port in _claims:
        return False
    _claims.append(claim)
    if len(_claims) > CLAIMS_MAX:
        oldest = _claims.popleft()
        if _NAMES:
            os.close(oldest)
    return True


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):  # taken, not ours to bind, or no port at all
            return False
    return True


def _first_ephemeral_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32_768
    return max(first, 22_000)


PORTS: Final[Sequence[int]] = range(20_000, _first_ephemeral_port())
"""What `free_port` chooses from."""

CLAIMS_MAX: Final = 256
"""How many ports stay claimed. One is free until somebody listens on it, and while its server is down: without a claim, it
would then be given to somebody else."""

_NAMES = sys.platform.startswith("linux")

_claims: deque[int] = deque()
"""The oldest first: descriptors of their names, or, where there are none, the ports."""

_dice = random.SystemRandom()  # tests seed the common one, each process with the same number


def death_signal_setter(signum: int) -> Callable[[], None] | None:
    """What a child runs before exec so that the kernel signals it when the parent dies (Linux only, else None)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: after it, only the bare call is safe
    parent = os.getpid()

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
        if os.getppid() != parent:  # the parent died between fork and prctl: nobody would ever signal us
            os.kill(os.getpid(), signal.SIGKILL)

    return set_death_signal


class Child:
    """One child process with a log file.

    The kernel ties the child's life to the *thread* that spawned it: spawn from a thread that lives as long as the child
    should, in practice the main one.

    Args:
        name: how messages call it.
        log_path: its stdout and stderr are appended here.
        death_signal: what the child gets when the parent dies, even by SIGKILL.

    Attributes:
        holds: descriptors that the child inherits and keeps open as long as it lives, such as that of a lock.
    """

    def __init__(self, name: str, log_path: Path, *, death_signal: signal.Signals = signal.SIGTERM) -> None:
        self.name = name
        self.log_path = log_path
        self.death_signal = death_signal
        self.holds: tuple[int, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running (or last) incarnation; ServerFailed when it was never spawned."""
        if self._process is None:
            raise ServerFailed(f"{self.name} was never started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process exists now (suspended counts as alive)."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal, None while it runs or before it was spawned."""
        return None if self._process is None else self._process.poll()

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        inherits: Sequence[int] = (),
        rights: Rights = OURS,
    ) -> None:
        """Fork and exec; returns at once, ready or not.

        Args:
            argv: program and arguments.
            env: the whole environment; None: ours.
            inherits: descriptors for this incarnation alone, beside those of `holds`.
            rights: whose rights it has. The kernel signals it when we die, even if it runs as another user.
        """
        if self.alive:
            raise ServerFailed(f"{self.name} is running already (pid {self.pid})")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                pass_fds=(*self.holds, *inherits),
                **rights,
                # Own group: Ctrl-C in a terminal must reach the parent alone, which stops children in its order.
                start_new_session=True,
                preexec_fn=death_signal_setter(self.death_signal),  # noqa: PLW1509 - it makes one system call
            )

    def wait_until(self, ready: Callable[[], bool], timeout_seconds: float = READY_SECONDS_MAX) -> None:
        """Block until `ready()`; ServerFailed when the process ends first or the deadline passes."""
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            if not self.alive:
                raise ServerFailed(f"{self.name} ended with code {self.exit_code} while starting\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} is not ready after {timeout_seconds:.0f} s\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def send(self, signum: signal.Signals) -> None:
        """Send a signal if the process is alive."""
        if self._process is not None and self.alive:
            self._process.send_signal(signum)

    def stop(self, signum: signal.Signals, timeout_seconds: float) -> None:
        """Ask it to end and wait; kill it at the deadline. A suspended process is continued first. Safe to call twice."""
        if self._process is None:
            return
        self.send(signum)
        self.send(signal.SIGCONT)
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL and reap."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()

    def log_tail(self, bytes_max: int = 2_000) -> str:
        """The end of the log, for error messages."""
        try:
            return self.log_path.read_bytes()[-bytes_max:].decode(errors="replace").strip()
        except OSError as error:
            return f"(no log: {error})"
