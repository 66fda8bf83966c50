"""The stack of one benchmark: its own servers in a folder of its own, the real roles as processes, all ended afterwards."""

import asyncio
import contextlib
import secrets
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bench.load import PARTITIONS
from bench.processes import Worker, running
from engine.broker.jetstream import Broker, NatsSettings, connect
from engine.topology import server as topology
from ops.dev.child import free_port
from ops.dev.servers import Change, NatsServer, Overlay, Postgres, Valkey
from ops.migrate import migrate
from seamark.protocol.subjects import log_stream

READY_SECONDS = 60.0
SETTLE_SECONDS = 2.0
"""After joining: heads are compared once more after 1 s, and that is no work of the load."""
HURRY_SECONDS = 0.1

FORGETFUL = (
    Change("appendonly", "no", "the figures are about the engine's cost, and earlier ones were taken like this"),
)
"""For `Valkey`."""


_OPTIONS = {"gateway": ("--processes", "1"), "pager": ("--not-planned",)}
"""What roles are started with."""


@dataclass
class Stack:
    """What runs. `roles` holds the processes of each role; the broker connection is the benchmark's own."""

    folder: Path
    nats: NatsServer
    valkey: Valkey
    broker: Broker
    gateway_port: int
    secret: str
    settle_seconds: float
    postgres: Postgres | None = None
    roles: dict[str, list[Worker]] = field(default_factory=dict)
    _health: dict[str, list[int]] = field(default_factory=dict)
    _exits: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    def pids(self, role: str) -> list[int]:
        """Processes of a role, or of a server (`broker`, `valkey`, `postgres`)."""
        servers = {"broker": self.nats, "valkey": self.valkey, "postgres": self.postgres}
        if role in servers:
            server = servers[role]
            return [server.pid] if server is not None else []
        return [worker.pid for worker in self.roles.get(role, [])]

    async def start_postgres(self) -> None:
        """PostgreSQL with the schema; roles started afterwards use it."""
        self.postgres = server = Postgres(self.folder / "postgres")
        self._exits.callback(server.stop)
        await asyncio.to_thread(server.start)
        await migrate(server.url)

    async def start(self, role: str, count: int = 1) -> None:
        """Processes of a role, ready to work when this returns."""
        for number in range(count):
            health = free_port()
            env = {
                "SEAMARK_PROFILE": "dev",
                "SEAMARK_NATS_URL": self.nats.url,
                "SEAMARK_REDIS_URL": self.valkey.url,
                "SEAMARK_GATEWAY_PORT": str(self.gateway_port),
                "SEAMARK_GATEWAY_PORT_SHARED": "1",  # by as many processes as are started
                "SEAMARK_HEALTH_PORT": str(health),
                "SEAMARK_JWT_SECRET": self.secret,
            }
            if self.postgres is not None:
                env["SEAMARK_POSTGRES_URL"] = self.postgres.url
            log = self.folder / f"{role}-{number}.log"
            arguments = ["-m", "ops", role, *_OPTIONS.get(role, ())]
            worker = await self._exits.enter_async_context(running(role, arguments, log, env=env, speaks=False))
            await worker.until(lambda port=health: _is_ready(port), READY_SECONDS)
            self.roles.setdefault(role, []).append(worker)
            self._health.setdefault(role, []).append(health)

    @contextlib.asynccontextmanager
    async def role(self, role: str, *arguments: str, **env: str) -> AsyncIterator[list[int]]:
        """One process of a role for as long as the block lasts; its pid. It is ready to work when the block begins."""
        health = free_port()
        settings = {
            "SEAMARK_NATS_URL": self.nats.url,
            "SEAMARK_REDIS_URL": self.valkey.url,
            "SEAMARK_HEALTH_PORT": str(health),
        }
        if self.postgres is not None:
            settings["SEAMARK_POSTGRES_URL"] = self.postgres.url
        log, words = self.folder / f"{role}-{health}.log", ["-m", "ops", role, *arguments]
        async with running(role, words, log, env={**settings, **env}, speaks=False) as process:
            await process.until(lambda: _is_ready(health), READY_SECONDS)
            yield [process.pid]

    async def metric(self, role: str, name: str) -> float:
        """The sum of a metric over all its labels and the role's processes."""
        total = 0.0
        for port in self._health.get(role, ()):
            text = await asyncio.to_thread(_metrics, port)
            for family in text_string_to_metric_families(text):
                total += sum(sample.value for sample in family.samples if sample.name == name)
        return total

    async def worker(self, module: str, *arguments: str) -> Worker:
        """A process of the benchmark itself (`python -m bench.<module>`)."""
        log = self.folder / f"{module}.log"
        return await self._exits.enter_async_context(running(module, ["-m", f"bench.{module}", *arguments], log))

    async def heads(self) -> list[int]:
        """Last sequence of every log."""
        return [(await self.broker.stream(log_stream(p))).last_seq for p in range(PARTITIONS)]


def _is_ready(health_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{health_port}/readyz", timeout=1.0) as answer:
            return answer.status == 200
    except OSError:
        return False


def _metrics(health_port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{health_port}/metrics", timeout=5.0) as answer:
        text: str = answer.read().decode()
        return text


def synced(interval: str) -> Overlay:
    """For `NatsServer`: how often it syncs to the disk. Before every ack it does so as shipped, so nothing changes."""
    if interval == "always":
        return ()
    return (
        Change("jetstream.sync_interval", f'"{interval}"', "measure the processor, not the disk; see bench/README.md"),
    )


@contextlib.asynccontextmanager
async def stack(
    *, data: Path | None = None, sync_interval: str | None = None, hurry: bool = False
) -> AsyncIterator[Stack]:
    """Servers and topology, no role yet.

    Args:
        data: where a folder for this run is made (and removed); the system's folder for temporary files by default.
        sync_interval: "always" for fsync before every ack, as shipped; None for one every two minutes.
        hurry: measure at once, before what went before has settled: only to see that everything runs.
    """
    folder = Path(tempfile.mkdtemp(prefix="seamark-bench-", dir=data))
    nats = NatsServer(folder / "nats", overlay=synced(sync_interval or "2m"))
    valkey = Valkey(folder / "valkey", overlay=FORGETFUL)
    try:
        nats.start()
        valkey.start()
        broker = await connect(NatsSettings(nats.url, name="bench"))
        try:
            await topology.ensure(broker, "dev", PARTITIONS)
            made = Stack(
                folder,
                nats,
                valkey,
                broker,
                free_port(),
                secrets.token_hex(32),
                HURRY_SECONDS if hurry else SETTLE_SECONDS,
            )
            async with made._exits:
                yield made
        finally:
            await broker.close()
    finally:
        nats.stop()
        valkey.stop()
        shutil.rmtree(folder, ignore_errors=True)
