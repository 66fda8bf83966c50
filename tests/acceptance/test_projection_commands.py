"""`seamark prove`, `funnel`, `verify` and `rebuild`, as an operator types them."""

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from engine.topology import server as topology
from ops.exitcode import MISCONFIGURED
from tests.support.commands import seamark
from tests.support.logs import FAST, connected, dispatching, eventually, publish
from tests.support.tables import projecting_tables


async def command(*words: str, env: dict[str, str]) -> tuple[int, list[Any], str]:
    """Exit code, what it printed as JSON, what it said on standard error."""
    done = await asyncio.to_thread(seamark, *words, "--json", timeout_seconds=90, **env)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.timeout(480)
async def test_an_operator_proves_counts_verifies_and_rebuilds(nats_server, valkey, postgres: str) -> None:
    env = {
        "SEAMARK_NATS_URL": nats_server.url,
        "SEAMARK_REDIS_URL": valkey.url,
        "SEAMARK_POSTGRES_URL": postgres,
    }
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", 4, overrides=FAST)
        pool = await asyncpg.create_pool(postgres, min_size=1, max_size=1)
        async with (
            dispatching(nats_server.url, valkey.url),
            projecting_tables(nats_server.url, valkey.url, postgres),
        ):
            for number in range(5):
                await publish(broker, to=["alice", "bob"], type="demo.hello", id=f"e{number}")
            await eventually(lambda: pool.fetchval("SELECT count(*) = 10 FROM inbox"))

            code, proofs, _ = await command("prove", "e1", "--user", "alice", env=env)
            assert code == 0
            stored = next(fact for fact in proofs[0]["facts"] if fact["fact"] == "stored")
            assert stored["at"], "EVENTS itself says when"
            assert (await command("prove", "unknown", env=env))[0] == 2

            async def counted() -> bool:  # by a projection of its own, which may come later than the inbox
                code, steps, _ = await command("funnel", env=env)
                assert code == 0
                return [(one["emitted"], one["dispatched"], one["sent"]) for one in steps[:1]] == [(5, 10, 0)]

            await eventually(counted, seconds=120)

            for projection in ("unread", "inbox", "deliveries"):
                code, [result], errors = await command("verify", projection, env=env)
                assert (code, result["differences"]) == (0, 0), errors
                code, [done], errors = await command("rebuild", projection, env=env)
                assert (code, done["version"]) == (0, 2), errors
            code, [done], _ = await command("rebuild", "inbox", "--tenant", "default", env=env)
            assert (code, done["records"]) == (0, 10)
            await pool.execute("UPDATE inbox SET category = 'wrong' WHERE id = 'e1' AND user_id = 'bob'")
            code, printed, _ = await command("verify", "inbox", env=env)
            assert (code, len(printed)) == (2, 2)
            assert printed[0]["difference"]["field"] == "category"
            code, _, errors = await command("rebuild", "unread", "--tenant", "default", env=env)
            assert (code, "leave --tenant out" in errors) == (MISCONFIGURED, True)
        pool.terminate()
