"""`verify`: memory and time that the commands take to rebuild whole projections from their streams, and to compare them."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.load import TENANT, bare_records, commit_all
from bench.report import progress
from bench.stack import Stack, stack
from bench.tables import write_receipts
from projections.projection import DELIVERIES, INBOX, UNREAD

CHUNK = 100_000
"""Records in memory at a time while the logs are filled."""

PROJECTIONS = tuple(projection.name for projection in (UNREAD, INBOX, DELIVERIES))

MIDST_SECONDS = 20.0
"""How long after its start a command is in the midst of millions of records."""


async def run(
    *,
    records: int = 5_000_000,
    users: int = 20_000,
    restart: bool = False,
    data: Path | None = None,
    sync: str | None = None,
) -> dict[str, Any]:
    async with stack(data=data, sync_interval=sync) as bench:
        for first in range(0, records, CHUNK):
            progress(f"writing records from {first} of {records}")
            batches = bare_records(min(CHUNK, records - first), users, TENANT, first=first)
            await asyncio.gather(*(commit_all(bench.broker, messages) for messages in batches.values()))
        await write_receipts(bench.broker, users, records // 10)
        await bench.start_postgres()
        pause_seconds = (MIDST_SECONDS if records >= 1_000_000 else 2.0) if restart else None
        built = {name: await _command(bench, "rebuild", name, pause_seconds) for name in PROJECTIONS}
        verified = {name: await _command(bench, "verify", name, pause_seconds) for name in PROJECTIONS}
    return {"result": {"built": built, "verified": verified}}


async def _command(bench: Stack, command: str, name: str, restart_after_seconds: float | None) -> dict[str, Any]:
    """What `seamark <command> <name> --json` says, and what it took; the broker is killed so long after its start, if at all."""
    progress(f"seamark {command} {name}")
    assert bench.postgres is not None
    env = {**os.environ, "SEAMARK_NATS_URL": bench.nats.url, "SEAMARK_REDIS_URL": bench.valkey.url,
           "SEAMARK_POSTGRES_URL": bench.postgres.url}  # fmt: skip
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "ops", command, name, "--json"], env=env, stdout=subprocess.PIPE)
    working = asyncio.create_task(asyncio.to_thread(_wait, child), name=command)
    in_the_midst = False
    if restart_after_seconds is not None:
        await asyncio.wait((working,), timeout=restart_after_seconds)
        in_the_midst = not working.done()
        await asyncio.to_thread(bench.nats.kill)
        await asyncio.sleep(5.0)
        await asyncio.to_thread(bench.nats.start)
    lines, code, rss_bytes, cpu = await working
    seconds = time.perf_counter() - started
    took = {
        "restarted_in_the_midst": in_the_midst,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "max_rss_mb": round(rss_bytes / 1e6, 1),
    }
    progress(f"seamark {command} {name} took {took}")
    return (msgspec.json.decode(lines[-1]) if lines else {}) | took


def _wait(child: subprocess.Popen[bytes]) -> tuple[list[bytes], int, int, float]:
    """The lines it printed, its exit code, its peak memory in bytes, and its processor time in seconds."""
    assert child.stdout is not None
    peak_bytes, over = 0, threading.Event()

    def watch() -> None:
        # After its end the system would report the memory that its parent had at the fork, if that was more.
        nonlocal peak_bytes
        while not over.wait(0.2):
            status = Path(f"/proc/{child.pid}/status").read_text()
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
            peak_bytes = max([peak_bytes, *(kilobytes * 1024 for kilobytes in found)])

    watching = threading.Thread(target=watch, name="watch memory")
    watching.start()
    lines = child.stdout.read().splitlines()
    over.set()
    watching.join()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return lines, child.returncode, peak_bytes, usage.ru_utime + usage.ru_stime
