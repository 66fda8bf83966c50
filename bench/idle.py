"""`idle`: what a session that has nothing to do costs in memory, beside a bare aiohttp WebSocket."""

import asyncio
import time
from pathlib import Path
from typing import Any

from bench.devices import bare_handshakes, devices, settled
from bench.machine import cpu_seconds, rss_bytes
from bench.report import progress
from bench.stack import stack


async def run(
    *,
    sessions: int = 10_000,
    settle_seconds: float = 60.0,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        progress(f"{sessions} bare sockets")
        async with bare_handshakes(bench.folder, sessions, 1) as bare:
            pids = [server.pid for server in bare.servers]
            before = rss_bytes(pids)
            await bare.devices.connect()
            await settled(bench)
            plain = (rss_bytes(pids) - before) / sessions
        progress(f"{sessions} sessions, {settle_seconds:g} s to settle")
        await bench.start("gateway")
        gateway = bench.pids("gateway")
        async with devices(bench, sessions) as swarm:
            before, broker_before = rss_bytes(gateway), rss_bytes(bench.pids("broker"))
            await swarm.connect(cursor="")
            await settled(bench)
            fresh = (rss_bytes(gateway) - before) / sessions
            cpu, started = cpu_seconds(gateway), time.monotonic()
            # Heads of all users are compared every 30 s, and what that leaves counts. Silent clients are pinged every 20 s.
            # 60 s hold as much of both whenever they begin; 35 s hold one ping of some sessions and two of others.
            await asyncio.sleep(settle_seconds)
            busy = (cpu_seconds(gateway) - cpu) / (time.monotonic() - started)
            ours = (rss_bytes(gateway) - before) / sessions
            broker = (rss_bytes(bench.pids("broker")) - broker_before) / sessions
    return {
        "result": {
            "sessions": sessions,
            "bytes_per_session": round(ours),
            "bytes_per_session_at_once": round(fresh),
            "broker_bytes_per_session": round(broker),
            "gateway_cpu_share": round(busy, 4),
        },
        "yardstick": {"bare_bytes_per_socket": round(plain)},
        "ratio": round(ours / plain, 2) if plain > 0 else None,
        "cpu_us_per_session_and_second": round(busy / sessions * 1e6, 2),
        "wanted": {"bytes_per_session_at_most": 20_000},
    }
