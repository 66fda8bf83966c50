"""The sweep: deliveries that are open past their time, and of which JOBS holds nothing, end."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from engine.channels.channel import Outcome
from engine.directory.rules import Rules
from engine.jobs.claims import Done, Waiting
from engine.jobs.messages import decode_job, message_of
from engine.jobs.queue import JobsQueue
from engine.jobs.receipts import part_receipts, receipts_of
from projections.deliveries.sweep import Late, Sweep
from tests.support.letters import World, job, known_to_the_inbox, planned


async def test_the_sweep_ends_what_is_open_past_its_time_and_for_which_jobs_holds_nothing(world: World) -> None:
    now, hour = datetime.now(UTC), timedelta(hours=1)
    names = ("lost", "waits", "held", "later", "young", "d")
    lost, waits, held, later, young, digest = (job(id, user="u1") for id in names)
    for one, when, at in (
        (lost, "now", now - 2 * hour),
        (waits, "now", now - 2 * hour),
        (held, "unless_seen:60", now - 2 * hour),
        (later, f"at:{(now + hour).isoformat()}", now - 2 * hour),
        (young, "now", now),
        (digest, f"digest:orders/{(now - 2 * hour).isoformat()}", now - 3 * hour),
    ):
        await planned(world, one, when, at)
    unreadable = job("unreadable", user="u0")
    await planned(world, unreadable, "now", now - 4 * hour)
    await world.broker.append(message_of(unreadable).subject, b"{")
    queue = JobsQueue(world.broker)
    await queue.add([waits])
    await queue.schedule(held, now + 3 * hour)
    key = f"orders/{(now - 2 * hour).isoformat()}"
    await queue.schedule(job("digest/x", user="u1", stage="digest", digest=key), now + hour)
    retried = job("retried", user="u2")
    waiting = Waiting(2, now - hour, None, Outcome(kind="transient", code="503"))
    await world.journal.store(retried, receipts_of(retried, waiting, now - 2 * hour))
    split = job("split", user="u3", channel="push")
    for receipts in (
        part_receipts(split, ("phone", "tablet"), None, now - 2 * hour),
        receipts_of(split, Done(0, "split"), now - 2 * hour),
    ):
        await world.journal.store(split, receipts)
    await queue.add([job("split", user="u3", channel="push", target="tablet")])
    await world.fold()
    await known_to_the_inbox(world, "lost", user="u1", ago=hour)
    sweep = Sweep(world.pool, world.broker, 1, Rules(world.pool, world.broker))
    working = asyncio.create_task(sweep.sweep())
    while not working.done():  # as a projector does
        await world.fold()
        await asyncio.sleep(0.1)  # between two folds; the loop ends when the sweep does
    assert await working == 3
    await world.fold()
    stored = await world.pool.fetch("SELECT * FROM deliveries")
    rows = {row["id"] + row["device"]: (row["state"], row["reason"], row["attempts"]) for row in stored}
    assert [rows.pop(f"split{one}")[:2] for one in ("", "phone", "tablet")] == [
        ("split", ""), ("failed", "lost"), ("queued", "")
    ]  # fmt: skip
    assert rows.pop("lost") == ("failed", "lost", 0)
    assert rows.pop("retried") == ("ambiguous", "lost", 3), "one of its tries may have been taken"
    assert {state for state, *_ in rows.values()} == {"planned"}
    [found] = await world.letters()
    assert (found.letter.cls, found.letter.id, found.letter.tries) == ("lost", "lost", 1)
    assert decode_job(found.stored.payload).data == {"text": "hi"}
    assert await sweep.sweep() == 0, "what has ended is not lost again"
    assert [await sweep._is_due() for _ in range(2)] == [True, False], "one process of all sweeps, once an hour"


async def test_the_sweep_waits_for_a_projection_that_is_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.deliveries.sweep.FOLDED_SECONDS", 0.2)
    monkeypatch.setattr("projections.deliveries.sweep.PAUSE_SECONDS", 0.1)
    one, long_ago = job("n1"), datetime.now(UTC) - timedelta(hours=2)
    await planned(world, one, "now", long_ago)
    await world.fold()
    await world.journal.store(one, receipts_of(one, Done(0, "sent", "ok", Outcome(kind="ok")), datetime.now(UTC)))
    sweep = Sweep(world.pool, world.broker, 1, Rules(world.pool, world.broker))
    with pytest.raises(Late):
        await sweep.sweep()
    await world.fold()
    assert await sweep.sweep() == 0
    assert await world.states() == [("sent", 1)]
