"""`seamark gateway --processes N`: one port, N processes, each with a health port, and one for all; none outlives its parent."""

import asyncio
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.broker.jetstream import NatsSettings, connect
from engine.topology import server as topology
from ops.dev.child import free_port
from ops.dev.servers import NatsServer
from ops.exitcode import MISCONFIGURED
from tests.support.commands import ENV, started
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(240)


class Gateway:
    def __init__(
        self, nats: NatsServer, folder: Path, processes: int = 2, port: int | None = None, **more: str
    ) -> None:
        self.port, self.health = port or free_port(), free_port(row=3)
        self.log = folder / "gateway.log"
        env = ENV | {
            "SEAMARK_PROFILE": "dev",
            "SEAMARK_NATS_URL": nats.url,
            "SEAMARK_JWT_SECRET": "a secret for tests that is long enough for HS256",
            "SEAMARK_GATEWAY_PORT": str(self.port),
            "SEAMARK_HEALTH_PORT": str(self.health),
            **more,
        }
        env = {name: value for name, value in env.items() if f"{name}_FILE" not in more}
        with self.log.open("wb") as log:
            self.process = started("gateway", "--processes", str(processes), folder=folder, output=log, env=env)

    def ready(self) -> bool:
        return all(ok(f"http://127.0.0.1:{port}/readyz") for port in self.own)

    @property
    def own(self) -> tuple[int, int]:
        """The health ports of the two processes, behind the common one."""
        return self.health + 1, self.health + 2

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def eventually(self, look: Callable[[], bool], seconds: float = 90) -> None:
        def looked() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return look()

        wait_for(looked, seconds=seconds, said=self.log.read_text)


def ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server with a topology, for all gateways."""
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    try:
        server.start()
        asyncio.run(provisioned(server))
        yield server
    finally:
        server.kill()


async def provisioned(server: NatsServer) -> None:
    broker = await connect(NatsSettings(server.url))
    await topology.ensure(broker, "dev", None)
    await broker.close()


@pytest.fixture(scope="module")
def gateways() -> Iterator[list[Gateway]]:
    """Those that were started, the latest last; all are killed at the end."""
    started: list[Gateway] = []
    yield started
    for gateway in started:
        gateway.process.kill()
        gateway.process.wait()


@pytest.fixture
def gateway(nats: NatsServer, gateways: list[Gateway], tmp_path_factory: pytest.TempPathFactory) -> Gateway:
    """With two processes, which work. A test may end it: the next one then gets a new one."""
    if not gateways or gateways[-1].process.poll() is not None:
        gateways.append(Gateway(nats, tmp_path_factory.mktemp("gateway")))
    gateways[-1].eventually(gateways[-1].ready)
    return gateways[-1]


def test_all_processes_serve_one_port_and_a_signal_ends_them_all(gateway: Gateway) -> None:
    assert len(gateway.children()) == 2
    gateway.eventually(lambda: ok(f"http://127.0.0.1:{gateway.port}/readyz"))
    family = gateway.children()
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(60) == 0
    assert psutil.wait_procs(family, timeout=0)[1] == []


def test_a_process_that_dies_is_replaced_and_that_is_said(gateway: Gateway) -> None:
    victim = gateway.children()[0]
    victim.kill()
    gateway.eventually(lambda: "gateway_process_ended" in gateway.log.read_text())
    gateway.eventually(lambda: len(gateway.children()) == 2 and gateway.ready())
    assert victim.pid not in {child.pid for child in gateway.children()}


def refused(port: int) -> float:
    """How many requests have been refused, as a health port says."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return sum(
            one.value for each in families for one in each.samples if one.name == "seamark_gateway_problems_total"
        )


def test_what_the_processes_count_adds_up_on_one_port_and_is_not_lost_with_one_of_them(gateway: Gateway) -> None:
    def both_have_refused() -> bool:
        assert not ok(f"http://127.0.0.1:{gateway.port}/v1/nothing")
        return all(refused(port) for port in gateway.own)

    gateway.eventually(both_have_refused)
    counted = sum(map(refused, gateway.own))
    gateway.eventually(lambda: refused(gateway.health) == counted)
    assert all(ok(f"http://127.0.0.1:{gateway.health}{path}") for path in ("/healthz", "/readyz"))
    victim = gateway.children()[0]
    victim.kill()
    gateway.eventually(lambda: victim.pid not in {child.pid for child in gateway.children()})
    assert refused(gateway.health) == counted
    gateway.eventually(gateway.ready)
    assert sum(map(refused, gateway.own)) < counted
    assert refused(gateway.health) == counted


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals children of a dead parent")
def test_no_process_outlives_its_parent(gateway: Gateway) -> None:
    family = gateway.children()
    gateway.process.kill()
    gateway.process.wait()
    assert psutil.wait_procs(family, timeout=60)[1] == []


def test_a_port_that_is_taken_is_named_and_shared_with_nobody(
    gateway: Gateway, nats: NatsServer, tmp_path: Path
) -> None:
    for processes in (1, 2):
        folder = tmp_path / f"{processes}"
        folder.mkdir()
        second = Gateway(nats, folder, processes, port=gateway.port)
        try:
            assert second.process.wait(60) == MISCONFIGURED
        finally:
            second.process.kill()
            second.process.wait()
        said = second.log.read_text()
        assert "SEAMARK_GATEWAY_PORT" in said
        assert str(gateway.port) in said
        assert "Traceback" not in said
        gateway.eventually(gateway.ready)


def test_a_health_port_without_room_for_all_processes_is_named(nats: NatsServer, tmp_path: Path) -> None:
    gateway = Gateway(nats, tmp_path, SEAMARK_HEALTH_PORT="65535")
    assert gateway.process.wait(60) == MISCONFIGURED
    assert "SEAMARK_HEALTH_PORT: 2 processes take 3 ports in a row" in gateway.log.read_text()


def test_ports_may_be_given_as_files(nats: NatsServer, tmp_path: Path) -> None:
    ports = {"SEAMARK_GATEWAY_PORT": free_port(), "SEAMARK_HEALTH_PORT": free_port(row=3)}
    for name, port in ports.items():
        (tmp_path / name).write_text(f"{port}\n")
    gateway = Gateway(nats, tmp_path, **{f"{name}_FILE": str(tmp_path / name) for name in ports})
    gateway.port, gateway.health = ports.values()
    try:
        gateway.eventually(gateway.ready)
        gateway.eventually(lambda: ok(f"http://127.0.0.1:{gateway.port}/readyz"))
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(60) == 0
    finally:
        gateway.process.kill()
        gateway.process.wait()


def test_a_process_that_cannot_be_replaced_leaves_the_others_serving_and_is_tried_again(
    nats: NatsServer, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret for tests that is long enough for HS256")
    gateway = Gateway(nats, tmp_path, SEAMARK_JWT_SECRET_FILE=str(secret))
    try:
        gateway.eventually(gateway.ready)
        victim, untouched = gateway.children()
        secret.write_text("short")  # somebody is changing it
        victim.kill()
        gateway.eventually(lambda: '"code": 78' in gateway.log.read_text())
        assert untouched.is_running()
        gateway.eventually(lambda: ok(f"http://127.0.0.1:{gateway.port}/readyz"))
        secret.write_text("another secret for tests that is long enough for HS256")
        gateway.eventually(gateway.ready)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(60) == 0
    finally:
        gateway.process.kill()
        gateway.process.wait()


def test_a_process_that_had_to_be_killed_is_seen_in_the_exit_code(gateway: Gateway) -> None:
    gateway.children()[0].suspend()
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(90) == 1  # a process is given half a minute to end
