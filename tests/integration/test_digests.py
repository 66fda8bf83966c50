"""Digests on real servers: at the end of a window one mail with what is unread, and every notification ends once."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker
from engine.directory.changing import Directory
from engine.directory.suppressions import NewSuppression, put_suppressions
from engine.jobs.digests import digest_id
from engine.plan.profile import OPTED_OUT
from engine.postgres import Pool
from engine.settings import Settings
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from projections.deliveries.members import members_of
from tests.support.digests import append, did, digest_job, key_of, listed, waiting, with_rule
from tests.support.logs import FAST, connected, eventually
from tests.support.sending import (
    EMAIL,
    TENANT,
    USER,
    Simulated,
    add,
    known,
    receipts_of,
    sending,
    settings_of,
    simulated,
)
from tests.support.tables import projecting_tables

TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture
async def providers(tmp_path: Path) -> AsyncIterator[Simulated]:
    async with simulated(tmp_path / "providers") as found:
        yield found


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", 1, overrides=FAST)
        yield connection


@pytest.fixture
async def settings(
    broker: Broker, nats_server: NatsServer, valkey: Valkey, postgres: str, pool: Pool, providers: Simulated
) -> Settings:
    await known(pool, USER, "bob", endpoint=False)
    await with_rule(pool)
    return settings_of(nats_server.url, valkey.url, postgres, providers.file)


async def nothing_waits(broker: Broker) -> bool:
    """The mark of the planner is all that is in JOBS."""
    return (await broker.stream("JOBS")).messages == 1


async def ends(broker: Broker, *ids: str) -> dict[str, tuple[str, str | None]]:
    found = {id: (await receipts_of(broker, id))[-1] for id in ids}
    return {id: (one.state, one.reason) for id, one in found.items()}


async def test_what_is_unread_at_the_end_of_a_window_goes_in_one_mail_and_each_of_the_others_ends_with_its_reason(
    broker: Broker,
    settings: Settings,
    pool: Pool,
    providers: Simulated,
    nats_server: NatsServer,
    valkey: Valkey,
    postgres: str,
) -> None:
    key, other = key_of(), key_of(datetime.now(UTC).replace(microsecond=0) + timedelta(days=1))
    ids = [f"n{number}" for number in range(8)]
    await waiting(broker, USER, ids[:7], key)
    await waiting(broker, USER, ids[7:], key, trace=TRACE)
    await waiting(broker, USER, ["tomorrow"], other)
    await waiting(broker, USER, ["over"], key, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    await append(
        broker, USER, "log", did(USER, "read", ids[:2]), did(USER, "archive", ids[2:3]), did(USER, "recall", ids[3:4])
    )
    async with projecting_tables(nats_server.url, valkey.url, postgres, 1), sending(settings, pool, ["email"]):
        await add(broker, digest_job(USER, key))
        await eventually(lambda: nothing_waits(broker))
        [mail] = providers.accepted("email")
        assert mail.to == EMAIL
        assert mail.shown["subject"] == "4 new notifications"
        assert listed(mail) == ["n7", "n6", "n5", "n4"]
        assert await ends(broker, *ids, "over") == {
            "n0": ("suppressed", "all_read"),
            "n1": ("suppressed", "all_read"),
            "n2": ("suppressed", "all_read"),
            "n3": ("cancelled", "recalled"),
            "over": ("expired", "expired"),
            **dict.fromkeys(ids[4:], ("sent", "250")),
        }
        assert await receipts_of(broker, "tomorrow") == []
        assert {one.trace for id in ids for one in await receipts_of(broker, id) if id != "n7"} == {None}
        told = await receipts_of(broker, "n7")
        assert {one.trace for one in told} == {TRACE}
        # Who has the name that a provider gave to the mail finds its members, without the claim.
        name = {"attempt": 1, "provider": "relay", "provider_id": told[-1].provider_id or ""}
        await eventually(lambda: members_of(pool, TENANT, USER, "email", digest_id(key), **name))
        found = await members_of(pool, TENANT, USER, "email", digest_id(key, 2), **name)
        assert found == dict.fromkeys(ids[4:7], "") | {"n7": TRACE}
        assert await members_of(pool, TENANT, USER, "email", digest_id(key), **name | {"provider_id": "other"}) == {}
        # Somebody else had this message, too; and one record of the window was planned only now.
        await add(broker, digest_job(USER, key))
        await eventually(lambda: nothing_waits(broker))
        assert len(providers.accepted("email")) == 1, "nothing is left, so nothing is sent"
        await waiting(broker, USER, ["late"], key)
        await add(broker, digest_job(USER, key))
        await eventually(lambda: len(providers.accepted("email")) == 2 or None)
        await eventually(lambda: nothing_waits(broker))
        assert listed(providers.accepted("email")[1]) == ["late"]
        assert providers.accepted("email")[1].key != mail.key
        # Where all is read, there is no mail.
        await waiting(broker, "bob", ["b1", "b2"], key)
        await append(broker, "bob", "log", did("bob", "read", ["b1", "b2"]))
        await add(broker, digest_job("bob", key))
        await eventually(lambda: nothing_waits(broker))
        assert len(providers.accepted("email")) == 2
        assert await ends(broker, "b1", "b2") == dict.fromkeys(("b1", "b2"), ("suppressed", "all_read"))
        # Who has unsubscribed meanwhile gets none, whatever waits for him.
        await waiting(broker, "bob", ["b3"], key)
        await waiting(broker, USER, ["n9"], key)
        async with Directory(pool).changing(TENANT, ["bob"]) as change:
            new = NewSuppression(channel="email", address="bob@example.com", reason=OPTED_OUT)
            await put_suppressions(change.connection, TENANT, [new])
            change.touch("bob")
        await add(broker, digest_job("bob", key), digest_job(USER, key))
        await eventually(lambda: len(providers.accepted("email")) == 3 or None)
        await eventually(lambda: nothing_waits(broker))
        assert providers.accepted("email")[2].to == EMAIL
        ended = await ends(broker, "b3", "n9")
        assert ended["n9"] == ("sent", "250")
        # The store of claims is some seconds old, so what it may have forgotten ends in doubt.
        assert ended["b3"] in {("suppressed", "opted_out"), ("ambiguous", "forgotten")}


async def test_a_digest_of_pushes_has_the_same_members_on_each_device(
    broker: Broker,
    settings: Settings,
    pool: Pool,
    providers: Simulated,
    nats_server: NatsServer,
    valkey: Valkey,
    postgres: str,
) -> None:
    key = key_of()
    await waiting(broker, USER, ["n1", "n2"], key, "push")
    async with projecting_tables(nats_server.url, valkey.url, postgres, 1), sending(settings, pool, ["push"]):
        await add(broker, digest_job(USER, key, "push"))
        await eventually(lambda: len(providers.accepted("push")) == 1 or None)
        await eventually(lambda: nothing_waits(broker))
    [push] = providers.accepted("push")
    assert "2 new notifications" in str(push.shown)
    for id in ("n1", "n2"):
        found = [(one.device, one.state) for one in await receipts_of(broker, id)]
        # In between it may be said to be in doubt: the job is a moment older than the store of claims.
        assert [found[0], found[-1]] == [("", "split"), ("phone", "sent")]
