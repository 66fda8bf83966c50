"""Swarms as a benchmark sees them: start, connect, wait for records; latencies and checks in one place."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.processes import Worker, running
from bench.stack import READY_SECONDS, Stack
from bench.swarm import STEP_SECONDS, Settings
from ops.dev.child import free_port

CONNECT_SECONDS_MAX = 180.0


class Broken(RuntimeError):
    """A benchmark found something that is not a matter of speed."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Latencies counted in buckets; seconds."""

    counts: Counter[int]

    @classmethod
    def of(cls, facts: dict[str, Any], kind: str = "latencies") -> "Spread":
        return cls(Counter(dict(facts[kind])))

    def at(self, share: float) -> float | None:
        """The latency that this share of all does not exceed."""
        left = sum(self.counts.values()) * share
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return (bucket + 1) * STEP_SECONDS
        return max(self.counts) * STEP_SECONDS if self.counts else None

    def milliseconds(self) -> dict[str, float | None]:
        shares = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
        return {
            name: None if (found := self.at(share)) is None else round(found * 1e3, 1) for name, share in shares.items()
        }


class Devices:
    """One swarm process."""

    def __init__(self, worker: Worker, count: int) -> None:
        self.worker = worker
        self.count = count

    async def connect(self, *, seconds: float = CONNECT_SECONDS_MAX, **which: Any) -> dict[str, Any]:
        """Connect all that are not connected, with the cursors they hold; returns once all are live."""
        await self.worker.command("connect", seconds=seconds, **which)
        facts = await self.worker.fact("connected", seconds + 10)
        if facts["failures"] or facts["errors"]:
            raise Broken(f"devices could not connect: {facts['failures']} {facts['errors']}")
        return facts

    async def drop(self, **which: Any) -> None:
        """Lose all connections without a word."""
        await self.worker.command("drop", **which)
        await self.worker.fact("dropped", 30)

    async def forget(self) -> None:
        """Begin a measurement."""
        await self.worker.command("forget")
        await self.worker.fact("forgotten", 30)

    async def expect(self, total: int, seconds: float) -> dict[str, Any]:
        """What has come since `forget` once it is so many records, or when the time is over.

        Raises:
            Broken: a chain does not hold.
        """
        await self.worker.command("expect", total=total, seconds=seconds)
        facts = await self.worker.fact("delivered", seconds + 30)
        if facts["chain_breaks"] or facts["errors"]:
            raise Broken(f"{facts['chain_breaks']} frames did not follow on the one before; errors: {facts['errors']}")
        return facts

    async def cursors(self) -> list[str]:
        """Where each device stands."""
        await self.worker.command("cursors")
        found: list[str] = (await self.worker.fact("cursors", 30))["cursors"]
        return found


@contextlib.asynccontextmanager
async def devices(bench: Stack, count: int, *, first: int = 0, acks: bool = True) -> AsyncIterator[Devices]:
    """A swarm for users `first` … of this stack's gateway, not connected yet."""
    settings = Settings(port=bench.gateway_port, first=first, count=count, secret=bench.secret, acks=acks)
    async with _swarm(settings, bench.folder) as made:
        yield made


@contextlib.asynccontextmanager
async def _swarm(settings: Settings, folder: Path) -> AsyncIterator[Devices]:
    arguments = ["-m", "bench.swarm", msgspec.json.encode(settings).decode()]
    async with running("swarm", arguments, folder / f"swarm-{settings.first}.log") as worker:
        await worker.fact("ready", READY_SECONDS)
        yield Devices(worker, settings.count)


@dataclass
class Bare:
    """Bare aiohttp processes and the same devices, which only shake hands."""

    servers: list[Worker]
    devices: Devices


@contextlib.asynccontextmanager
async def bare_handshakes(folder: Path, count: int, processes: int) -> AsyncIterator[Bare]:
    """The yardstick of connections, ready to be used."""
    port = free_port()
    async with contextlib.AsyncExitStack() as exits:
        servers = []
        for number in range(processes):
            log = folder / f"bare-{number}.log"
            server = await exits.enter_async_context(running("bare", ["-m", "bench.bare", str(port)], log))
            await server.fact("ready", READY_SECONDS)
            servers.append(server)
        swarm = await exits.enter_async_context(_swarm(Settings(port=port, first=0, count=count), folder))
        yield Bare(servers, swarm)


async def settled(bench: Stack) -> None:
    """Give what follows a join the time to be over, so that it does not count as work of what comes next."""
    await asyncio.sleep(bench.settle_seconds)
