"""What the embedded servers have in common: a folder, a port for life, readiness that is observed, an orderly end."""

import os
import signal
from abc import ABC, abstractmethod
from pathlib import Path

from ops.dev.child import READY_SECONDS_MAX, Child, free_port

HOST = "127.0.0.1"
PROBE_SECONDS = 1.0
"""Deadline of one readiness probe."""
STOP_SECONDS = 10.0
"""How long a server may take to end by itself before it is killed."""


class Server(ABC):
    """What all servers have in common. `data` is created; `port` is chosen freely when not given and then kept."""

    stop_signal = signal.SIGTERM
    death_signal = signal.SIGTERM
    stop_seconds_max = STOP_SECONDS
    """From the signal to the SIGKILL."""

    def __init__(self, name: str, data: Path, port: int | None) -> None:
        self.name = name
        self.data = data.absolute()
        self.port = port or free_port(HOST)
        self.child = Child(name, self.data / f"{name}.log", death_signal=self.death_signal)

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    @property
    def pid(self) -> int:
        """Process id; ServerFailed before the first start."""
        return self.child.pid

    @property
    def alive(self) -> bool:
        """Whether the process exists (a suspended one does)."""
        return self.child.alive

    @property
    def log_path(self) -> Path:
        """Where the server's own log is appended."""
        return self.child.log_path

    def prepare(self) -> None:
        """Write what the server needs before it starts. Blocks; may run in any thread."""
        self.data.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def command(self) -> list[str]:
        """Program and arguments."""

    def environment(self) -> dict[str, str]:
        """What the server finds in its environment, beside our own."""
        return {}

    @abstractmethod
    def answers(self) -> bool:
        """One look whether the server serves requests now."""

    def spawn(self) -> None:
        """Fork the process and return. It dies with the calling thread."""
        self.child.spawn(self.command(), env={**os.environ, **self.environment()})

    def wait_ready(self, timeout_seconds: float = READY_SECONDS_MAX) -> None:
        """Block until it answers; ServerFailed with the end of its log otherwise."""
        self.child.wait_until(self.answers, timeout_seconds)

    def start(self, timeout_seconds: float = READY_SECONDS_MAX) -> None:
        """Prepare, spawn and wait until it answers."""
        self.prepare()
        self.spawn()
        self.wait_ready(timeout_seconds)

    def stop(self) -> None:
        """End it in good order; killed after `stop_seconds_max`."""
        self.child.stop(self.stop_signal, self.stop_seconds_max)

    def kill(self) -> None:
        """SIGKILL, at once; data and port stay for the next `start`."""
        self.child.kill()

    def suspend(self) -> None:
        """SIGSTOP: connections stay open, nothing answers. Returns once it stands still."""
        self.child.send(signal.SIGSTOP)
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        self.child.send(signal.SIGCONT)

    def restart(self, *, kill: bool = False) -> None:
        """End it (in good order, or by SIGKILL) and start it again on the same port and data."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()


# Streams reserve their max_bytes; by default the server offers three quarters of the free disk, which may be less.
