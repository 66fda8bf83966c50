"""`storm`: all sessions reconnect at once with their cursors, a tenth of them behind; against bare handshakes."""

from pathlib import Path
from typing import Any

import msgspec

from bench.devices import Broken, Devices, Spread, bare_handshakes, devices, settled
from bench.load import Copies
from bench.machine import cpu_seconds
from bench.publisher import Settings
from bench.reads import Reads
from bench.report import per_unit, progress
from bench.stack import Stack, stack

MISSED = 3
BEHIND = 10
"""One device in so many has missed records."""
PAUSE_SECONDS = 2.0


async def run(
    *, sessions: int = 10_000, gateways: int = 2, rounds: int = 3, data: Path | None = None, sync: str | None = None
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync) as bench:
        progress(f"{sessions} bare handshakes with {gateways} processes")
        bare = await _bare(bench, sessions, gateways, rounds)
        await bench.start("dispatcher")
        await bench.start("gateway", gateways)
        async with devices(bench, sessions) as swarm:
            await swarm.connect(cursor="")
            await settled(swarm)
            storms = []
            for number in range(rounds):
                storms.append(await _storm(bench, swarm, sessions, number))
                progress(f"all live after {storms[-1]['seconds']} s")
        await _end_roles(bench)
        bare += await _bare(bench, sessions, gateways, rounds)
    best = min(storms, key=lambda storm: storm["seconds"])
    yardstick = min(one["seconds"] for one in bare)
    return {
        "result": {
            "sessions": sessions,
            "gateways": gateways,
            "seconds": best["seconds"],
            "reads_per_session": best["reads_per_session"],
            "storms": storms,
        },
        "yardstick": {"bare_handshakes_seconds": yardstick, "runs": bare},
        "ratio": round(best["seconds"] / yardstick, 2),
        "cpu_us_per_session": best["cpu_us_per_session"],
        "wanted": {"ratio_at_most": 1.5, "reads_per_session_at_most": 0.3},
    }


async def _bare(bench: Stack, sessions: int, processes: int, rounds: int) -> list[dict[str, Any]]:
    found = []
    async with bare_handshakes(bench.folder, sessions, processes) as bare:
        for _ in range(rounds):
            before = cpu_seconds(server.pid for server in bare.servers)
            facts = await bare.devices.connect()
            spent = cpu_seconds(server.pid for server in bare.servers) - before
            found.append({"seconds": round(facts["seconds"], 3), "server_us_per_session": per_unit(spent, sessions)})
            await bare.devices.drop()
            await settled(bare.devices, PAUSE_SECONDS)
    return found


async def _storm(bench: Stack, swarm: Devices, sessions: int, number: int) -> dict[str, Any]:
    await swarm.drop()
    behind = max(1, sessions // BEHIND)
    missed = behind * MISSED
    await _miss(bench, behind, missed, id_from=number * missed)
    await settled(swarm, PAUSE_SECONDS)
    await swarm.forget()
    reads = Reads(bench.broker)
    await reads.ready()
    roles = ("gateway", "broker")
    cpu = {role: cpu_seconds(bench.pids(role)) for role in roles} | {"devices": cpu_seconds(swarm.worker.pids)}
    connected = await swarm.connect()
    spent = {role: cpu_seconds(bench.pids(role)) - cpu[role] for role in roles}
    spent["devices"] = cpu_seconds(swarm.worker.pids) - cpu["devices"]
    counts = dict(reads.counts)
    reads.close()
    # Records come before `live`, so they have all been seen; each device holds an unbroken chain.
    facts = await swarm.expect(missed, 10)
    if facts["delivered"] != missed:
        raise Broken(f"{facts['delivered']} of {missed} missed records were replayed")
    return {
        "seconds": round(connected["seconds"], 3),
        "hello_to_live": Spread.of(connected, "joins").milliseconds(),
        "reads": counts,
        "reads_per_session": round(sum(counts.values()) / sessions, 3),
        "cpu_us_per_session": {role: per_unit(used, sessions) for role, used in spent.items()},
    }


async def _miss(bench: Stack, behind: int, missed: int, id_from: int) -> None:
    """Records for devices that are away."""
    copies = Copies(bench.broker, "live.*.default.>")
    await copies.ready()
    settings = Settings(url=bench.nats.url, rate=missed, users=behind, seconds=1.0, id_from=id_from)
    publisher = await bench.worker("publisher", msgspec.json.encode(settings).decode())
    await publisher.fact("published", 60)
    await copies.until(missed)
    copies.close()


async def _end_roles(bench: Stack) -> None:
    """The processor belongs to the yardstick alone."""
    for workers in bench.roles.values():
        for worker in workers:
            await worker.stop()
