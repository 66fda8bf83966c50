"""Digests whose workers are killed at every step: what is unread goes with one mail, which may come twice, and is said to."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.channels.channel import Members
from engine.jobs.claims import Claim, Done
from engine.postgres import Pool
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections.folds.deliveries import rank
from seamark.protocol.receipts import Receipt, decode_receipt
from tests.failure.test_workers import HastyRole, nothing_waits, sooner
from tests.support.chaos import SECONDS, TIMEOUT, Chaos
from tests.support.digests import append, did, digest_job, key_of, listed, waiting, with_rule
from tests.support.logs import connected, eventually
from tests.support.sending import add, known, settings_of, simulated
from tests.support.tables import projecting_tables

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]

USERS = [f"user{number}" for number in range(167 if SECONDS else 14)]
RECORDS = 60 if SECONDS else 20
"""Of each user, half of which he reads: a mail can name all others."""

POINTS = ("after-lease", "after-send", "after-record", "after-some-receipts", "after-receipts", "before-ack")


def ids_of(user: str) -> list[str]:
    return [f"{user}-{number}" for number in range(RECORDS)]


async def members(redis: Redis) -> list[Members]:
    """The members of every digest that was sent, as claims have them."""
    found = [await redis.get(key) async for key in redis.scan_iter("job:*")]
    claims = [msgspec.json.decode(one.split(b" ", 2)[2], type=Claim) for one in found if one]
    return [one.members for one in claims if isinstance(one, Done) and one.members is not None]


async def read_at(broker: Broker) -> dict[str, datetime]:
    """When the log stored that a notification was read."""
    found: dict[str, datetime] = {}
    for stored in await whole_stream(broker, "LOG-0", "log.0.>"):
        body = msgspec.json.decode(stored.payload)
        if body["kind"] == "read":
            found |= dict.fromkeys(body["ids"], datetime.fromisoformat(stored.time))
    return found


async def last_receipts(broker: Broker) -> tuple[dict[str, Receipt], Counter[str]]:
    """How each notification has ended; how often it was doubted."""
    last: dict[str, Receipt] = {}
    doubts: Counter[str] = Counter()
    for stored in await whole_stream(broker, "RECEIPTS", "rcpt.0.>"):
        one = decode_receipt(stored.payload)
        if one.channel != "email" or one.id is None:
            continue
        doubts[one.id] += one.state == "ambiguous"
        known = last.get(one.id)
        if known is None or rank(one.state, one.attempt) > rank(known.state, known.attempt):
            last[one.id] = one
    return last, doubts


@contextlib.asynccontextmanager
async def reading(broker: Broker, chaos: Chaos) -> AsyncIterator[None]:
    """Users read a quarter of what they have while their digests are made."""

    async def read() -> None:
        for user in chaos.rng.sample(USERS, len(USERS)):
            await append(broker, user, "log", did(user, "read", ids_of(user)[RECORDS // 4 : RECORDS // 2]))
            await asyncio.sleep(10 / len(USERS))  # they read over ten seconds, while digests are made

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(read(), name="reading")
        yield


@pytest.mark.chaos(takes_seconds=25)
async def test_each_unread_notification_goes_with_one_mail_although_workers_are_killed_at_every_step(
    nats_server: NatsServer, valkey: Valkey, pool: Pool, postgres: str, tmp_path: Path, chaos: Chaos
) -> None:
    key = key_of()
    async with connected(nats_server.url) as broker, simulated(tmp_path / "providers") as providers:
        await topology.ensure(broker, "dev", 1, overrides=sooner)
        await known(pool, *USERS, endpoint=False)
        await with_rule(pool)
        settings = settings_of(nats_server.url, valkey.url, postgres, providers.file)
        for user in USERS:
            await waiting(broker, user, ids_of(user), key)
            await append(broker, user, "log", did(user, "read", ids_of(user)[: RECORDS // 4]))
        async with projecting_tables(nats_server.url, valkey.url, postgres, 1), reading(broker, chaos):
            role = HastyRole("worker", "worker", tmp_path, settings)
            try:
                for number, point in enumerate(POINTS):
                    some = USERS[number :: len(POINTS)]
                    await add(broker, *(digest_job(user, key) for user in some))
                    role.spawn(fail_point=point)
                    await eventually(lambda: not role.alive, every_seconds=0.1)
                role.spawn()
                await eventually(lambda: nothing_waits(broker), seconds=TIMEOUT, every_seconds=0.5)
            finally:
                role.kill()
        last, doubts = await last_receipts(broker)
        read = await read_at(broker)
        async with Redis.from_url(valkey.url) as redis:
            made = await members(redis)
    mails: dict[str, list[list[str]]] = {}
    for mail in providers.accepted("email"):
        mails.setdefault(mail.key, []).append(listed(mail))
    for copies in mails.values():
        assert all(copy == copies[0] for copy in copies), "a repetition has the same members"
        assert len(copies) - 1 <= min(doubts[id] for id in copies[0]), "and is recorded"
    sent = Counter(id for copies in mails.values() for id in copies[0])
    unread = {id for user in USERS for id in ids_of(user)} - read.keys()
    assert max(sent.values()) == 1, "no notification is in two mails"
    assert unread <= sent.keys(), "each that was not read is in one"
    assert sorted(sent) == sorted(id for one in made for id in one.ids)
    for one in made:
        early = [id for id in one.ids if read.get(id, datetime.max.replace(tzinfo=UTC)) < one.rendered_at]
        assert early == [], "none that was read before it was rendered"
    assert {id: last[id].state for id in sent} == dict.fromkeys(sent, "sent")
    assert {last[id].reason for id in read.keys() - sent.keys()} == {"all_read"}
    copies = [len(copies) for copies in mails.values()]
    print(
        f"{len(last)} records of {len(USERS)} users: {len(copies)} mails, {sum(copies)} accepted, {len(sent)} members"
    )
