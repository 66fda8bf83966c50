"""Roles as real processes that a test may kill, suspend and question."""

import contextlib
import json
import math
import os
import re
import signal
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ops.dev.child import Child, free_port
from tests.support.forks import ROOT, fork
from tests.support.tokens import SECRET

STOP_SECONDS_MAX = 40.0
"""Until a role is killed that does not end: longer than it gives itself (`ops.process`), so that its exit code tells."""

PROBE_SECONDS = 2.0
METRICS_SECONDS = 20.0
"""For an answer. A role that stands still for a moment must not look like one that has no metrics."""


class ForkedChild(Child):
    """A child process whose program is a module of ours, see `tests.support.forks`."""

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **_: Any) -> None:
        assert not self.alive, f"{self.name} is running already (pid {self.pid})"
        with self.log_path.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            files = {"stdin": nothing.fileno(), "stdout": log.fileno(), "stderr": log.fileno()}
            self._process = fork(list(argv), env=env or os.environ, death_signal=self.death_signal, **files)


class RoleProcess(ABC):
    """One role's process, started again under the same name as often as a test likes."""

    def __init__(self, name: str, folder: Path, nats_url: str) -> None:
        self.name = name
        self.nats_url = nats_url
        self._port: int | None = None
        self._log_start = 0
        self._child = ForkedChild(name, folder / f"{name}.log", death_signal=signal.SIGKILL)

    @abstractmethod
    def command(self) -> list[str]:
        """Arguments of `python -m`."""

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """The role's own environment."""

    def spawn(self, *, fail_point: str = "") -> None:
        """Start it and return at once."""
        self._port, log = None, self._child.log_path
        self._log_start = log.stat().st_size if log.exists() else 0
        self._child.spawn(
            self.command(),
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SEAMARK_NATS_URL": self.nats_url,
                "SEAMARK_HEALTH_HOST": "127.0.0.1",
                "SEAMARK_HEALTH_PORT": "0",
                "SEAMARK_LOG_FORMAT": "json",
                "SEAMARK_FAIL_POINT": fail_point,
                **self.settings(),
            },
        )

    def start(self, *, fail_point: str = "") -> None:
        """Start it and wait until it works."""
        self.spawn(fail_point=fail_point)
        self._child.wait_until(lambda: self.ready)

    @property
    def port(self) -> int | None:
        """Of health and metrics; None before it listens. The system has chosen it: nobody can have taken it meanwhile."""
        if self._port is None:
            started = self._said("role_starting", self._log_start)
            self._port = int(started[0]["health_port"]) if started else None
        return self._port

    @property
    def ready(self) -> bool:
        """Whether it says that it can work."""
        return self._get("/readyz") is not None

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.alive

    @property
    def exit_code(self) -> int | None:
        return self._child.exit_code

    @property
    def suspended(self) -> bool:
        """Whether it has been stopped by a signal, and not continued."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            return False
        return state == "T"

    def kill(self) -> None:
        self._child.kill()

    def stop(self) -> None:
        """End it in good order."""
        self._child.stop(signal.SIGTERM, STOP_SECONDS_MAX)

    def suspend(self) -> None:
        self._child.send(signal.SIGSTOP)

    def resume(self) -> None:
        self._child.send(signal.SIGCONT)

    def _get(self, path: str, seconds: float = PROBE_SECONDS) -> str | None:
        if not self.alive or self.port is None:  # another process may have the port of one that has ended
            return None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=seconds) as answer:
                return str(answer.read().decode())
        except OSError:
            return None

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; NaN, which equals nothing, when it does not answer."""
        said = self._get("/metrics", METRICS_SECONDS)
        if said is None:
            return math.nan
        assert f"# TYPE {name} " in said, f"{self.name} has no metric {name}"
        total = 0.0
        for line in said.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
                total += float(found[2])
        return total

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log lines whose event begins with `event`."""
        return self._said(event, 0)

    def _said(self, event: str, start: int) -> list[dict[str, Any]]:
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for line in self._child.log_path.read_bytes()[start:].decode(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if str(entry.get("event", "")).startswith(event):
                        lines.append(entry)
        return lines

    def log_tail(self) -> str:
        return self._child.log_tail(6000)


class DispatcherProcess(RoleProcess):
    """`seamark dispatcher`. `lie` names the safeguard it lacks, see `tests.support.lying_dispatcher`."""

    def __init__(self, name: str, folder: Path, nats_url: str, redis_url: str) -> None:
        super().__init__(name, folder, nats_url)
        self.redis_url = redis_url
        self.lie = ""

    def command(self) -> list[str]:
        return ["tests.support.lying_dispatcher"] if self.lie else ["ops", "dispatcher"]

    def settings(self) -> dict[str, str]:
        return {"SEAMARK_REDIS_URL": self.redis_url, "TEST_LIE": self.lie}


class GatewayRole(RoleProcess):
    """`seamark gateway` with one process, always on the same port."""

    def __init__(self, name: str, folder: Path, nats_url: str) -> None:
        super().__init__(name, folder, nats_url)
        self.gateway_port = free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway_port}"

    def command(self) -> list[str]:
        return ["ops", "gateway", "--processes", "1"]

    def settings(self) -> dict[str, str]:
        return {
            "SEAMARK_GATEWAY_HOST": "127.0.0.1",
            "SEAMARK_GATEWAY_PORT": str(self.gateway_port),
            "SEAMARK_JWT_SECRET": SECRET,
            "SEAMARK_HANDSHAKES_PER_MINUTE": "100000",
        }


@contextlib.contextmanager
def dispatcher_processes(
    folder: Path, nats_url: str, redis_url: str, count: int = 2
) -> Iterator[list[DispatcherProcess]]:
    """Dispatchers, not started, that are killed at the end."""
    processes = [DispatcherProcess(f"dispatcher-{i}", folder, nats_url, redis_url) for i in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


@contextlib.contextmanager
def gateway_role(folder: Path, nats_url: str) -> Iterator[GatewayRole]:
    """A gateway, not started, that is killed at the end."""
    gateway = GatewayRole("gateway", folder, nats_url)
    try:
        yield gateway
    finally:
        gateway.kill()
