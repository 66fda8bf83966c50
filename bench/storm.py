"""`storm`: all sessions reconnect at once with their cursors, a tenth of them behind; against bare handshakes."""

import statistics
from pathlib import Path
from typing import Any

import msgspec

from bench.devices import Bare, Broken, Devices, Spread, bare_handshakes, devices, settled
from bench.load import Copies
from bench.machine import cpu_seconds
from bench.publisher import Settings
from bench.reads import Reads
from bench.report import per_unit, progress
from bench.stack import Stack, stack

MISSED = 3
BEHIND = 10
"""One device in so many has missed records."""


async def run(
    *,
    sessions: int = 10_000,
    gateways: int = 2,
    rounds: int = 3,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        await bench.start("dispatcher")
        await bench.start("gateway", gateways)
        async with devices(bench, sessions) as swarm, bare_handshakes(bench.folder, sessions, gateways) as bare:
            progress(f"connecting {sessions} devices")
            await swarm.connect(cursor="")
            await swarm.drop()
            await settled(bench)
            # In turn, so that both see the same minutes of this machine; the first pair warms up.
            plain, storms = [], []
            for number in range(rounds + 1):
                plain.append(await _bare(bench, bare, sessions))
                storms.append(await _storm(bench, swarm, sessions, number))
                progress(f"all live after {storms[-1]['seconds']} s, bare {plain[-1]['seconds']} s")
    kept = storms[1:]
    ratios = [storm["seconds"] / one["seconds"] for storm, one in zip(kept, plain[1:], strict=True)]
    median = sorted(kept, key=lambda storm: storm["seconds"])[len(kept) // 2]
    return {
        "result": {
            "sessions": sessions,
            "gateways": gateways,
            "seconds": median["seconds"],
            "reads_per_session": median["reads_per_session"],
            "storms": storms,
        },
        "yardstick": {"bare_handshakes_seconds": statistics.median(one["seconds"] for one in plain[1:]), "runs": plain},
        "ratio": round(statistics.median(ratios), 2),
        "cpu_us_per_session": median["cpu_us_per_session"],
        "wanted": {"ratio_at_most": 1.5, "reads_per_session_at_most": 0.3},
    }


async def _bare(bench: Stack, bare: Bare, sessions: int) -> dict[str, Any]:
    pids = [server.pid for server in bare.servers]
    before = cpu_seconds(pids)
    facts = await bare.devices.connect()
    spent = cpu_seconds(pids) - before
    await bare.devices.drop()
    await settled(bench)
    return {"seconds": round(facts["seconds"], 3), "server_us_per_session": per_unit(spent, sessions)}


async def _storm(bench: Stack, swarm: Devices, sessions: int, number: int) -> dict[str, Any]:
    behind = max(1, sessions // BEHIND)
    missed = behind * MISSED
    await _miss(bench, behind, missed, id_from=number * missed)
    await settled(bench)
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
    await swarm.drop()
    await settled(bench)
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
