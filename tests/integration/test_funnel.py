"""The funnel: each step is a part of the one before it, by tenant, type and channel."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from prometheus_client import REGISTRY

from projections.deliveries.table import DeliveriesStore
from projections.funnel import counts as funnel_module
from projections.funnel.cohorts import COHORT, SETTLED, WINDOW, Cohorts, Step
from projections.funnel.counts import funnel, show
from projections.inbox.table import InboxStore
from projections.store import Checkpoint
from tests.support.logs import eventually
from tests.support.tables import EPOCH, START, as_stream

PLAN = {"inapp": {}, "email": {}}


def notification(id: str, seq: int, **more: Any) -> dict[str, Any]:
    event = {"epoch": "e", "seq": seq}
    return {"id": id, "kind": "notification", "type": "order.shipped", "plan": PLAN, "event": event, **more}


async def test_every_notification_counts_once_at_every_step_it_has_reached(pool: asyncpg.Pool) -> None:
    alice, bob = "default.alice", "default.bob"
    log = as_stream(
        [
            (alice, 1, notification("a", 1)),
            (bob, 1, notification("a", 1)),
            (alice, 1, notification("b", 2, plan={"inapp": {}})),
            (alice, 1, {"id": "r", "kind": "read", "ids": ["a"]}),
        ]
    )
    at = datetime.fromtimestamp(START + 5, UTC).isoformat()
    told = {"channel": "inapp", "epoch": EPOCH, "at": at, "device": "phone"}
    mail = {"id": "a", "channel": "email", "at": at}
    receipts = as_stream(
        [
            (alice, 1, {**told, "state": "sent", "after": 0, "up_to": 3}),
            (alice, 1, {**told, "state": "acknowledged", "after": 0, "up_to": 1, "device": "tv"}),
            (bob, 1, {**mail, "state": "delivered"}),
            (alice, 1, {**mail, "state": "failed", "reason": "bounced"}),
        ],
        "rcpt.0.",
    )
    assert await InboxStore(pool, 0).apply(log, None, Checkpoint(EPOCH, 4))
    assert await DeliveriesStore(pool, 0).apply(receipts, None, Checkpoint(EPOCH, 4))
    start = datetime.fromtimestamp(START - 1, UTC)
    steps = await funnel(pool, start, start + timedelta(hours=1))
    assert steps == [
        Step("default", "order.shipped", "email", emitted=1, stored=1, dispatched=2, sent=1, acknowledged=1, read=0),
        Step("default", "order.shipped", "inapp", emitted=2, stored=2, dispatched=3, sent=2, acknowledged=1, read=1),
    ]
    assert await funnel(pool, start, start + timedelta(hours=1), "other") == []
    states = await pool.fetch("SELECT user_id, id, channel, device, state FROM delivery_states ORDER BY 1, 2, 3, 4")
    assert [tuple(row) for row in states] == [
        ("alice", "a", "email", "", "failed"),
        ("alice", "a", "inapp", "phone", "read"),
        ("alice", "a", "inapp", "tv", "read"),
        ("alice", "b", "inapp", "phone", "sent"),
        ("bob", "a", "email", "", "delivered"),
        ("bob", "a", "inapp", None, "queued"),
    ]


async def test_of_all_projectors_one_asks_for_the_funnel_until_it_is_lost(postgres: str, monkeypatch) -> None:
    pools = [await asyncpg.create_pool(postgres, min_size=1, max_size=2) for _ in range(3)]
    asked: list[int] = []
    steps = funnel_module._steps

    async def counted(connection: asyncpg.Connection, *window: Any) -> list[Step]:
        asked.append(connection.get_server_pid())
        return await steps(connection, *window)

    monkeypatch.setattr(funnel_module, "_steps", counted)
    monkeypatch.setattr(funnel_module, "EVERY_SECONDS", 0.02)

    async def folded() -> datetime:
        return datetime.now(UTC)

    exports = [asyncio.create_task(funnel_module.export(pool, folded)) for pool in pools]
    try:
        await eventually(lambda: len(asked) >= WINDOW // COHORT)
        assert len(set(asked)) == 1
        await pools[0].execute("SELECT pg_terminate_backend($1)", asked[0])
        await eventually(lambda: len(set(asked)) >= 2)
    finally:
        for task in exports:
            task.cancel()
        await asyncio.gather(*exports, return_exceptions=True)
        for pool in pools:
            pool.terminate()


def test_each_cohort_is_counted_once_and_an_hour_of_them_is_shown() -> None:
    cohorts, now = Cohorts(), datetime(2027, 1, 1, tzinfo=UTC)
    seen: list[tuple[datetime, datetime]] = []
    for minutes in (0, 1, 5, 7, 11, 12, 300, 301):
        for since, until in cohorts.due(now + timedelta(minutes=minutes)):
            seen.append((since, until))
            cohorts.add(until, [Step("t", "x", "inapp", 1, 1, 2, 1, 1, 0)])
        assert len({since for since, _ in seen}) == len(seen)
        assert seen[-1][1] <= now + timedelta(minutes=minutes) - SETTLED
        hour = WINDOW // COHORT
        assert cohorts.total() == [Step("t", "x", "inapp", hour, hour, 2 * hour, hour, hour, 0)]


def test_what_is_not_folded_yet_is_not_counted_as_never_sent() -> None:
    cohorts, behind = Cohorts(), datetime(2027, 1, 1, tzinfo=UTC)
    for _, until in cohorts.due(behind):
        cohorts.add(until, [])
    assert list(cohorts.due(behind)) == []
    assert len(list(cohorts.due(behind + timedelta(minutes=30)))) == 6


def test_metrics_name_the_largest_tenants_only() -> None:
    show([Step(f"t{n}", "x", "inapp", 1, 1, n, 0, 0, 0) for n in range(1, 31)])
    [family] = [one for one in REGISTRY.collect() if one.name == "seamark_funnel_notifications"]
    found = {s.labels["tenant"]: s.value for s in family.samples if s.labels["stage"] == "dispatched"}
    assert found.keys() == {"other", *(f"t{n}" for n in range(11, 31))}
    assert found["other"] == sum(range(1, 11))
