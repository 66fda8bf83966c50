"""Escalation on real servers: what a device has shown is not sent once more, and where nobody can tell, it is sent."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker
from engine.jobs.messages import schedule_of
from engine.plan.rules import Channel
from engine.postgres import Pool
from engine.settings import Settings
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.digests import CATEGORY, TYPE, append, did, planned, records, with_rule
from tests.support.logs import FAST, connected, eventually
from tests.support.sending import USER, Simulated, a_job, known, receipts_of, sending, settings_of, simulated
from tests.support.tables import projecting_tables

AFTER_SECONDS = 2.0


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
    await known(pool, USER, endpoint=False)
    await with_rule(pool, unless_seen_seconds=2)
    return settings_of(nats_server.url, valkey.url, postgres, providers.file)


async def escalating(broker: Broker, channel: Channel, *ids: str) -> datetime:
    """Notifications that are sent by another channel unless they are seen; when that is."""
    due = datetime.now(UTC) + timedelta(seconds=AFTER_SECONDS)
    await append(broker, USER, "log", *records(USER, ids))
    await planned(broker, USER, ids, "unless_seen:2", channel)
    jobs = [
        a_job(
            channel,
            id,
            type=TYPE,
            category=CATEGORY,
            stage="escalation",
            first_at=due,
            data={"title": id},
        )
        for id in ids
    ]
    await broker.commit([schedule_of(job, due) for job in jobs])
    return due


def shown_to(seq: int, epoch: str) -> dict[str, object]:
    """The receipt of a gateway: a device has acknowledged everything up to there."""
    return {
        "user": USER, "channel": "inapp", "state": "acknowledged", "at": datetime.now(UTC).isoformat(), "device": "phone",
        "epoch": epoch, "after": seq - 1, "up_to": seq,
    }  # fmt: skip


async def test_what_was_shown_or_read_is_not_escalated_and_what_was_not_is_pushed_in_time(
    broker: Broker,
    settings: Settings,
    pool: Pool,
    providers: Simulated,
    nats_server: NatsServer,
    valkey: Valkey,
    postgres: str,
) -> None:
    async with projecting_tables(nats_server.url, valkey.url, postgres, 1), sending(settings, pool, ["push"]):
        due = await escalating(broker, "push", "shown", "read", "unseen", "recalled")
        state = await broker.stream("LOG-0")
        first = await broker.leader_next("LOG-0", "log.0.>", 1)
        assert first is not None
        assert state.epoch is not None
        await append(broker, USER, "rcpt", shown_to(first.seq, state.epoch))
        await append(broker, USER, "log", did(USER, "read", ["read"]), did(USER, "recall", ["recalled"]))
        await eventually(lambda: providers.accepted("push"))
        await eventually(lambda: _ended(broker, "shown", "read", "unseen", "recalled"))
    [push] = providers.accepted("push")
    assert push.shown["title"] == "unseen"
    assert push.at >= due
    print(f"pushed {(push.at - due).total_seconds():.3f} s after its time")
    ends = {id: (await receipts_of(broker, id))[-1] for id in ("shown", "read", "unseen", "recalled")}
    assert {id: (one.state, one.reason) for id, one in ends.items()} == {
        "shown": ("suppressed", "seen_in_app"),
        "read": ("suppressed", "seen_in_app"),
        "unseen": ("sent", "200"),
        "recalled": ("cancelled", "recalled"),
    }


async def test_while_nobody_can_tell_what_was_seen_it_is_sent_rather_than_not(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no projector."""
    monkeypatch.setattr("engine.worker.noticed.WAIT_SECONDS", 3.0)
    async with sending(settings, pool, ["push"]):
        due = await escalating(broker, "push", "unknown")
        await eventually(lambda: providers.accepted("push"))
    [push] = providers.accepted("push")
    assert push.at >= due + timedelta(seconds=3), "it was waited for"
    print(f"pushed {(push.at - due).total_seconds():.3f} s after its time, of which 3 s were waited for the tables")


async def _ended(broker: Broker, *ids: str) -> bool:
    """A push ends twice: it is split for the devices, and each of them has an end."""
    return all([any(one.state != "split" for one in await receipts_of(broker, id)) for id in ids])
