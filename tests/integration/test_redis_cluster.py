"""Scripts touch one slot each, so that a Redis Cluster takes them: on a node that owns no other slot, they do all they do."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from engine.dispatch import claims
from engine.dispatch.claims import Claim, Claims, claim_key
from engine.partition.reader import Delivered
from ops.dev.child import free_port
from ops.dev.servers import Valkey
from projections.folds.unread import Unread
from projections.store import Checkpoint
from projections.unread import store as unread_store
from projections.unread.reader import UnreadReader
from projections.unread.store import VERSION_KEY, UnreadStore, drop_version, meta_key
from tests.support.logs import eventually

EPOCH = "abcdefgh"
USER = "default.alice"
START = 1_800_000_000


class ClusterNode(Valkey):
    """A node of a cluster that is alone in it, and owns no slot yet."""

    def command(self) -> list[str]:
        options = {"cluster-enabled": "yes", "cluster-require-full-coverage": "no", "cluster-port": str(free_port())}
        return [*super().command(), *(word for name, value in options.items() for word in (f"--{name}", value))]


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Redis]:
    monkeypatch.setattr(unread_store, "REDIS_SECONDS", 20.0)
    monkeypatch.setattr(claims, "TAKE_TIMEOUT_SECONDS", 20.0)
    server = ClusterNode(tmp_path / "node")
    try:
        server.start()
        async with Redis.from_url(server.url) as redis:
            yield redis
    finally:
        server.kill()


async def own(node: Redis, *keys: str) -> None:
    """Give the node the slots of these keys, and no others."""
    slots = {await node.execute_command("CLUSTER KEYSLOT", key) for key in keys}
    await node.execute_command("CLUSTER ADDSLOTS", *slots)

    async def up() -> bool:
        return (await node.execute_command("CLUSTER INFO"))["cluster_state"] == "ok"

    await eventually(up)


def log(*bodies: dict[str, Any]) -> list[Delivered]:
    return [
        Delivered(f"log.0.{USER}".encode(), seq, (START + seq) * 1_000_000_000, b"", json.dumps(body).encode())
        for seq, body in enumerate(bodies, 1)
    ]


def notification(id: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "kind": "notification", **more}


async def test_all_scripts_of_the_unread_counts_stay_in_the_slot_of_their_partition(node: Redis) -> None:
    await own(node, meta_key(0, 1), VERSION_KEY)
    with pytest.raises(ResponseError):  # what a script gets that touches another slot
        await node.eval("return redis.call('SET', ARGV[1], 1)", 1, meta_key(0, 1), meta_key(1, 1))
    store, reader = UnreadStore(node, 0, bound=3), UnreadReader(node)
    batch = log(
        notification("plain"),
        notification("mail", category="mail"),
        notification("short", expires_at="2027-01-15T08:01:00Z", category="mail"),
        notification("one", collapse_key="k"),
        notification("two", collapse_key="k", category="chat"),
        notification("more"),
        {"id": "r", "kind": "read", "ids": ["mail"]},
        {"id": "s", "kind": "archive", "up_to": 1},
        notification("last"),
    )
    at = Checkpoint(EPOCH, len(batch))
    assert await store.apply(batch, None, at)
    assert await store.checkpoint() == at
    counts = await reader.read(0, [USER], START)
    assert (counts.checkpoint, counts.users) == (at, [Unread(3, {"chat": 1}, more=True)])
    assert await store.attend(at, complete=True, age_seconds=0.0, now=START + 3600) is not None
    await drop_version(node, 0, 1)
    assert await node.keys("*") == []
    await store.close()
    await reader.close()


async def test_all_claims_of_a_tenant_are_taken_in_one_slot(node: Redis) -> None:
    tenant = "acme=2Ecom"
    await own(node, claim_key(tenant, "any"))
    taking = Claims(node)
    batch = [Claim(tenant, id, f"{EPOCH}.{seq}") for seq, id in enumerate(("a", "{b}", "c:d}"), 1)]
    assert await taking.take(batch) == [True, True, True]
    assert await taking.take([Claim(tenant, "a", f"{EPOCH}.9"), *batch]) == [False, True, True, True]
    await taking.close()
