"""Long scenarios on real servers and processes; what they have in common."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos import Chaos
from tests.support.dispatchers import broker, first, only, second

__all__ = ["broker", "first", "only", "second"]


def pytest_configure(config: pytest.Config) -> None:
    """`-m chaos` runs the scenarios alone, `-m "not chaos"` everything else."""
    config.addinivalue_line(
        "markers",
        "chaos(takes_seconds): failure scenarios with a random part; SEAMARK_CHAOS_SECONDS makes them longer",
    )


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    """A scenario with a seed of its own, printed and repeatable by SEAMARK_CHAOS_SEED; its ledger is kept, however it ends."""
    scenario = Chaos()
    yield scenario
    if scenario.ledger.lines:
        scenario.ledger.dump(tmp_path / "ledger.jsonl")


@pytest.fixture
def rng(chaos: Chaos) -> random.Random:
    """What decides by chance in this scenario; its seed is printed, and repeatable by SEAMARK_CHAOS_SEED."""
    return chaos.rng
