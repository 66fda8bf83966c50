"""The projector at work under its own account: what `accounts.conf` allows is enough to fold, to tell devices and to rebuild."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from engine.broker.jetstream import Broker, connect
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections.projector import Projector, projections
from projections.rebuild.tables import Rebuild
from projections.rebuild.unread import rebuild_unread
from projections.verify.tables import Verification
from projections.verify.unread import UnreadVerification
from seamark.protocol.records import state_record
from seamark.protocol.subjects import encode_token, log_stream, log_subject, partition_of, receipt_subject
from tests.support.inbox import Inbox
from tests.support.logs import FAST, at_work, eventually
from tests.support.topology import passwords, server_with_accounts, settings_for

PARTITIONS = 4
HOME = partition_of("default", encode_token("alice"), PARTITIONS)


@asynccontextmanager
async def account(server: NatsServer, role: str) -> AsyncIterator[Broker]:
    broker = await connect(settings_for(server.url, role))
    try:
        yield broker
    finally:
        await broker.close()


async def notify(gateway: Broker, id: str) -> int:
    """A record in alice's log, and the receipt of the device that has got it."""
    record = {"id": id, "kind": "notification", "tenant": "default", "user": "alice", "at": "2026-01-31T12:00:00Z",
              "plan": {"inapp": {"when": "now", "why": "default"}}}  # fmt: skip
    ack = await gateway.append(log_subject(HOME, "default", "alice"), json.dumps(record).encode())
    epoch = (await gateway.stream(log_stream(HOME))).epoch
    receipt = {"user": "alice", "channel": "inapp", "device": "phone", "state": "acknowledged", "epoch": epoch,
               "after": ack.seq - 1, "up_to": ack.seq, "at": "2026-01-31T12:00:01Z"}  # fmt: skip
    await gateway.append(receipt_subject(HOME, "default", "alice"), json.dumps(receipt).encode())
    return ack.seq


async def hold(broker: Broker, redis: Redis, pool: asyncpg.Pool, rows: int) -> bool:
    """Do the tables hold so many rows, and every projection what the log says?"""
    works = {
        UnreadVerification(broker, redis, PARTITIONS): 1,
        Verification(broker, pool, "inbox", PARTITIONS): rows,
        Verification(broker, pool, "deliveries", PARTITIONS): rows + 1,  # and where the device stands
    }
    for work, compared in works.items():
        differences = [one async for one in work.differences()]
        if differences or work.result.compared != compared:
            return False
    return True


async def test_a_projector_folds_tells_and_rebuilds_without_a_single_violation(
    tmp_path: Path, valkey: Valkey, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in passwords().items():
        monkeypatch.setenv(name, value)
    server = server_with_accounts(tmp_path / "nats")
    try:
        server.start()
        async with account(server, "provisioner") as provisioner:
            await topology.ensure(provisioner, "dev", PARTITIONS, overrides=FAST)
        async with (
            account(server, "projector") as broker,
            account(server, "gateway") as gateway,
            Redis.from_url(valkey.url, socket_timeout=None) as redis,
            at_work(Projector(broker, projections(redis, pool), PARTITIONS).run(), "projector"),
        ):
            told = Inbox(gateway, f"live.{HOME}.default.alice")
            await told.subscription.confirmed()
            seqs = [await notify(gateway, f"e{number}") for number in range(3)]
            _, read = state_record("read", tenant="default", user="alice", device="phone", ids=["e0"])
            await gateway.append(log_subject(HOME, "default", "alice"), read)
            await eventually(lambda: hold(broker, redis, pool, 3))
            await eventually(lambda: any(b'"op":"unread","count":2' in payload for payload in told.payloads))
            for projection in ("inbox", "deliveries"):
                assert (await Rebuild(broker, pool, projection, PARTITIONS).run()).records >= len(seqs)
            assert (await rebuild_unread(broker, redis, PARTITIONS)).version == 2
            await notify(gateway, "later")
            await eventually(lambda: hold(broker, redis, pool, 4))
        log = server.log_path.read_text()
        assert "iolation" not in log, [line for line in log.splitlines() if "iolation" in line]
    finally:
        server.kill()
