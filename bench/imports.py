"""`import`: how long `seamark users import` takes, a second time and with a change; what is left of imports that are killed."""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg

from bench.report import progress
from ops.dev.servers import Postgres, Valkey
from ops.migrate import migrate

SECONDS_MAX = 300.0
WANTED_SECONDS = 60.0
PLANS = ("free", "pro")
"""There is a file for each, which differs from the other in this attribute of every user."""

_OF_PLAN = "SELECT count(*) FROM users WHERE tenant = 'default' AND attributes->>'plan' = $1"
_OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


async def run(*, users: int = 100_000, kills: int = 5, data: Path | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="seamark-bench-", dir=data) as name, ExitStack() as servers:
        folder = Path(name)
        postgres, valkey = Postgres(folder / "postgres"), Valkey(folder / "valkey")
        for server in (postgres, valkey):
            servers.callback(server.stop)
            server.start()
        await migrate(postgres.url)
        env = {
            **os.environ,
            "SEAMARK_NATS_URL": "nats://127.0.0.1:1",  # an import asks no broker
            "SEAMARK_POSTGRES_URL": postgres.url,
            "SEAMARK_REDIS_URL": valkey.url,
        }
        for plan in PLANS:
            _write(folder / f"{plan}.csv", users, plan)
        async with asyncpg.create_pool(postgres.url, min_size=1, max_size=1) as pool:
            bare = await _copied(pool, folder / f"{PLANS[0]}.csv")
            found = await _imported(pool, env, folder, users)
            memory_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            for number in range(kills):
                await _killed(pool, env, folder, users, found["changed_seconds"] * (number + 1) / (kills + 1))
    return {
        "result": {**found, "killed": kills, "max_rss_mb": round(memory_kb / 1024)},
        "wanted": {"first_seconds": WANTED_SECONDS},
        "yardstick": {"bare_copy_seconds": round(bare, 3)},
        "ratio": round(found["first_seconds"] / bare, 1),
    }


def _write(path: Path, users: int, plan: str) -> None:
    with path.open("w") as file:
        file.write("id,email,phone,locale,timezone,attributes.plan\n")
        for n in range(users):
            file.write(f"user-{n},user-{n}@example.com,+43664{n:07},de-AT,Europe/Vienna,{plan}\n")


async def _copied(pool: asyncpg.Pool, path: Path) -> float:
    """Seconds that PostgreSQL takes to copy the same file into a table with a key, unchecked."""
    names = ("id", "email", "phone", "locale", "timezone", "plan")
    await pool.execute(f"CREATE TABLE bare ({', '.join(f'{name} text' for name in names)}, PRIMARY KEY (id))")
    began = time.perf_counter()
    await pool.copy_to_table("bare", source=path, format="csv", header=True, timeout=SECONDS_MAX)
    seconds = time.perf_counter() - began
    await pool.execute("DROP TABLE bare")
    return seconds


async def _imported(pool: asyncpg.Pool, env: dict[str, str], folder: Path, users: int) -> dict[str, float]:
    """Seconds of an import, of the same again, and of one that changes everybody."""
    found = {}
    for name, plan, done in (
        ("first", "free", {"made": users, "changed": 0, "unchanged": 0, "deleted": 0}),
        ("again", "free", {"made": 0, "changed": 0, "unchanged": users, "deleted": 0}),
        ("changed", "pro", {"made": 0, "changed": users, "unchanged": 0, "deleted": 0}),
    ):
        progress(f"{name}: {users} users")
        began = time.perf_counter()
        with _command(env, folder / f"{plan}.csv") as process:
            said, why = await asyncio.to_thread(process.communicate, timeout=SECONDS_MAX)
        found[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
        assert process.returncode == 0, why.decode()[-3000:]
        assert json.loads(said) == done, said
        assert await pool.fetchval(_OF_PLAN, plan) == users
    return found


async def _killed(pool: asyncpg.Pool, env: dict[str, str], folder: Path, users: int, seconds: float) -> None:
    """Kill an import of everybody in the midst: it has stored all of them, or none."""
    progress(f"killed after {seconds:.1f} s")
    before = await pool.fetchval(_OF_PLAN, PLANS[0])
    with _command(env, folder / f"{PLANS[1 if before else 0]}.csv") as process:
        await asyncio.sleep(seconds)
        process.kill()
    async with asyncio.timeout(SECONDS_MAX):
        while await pool.fetchval(_OTHERS):  # PostgreSQL has not noticed yet
            await asyncio.sleep(0.05)
    after = [await pool.fetchval(_OF_PLAN, plan) for plan in PLANS]
    assert sorted(after) == [0, users], f"half done: {after}"


def _command(env: dict[str, str], file: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "ops", "users", "import", str(file), "--json"]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
