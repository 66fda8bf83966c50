"""`fanout`: one event to many connected users, against the broker's bare append and republish of as many records."""

import statistics
import time
from pathlib import Path
from typing import Any

from bench.devices import Broken, Spread, devices, settled
from bench.load import broker_limit, fan_out_event
from bench.machine import cpu_seconds
from bench.report import per_unit, progress
from bench.stack import Stack, stack

ROLES = ("broker", "valkey", "dispatcher", "gateway")
DELIVER_SECONDS = 60.0


async def run(
    *,
    users: int = 10_000,
    gateways: int = 1,
    rounds: int = 5,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        await bench.start("dispatcher")
        await bench.start("gateway", gateways)
        async with devices(bench, users) as swarm:
            progress(f"connecting {users} devices")
            await swarm.connect(cursor="")
            await settled(bench)
            measured = []
            for number in range(rounds + 1):
                limit = await broker_limit(bench.broker, users, users, tenant=f"yardstick-{number}")
                await swarm.forget()
                pids = {role: bench.pids(role) for role in ROLES} | {"devices": swarm.worker.pids}
                cpu = {role: cpu_seconds(found) for role, found in pids.items()}
                due = time.time()
                await _publish(bench, f"fanout-{number}", users, due)
                facts = await swarm.expect(users, DELIVER_SECONDS)
                if facts["delivered"] != users:
                    raise Broken(f"{facts['delivered']} of {users} devices got the record")
                spread = Spread.of(facts)
                measured.append(
                    {
                        "first_ms": round((facts["first_at"] - due) * 1e3, 1),
                        "last_ms": round((facts["last_at"] - due) * 1e3, 1),
                        "p50_ms": spread.milliseconds()["p50_ms"],
                        "broker_ms": round(limit.seconds * 1e3, 1),
                        "ratio": round((facts["last_at"] - due) / limit.seconds, 2),
                        "cpu": {role: cpu_seconds(found) - cpu[role] for role, found in pids.items()},
                    }
                )
                progress(f"last device after {measured[-1]['last_ms']} ms, broker alone {measured[-1]['broker_ms']} ms")
                await settled(bench)
    # The first round finds cold caches everywhere: it is shown, and left out of the medians.
    kept = measured[1:]
    median = {name: statistics.median(one[name] for one in kept) for name in ("first_ms", "last_ms", "p50_ms", "ratio")}
    cpu = {role: per_unit(sum(one["cpu"][role] for one in kept), users * len(kept)) for role in kept[0]["cpu"]}
    return {
        "result": {
            "users": users,
            "gateways": gateways,
            **{name: median[name] for name in ("first_ms", "p50_ms", "last_ms")},
            "rounds": [{name: value for name, value in one.items() if name != "cpu"} for one in measured],
        },
        "yardstick": {"broker_append_and_republish_ms": statistics.median(one["broker_ms"] for one in kept)},
        "ratio": median["ratio"],
        "cpu_us_per_notification": cpu,
        "wanted": {"ratio_at_most": 2.5, "first_ms_at_most": 50},
    }


async def _publish(bench: Stack, id: str, users: int, due: float) -> None:
    subject, body = fan_out_event(id, users, due)
    await bench.broker.append(subject, body, msg_id=f"default:{id}")
