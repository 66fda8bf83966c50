"""Cancelling and recalling while dispatchers die and freeze, logs take nothing, answers are lost and replicas lag."""

from typing import Any

import pytest

from engine import cancels as cancels_module
from engine.dispatch import rounds
from engine.dispatch.withholding import Withholding
from engine.log.writer import MarkedWriter
from gateway.api import transactions
from tests.support.cancelsim import CancelBroker, CancelWorld, Inbox
from tests.support.virtualtime import run_virtually

WORLDS = 25
CLOCKS = (
    "engine.broker.tail",
    "engine.dispatch.withholding",
    "engine.log.writer",
    "engine.log.stalls",
    "gateway.api.transactions",
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three or four messages, so that events are cut inside."""
    monkeypatch.setattr(rounds, "BATCH_MESSAGES_MAX", 4)
    monkeypatch.setattr(rounds, "FAN_OUT_MESSAGES_MAX", 3)
    monkeypatch.setattr(rounds, "FAN_OUT_FIRST_MESSAGES_MAX", 2)


def faults(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    async def live() -> list[str]:
        return await CancelWorld(seed).run()

    return run_virtually(live(), monkeypatch, *CLOCKS)


@pytest.mark.timeout(120)
def test_nothing_is_written_a_second_after_its_cancel_what_was_is_recalled_and_the_numbers_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {seed: found for seed in range(WORLDS) if (found := faults(seed, monkeypatch))} == {}


async def waits_for_nothing(self: Any) -> None:
    """A view is acted upon however old it is."""


async def passed(self: Any, heads: Any) -> bool:
    return True


async def nothing_there(self: Any, *_: Any, **__: Any) -> None:
    """A replica that shows nothing is believed."""


async def never_looks_again(self: Withholding) -> None:
    if self.until == float("-inf"):
        await self.look()


append = MarkedWriter.append


async def whenever(self: MarkedWriter, *args: Any, until: float = 0.0, **options: Any) -> None:
    await append(self, *args, **options)


@pytest.mark.parametrize(
    "mistakes",
    [
        {(cancels_module.Cancels, "heard"): waits_for_nothing, (Withholding, "look_if_old"): never_looks_again,
         (MarkedWriter, "append"): whenever},
        {(MarkedWriter, "append"): whenever},
        {(transactions, "CANCEL_SETTLE_SECONDS"): 0.0},
        {(Inbox, "has_passed"): passed},
        {(CancelBroker, "leader_next"): nothing_there},
    ],
    ids=[
        "old-views-believed",
        "written-however-late",
        "recalls-too-soon",
        "inbox-not-waited-for",
        "lagging-replica-believed",
    ],
)  # fmt: skip
@pytest.mark.timeout(120)
def test_every_mistake_is_noticed(mistakes: dict[tuple[Any, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for (target, name), mistake in mistakes.items():
        monkeypatch.setattr(target, name, mistake)
    for seed in range(8 * WORLDS):
        if faults(seed, monkeypatch):
            return
    pytest.fail("no world noticed")
