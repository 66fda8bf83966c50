"""`seamark gateway --processes N`: one port, N processes, each with a health port; none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from engine import topology
from engine.jetstream import NatsSettings, connect
from seamark.dev.child import free_port
from seamark.dev.servers import NatsServer

ROOT = Path(__file__).parents[2]


class Gateway:
    def __init__(self, nats: NatsServer, folder: Path) -> None:
        self.port, self.health = free_port(), free_port()
        self.log = folder / "gateway.log"
        env = {key: value for key, value in os.environ.items() if not key.startswith("SEAMARK_")} | {
            "PYTHONPATH": str(ROOT),
            "SEAMARK_PROFILE": "dev",
            "SEAMARK_NATS_URL": nats.url,
            "SEAMARK_JWT_SECRET": "a secret for tests that is long enough for HS256",
            "SEAMARK_GATEWAY_PORT": str(self.port),
            "SEAMARK_HEALTH_PORT": str(self.health),
        }
        argv = [sys.executable, "-m", "seamark", "gateway", "--processes", "2"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, cwd=folder, env=env, stdout=log, stderr=log)

    def ready(self) -> bool:
        return all(ok(f"http://127.0.0.1:{port}/readyz") for port in (self.health, self.health + 1))

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def eventually(self, look: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not look():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


def ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
async def gateway(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Gateway]:
    broker = await connect(NatsSettings(nats_server.url))
    await topology.ensure(broker, "dev", None)
    await broker.close()
    gateway = Gateway(nats_server, tmp_path)
    try:
        gateway.eventually(gateway.ready)
        yield gateway
    finally:
        gateway.process.kill()
        gateway.process.wait()


def test_all_processes_serve_one_port_and_a_signal_ends_them_all(gateway: Gateway) -> None:
    assert len(gateway.children()) == 2
    assert ok(f"http://127.0.0.1:{gateway.port}/readyz")
    family = gateway.children()
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(30) == 0
    assert psutil.wait_procs(family, timeout=0)[1] == []


def test_a_process_that_dies_is_replaced_and_that_is_said(gateway: Gateway) -> None:
    victim = gateway.children()[0]
    victim.kill()
    gateway.eventually(lambda: "gateway_process_ended" in gateway.log.read_text())
    gateway.eventually(lambda: len(gateway.children()) == 2 and gateway.ready())
    assert victim.pid not in {child.pid for child in gateway.children()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals children of a dead parent")
def test_no_process_outlives_its_parent(gateway: Gateway) -> None:
    family = gateway.children()
    gateway.process.kill()
    gateway.process.wait()
    assert psutil.wait_procs(family, timeout=30)[1] == []
