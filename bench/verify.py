"""`verify`: memory and time that the command takes to compare whole projections with their streams, and to rebuild them."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from redis.asyncio import Redis

from bench.load import bare_records, commit_all
from bench.report import progress
from bench.stack import PARTITIONS, TENANT, Stack, stack
from bench.tables import write_receipts
from projections.rebuild.tables import Rebuild
from projections.rebuild.unread import rebuild_unread

CHUNK = 100_000
"""Records in memory at a time while the logs are filled."""


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
        assert bench.postgres is not None
        built: dict[str, Any] = {}
        async with (
            asyncpg.create_pool(bench.postgres.url, min_size=1, max_size=4) as pool,
            Redis.from_url(bench.valkey.url) as redis,
        ):
            for name in ("unread", "inbox", "deliveries"):
                progress(f"folding {name}")
                started = time.perf_counter()
                if name == "unread":
                    done = await rebuild_unread(bench.broker, redis, PARTITIONS)
                else:
                    done = await Rebuild(bench.broker, pool, name, PARTITIONS).run()
                built[name] = {"records": done.records, "seconds": round(time.perf_counter() - started, 1)}
        verified = {name: await _verify(bench, name, restart=restart) for name in built}
    return {"result": {"built": built, "verified": verified}, "restarted": restart}


async def _verify(bench: Stack, name: str, *, restart: bool) -> dict[str, Any]:
    progress(f"verifying {name}")
    assert bench.postgres is not None
    env = {**os.environ, "SEAMARK_NATS_URL": bench.nats.url, "SEAMARK_REDIS_URL": bench.valkey.url,
           "SEAMARK_POSTGRES_URL": bench.postgres.url}  # fmt: skip
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "ops", "verify", name, "--json"], env=env, stdout=subprocess.PIPE)
    working = asyncio.create_task(asyncio.to_thread(_wait, child), name="verify")
    if restart:
        await asyncio.sleep(2.0)
        await asyncio.to_thread(bench.nats.kill)
        await asyncio.sleep(5.0)
        await asyncio.to_thread(bench.nats.start)
    lines, code, rss_bytes, cpu = await working
    seconds = time.perf_counter() - started
    result = msgspec.json.decode(lines[-1]) if lines else {}
    return {
        **result,
        "exit_code": code,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "max_rss_mb": round(rss_bytes / 1e6, 1),
    }


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
