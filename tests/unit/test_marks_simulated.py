"""Take-overs, restores, lost answers, late batches and stale reads by the thousand: every record once, in its events' order."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from engine.dispatch import rounds, worker
from engine.dispatch.claims import Claim
from engine.dispatch.rounds import Planned
from engine.dispatch.withholding import Withholding
from engine.dispatch.worker import DispatchWorker
from engine.log import writer as logwriter
from engine.log.marks import Mark, Verdict
from tests.support.marksim import World
from tests.support.worlds import no_time_passes, violations

WORLDS = 250


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three or four messages, so that events are cut inside; and no time passes between attempts."""
    no_time_passes(monkeypatch)
    monkeypatch.setattr(rounds, "BATCH_MESSAGES_MAX", 4)
    monkeypatch.setattr(rounds, "FAN_OUT_MESSAGES_MAX", 3)
    monkeypatch.setattr(rounds, "FAN_OUT_FIRST_MESSAGES_MAX", 2)


async def test_whatever_is_lost_late_or_stale_every_record_is_appended_once_and_in_order() -> None:
    assert await violations(World, range(WORLDS)) == {}


async def test_the_simulated_worlds_are_wild_enough() -> None:
    refused = []
    for seed in range(20):
        world = World(seed)
        await world.run()
        refused.append(world.refused)
    assert sum(refused) > 100


def blind(self: Mark, seq: int, user_token: str) -> bool:
    return False


def whole_events_only(self: Mark, seq: int, user_token: str) -> bool:
    return seq <= self.seq


async def home_first(self: DispatchWorker, round_: Any) -> None:
    await self._append(self._q, [], round_.end, Withholding(None, []))
    await settle_round(self, round_)


settle_round = DispatchWorker._settle_round


claim = DispatchWorker._claim


def of_no_former_incarnation(self: DispatchWorker, event: Planned) -> Claim:
    return msgspec.structs.replace(claim(self, event), former=())


def believing(verdict: Verdict) -> Callable[..., Verdict]:
    """A settlement that takes everything unclear for the same thing."""
    return lambda sent, expected, found: verdict


def steps_never_down(sent: Mark, expected: Any, found: Any) -> Verdict:
    if found == expected:
        return Verdict.SEND_AGAIN
    return Verdict.COMMITTED if found.mark == sent else Verdict.FOLLOW


@pytest.mark.parametrize(
    ("target", "name", "mistake"),
    [
        (Mark, "covers", blind),
        (Mark, "covers", whole_events_only),
        (DispatchWorker, "_settle_round", home_first),
        (logwriter, "settle", believing(Verdict.COMMITTED)),
        (logwriter, "settle", steps_never_down),
        (worker, "not_covered", lambda entries, mark: list(entries)),
        (DispatchWorker, "_claim", of_no_former_incarnation),
        (Mark, "up_to", lambda self, seq: self),
    ],
    ids=[
        "marks-cover-nothing",
        "users-inside-forgotten",
        "home-first",
        "believes-committed",
        "never-steps-down",
        "no-skip",
        "claims-not-translated",
        "marks-not-cut",
    ],
)
async def test_every_mistake_in_the_protocol_is_noticed(
    target: Any, name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, mistake)
    for start in range(0, WORLDS, 20):
        if await violations(World, range(start, start + 20)):
            return
    pytest.fail("no world noticed")
