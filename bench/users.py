"""`users`: what a notification costs where there are many users, against the same with few."""

from pathlib import Path
from typing import Any

from bench.dispatch import Emptied, empty
from bench.load import TENANT, bare_records, commit_all
from bench.report import progress
from bench.stack import stack

CHUNK = 20_000


async def run(
    *,
    events: int = 200_000,
    few: int = 10_000,
    many: int = 1_000_000,
    data: Path | None = None,
    sync: str | None = None,
    hurry: bool = False,
) -> dict[str, Any]:
    """Few, many, few again: the machine's own changes show in the two that should be equal."""
    measured = [await _measured(users, events, data=data, sync=sync, hurry=hurry) for users in (few, many, few)]
    totals = [sum(one.cpu_us.values()) for one in measured]
    usual = (totals[0] + totals[2]) / 2
    return {
        "result": {
            "users": many,
            "events_per_second": round(measured[1].per_second),
            "cpu_us_per_notification": round(totals[1], 1),
        },
        "yardstick": {
            "users": few,
            "events_per_second": [round(measured[number].per_second) for number in (0, 2)],
            "cpu_us_per_notification": [round(totals[number], 1) for number in (0, 2)],
        },
        "ratio": round(totals[1] / usual, 2)
        if usual
        else None,  # so short a run that no tick of the clock fell into it
        "cpu_us_per_notification": measured[1].cpu_us,
        "wanted": {"ratio_at_most": 1.2},
    }


async def _measured(users: int, events: int, *, data: Path | None, sync: str | None, hurry: bool) -> Emptied:
    async with stack(data=data, sync_interval=sync, hurry=hurry) as bench:
        progress(f"a log for each of {users} users")
        for first in range(0, users, CHUNK):
            records = bare_records(min(CHUNK, users - first), users, TENANT, first=first)
            for messages in records.values():
                await commit_all(bench.broker, messages)
        return await empty(bench, events, users)
