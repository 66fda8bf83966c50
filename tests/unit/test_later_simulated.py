"""Events that are put off, by the thousand: schedules replaced and fired twice, owners killed in between, LATER put back."""

from typing import Any

import msgspec
import pytest

from engine.dispatch import later, rounds, worker
from engine.dispatch.burials import Burials
from engine.dispatch.claims import Claim
from engine.dispatch.later import part_of
from engine.dispatch.rounds import Planned
from engine.dispatch.worker import DispatchWorker
from engine.log.writer import Missing
from tests.support.fullsim import FullWorld
from tests.support.latersim import LaterWorld
from tests.support.worlds import no_time_passes, violations

WORLDS = 80
FULL_WORLDS = 15


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three or four messages, so that events are cut inside; and no time passes between attempts."""
    no_time_passes(monkeypatch)
    monkeypatch.setattr(rounds, "BATCH_MESSAGES_MAX", 4)
    monkeypatch.setattr(rounds, "FAN_OUT_MESSAGES_MAX", 3)
    monkeypatch.setattr(rounds, "FAN_OUT_FIRST_MESSAGES_MAX", 2)
    monkeypatch.setattr(later, "BATCH_MESSAGES_MAX", 6)


@pytest.mark.timeout(120)
async def test_whatever_fires_late_or_twice_every_event_that_was_put_off_is_appended_once() -> None:
    assert await violations(LaterWorld, range(WORLDS)) == {}


@pytest.mark.timeout(120)
async def test_where_neither_later_nor_dead_letters_has_room_every_event_is_sent_or_has_a_letter() -> None:
    worlds = [FullWorld(seed) for seed in range(FULL_WORLDS)]
    assert await violations(worlds.__getitem__, range(FULL_WORLDS)) == {}
    assert sum(len(world.buried) for world in worlds) > FULL_WORLDS
    assert sum(world.broker.refused_letters for world in worlds) > FULL_WORLDS


def refuse_no_others(self: Burials, first: int, last: int) -> None:
    """Those of the round that LATER has room for are put off all the same."""
    self.first = first if self.first is None else self.first


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("refuse", refuse_no_others), ("missing", property(lambda self: Missing(self.first, None)))],
    ids=["others-are-put-off", "the-mark-forgets-it"],
)
@pytest.mark.timeout(120)
async def test_every_mistake_about_what_finds_no_room_is_noticed(
    name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Burials, name, mistake)
    for seed in range(8 * FULL_WORLDS):
        if await violations(FullWorld, range(seed, seed + 1)):
            return
    pytest.fail("no world noticed")


async def test_the_simulated_worlds_are_wild_enough() -> None:
    worlds = [LaterWorld(seed) for seed in range(20)]
    for world in worlds:
        await world.run()
    assert sum(world.refused for world in worlds) > 50
    assert sum(world.restores for world in worlds) > 5
    assert sum(world.broker.later.fired for world in worlds) > 200


claim = DispatchWorker._claim


def of_nobody_before(self: DispatchWorker, event: Planned) -> Claim:
    return msgspec.structs.replace(claim(self, event), instead_of=())


def of_the_event_as_it_was(self: DispatchWorker, event: Planned) -> Claim:
    """The claim does not pass to the wake-up."""
    found = claim(self, event)
    return msgspec.structs.replace(found, position=event.claimed[0], instead_of=()) if event.claimed else found


async def everything(broker: Any, wake_up: Any) -> int:
    return 0


page = later._page


async def without_end(broker: Any, subject: str, seq: int, end: int) -> Any:
    return await page(broker, subject, seq, 1 << 40)


async def of_any_replica(broker: Any, subject: str, seq: int, end: int) -> Any:
    found = (await broker.next_by_subject("LATER", subject, seq)).records
    return [stored for stored in found if stored.seq < end]


@pytest.mark.parametrize(
    ("target", "name", "mistake"),
    [
        (DispatchWorker, "_claim", of_nobody_before),
        (DispatchWorker, "_claim", of_the_event_as_it_was),
        (later, "_woken_before", everything),
        (later, "_page", without_end),
        (later, "_page", of_any_replica),
        (worker, "with_schedules", lambda messages: list(messages)[:1] + later.with_schedules(list(messages)[1:])),
        (rounds, "part_of", lambda tenth, seq=0: part_of(tenth)),
        (worker, "not_covered", lambda entries, mark: list(entries)),
    ],
    ids=[
        "claims-do-not-know-the-event",
        "claims-stay-where-they-were",
        "wake-ups-forget-those-before",
        "what-comes-later-is-due",
        "a-replica-is-believed",
        "events-without-a-schedule",
        "events-of-a-slot-look-alike",
        "no-skip",
    ],
)
@pytest.mark.timeout(120)
async def test_every_mistake_in_the_protocol_is_noticed(
    target: Any, name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, mistake)
    for seed in range(WORLDS):
        if await violations(LaterWorld, range(seed, seed + 1)):
            return
    pytest.fail("no world noticed")
