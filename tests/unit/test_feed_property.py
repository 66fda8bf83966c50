"""The join of history and live, tried in a simulated world: `tests/support/joinsim.py` says what is checked."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.joinlog import Broken
from tests.support.joinmutants import MUTANTS
from tests.support.joinscenarios import (
    ANEW,
    GAPS,
    LOSSLESS,
    PROMPT,
    READING,
    TROUBLE,
    Profile,
    Scenario,
    Step,
    scenario,
)
from tests.support.joinsim import run

SEEDS = 1000
SEEDS_UNTIL_CAUGHT = 6000
"""The mistake found last is found by seed 600; the rest is room for scenarios to change."""

STEPS = st.builds(
    Step, st.sampled_from(GAPS), st.sampled_from(sorted(TROUBLE.kinds)), st.integers(0, 63), st.integers(0, 63)
)
SCENARIOS = st.builds(
    Scenario,
    seed=st.integers(0, 2**16),
    steps=st.lists(STEPS, max_size=40).map(lambda steps: (Step(0.0, "connect"), *steps)),
    devices=st.integers(1, 3),
    history=st.integers(0, 11),
    **{name: st.sampled_from(values) for name, values in TROUBLE.knobs.items()},
)


@given(SCENARIOS)
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
def test_whatever_the_network_does_nothing_is_lost_doubled_reordered_or_skipped_in_silence(world: Scenario):
    run(world)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(TROUBLE, id="trouble of every kind"),
        pytest.param(LOSSLESS, id="no copy lost but in the race of a join: at the head within 5 s"),
        pytest.param(PROMPT, id="no copy lost at all: at the head before any check"),
        pytest.param(READING, id="slow sockets, while the log is trimmed under them"),
        pytest.param(ANEW, id="a log that is made anew while devices join"),
    ],
)
def test_the_same_holds_for_drawn_scenarios_with(profile: Profile):
    for seed in range(SEEDS):
        try:
            run(scenario(seed, profile))
        except Broken as broken:
            pytest.fail(f"seed {seed}: {broken}")


def test_the_scenarios_meet_everything_that_can_happen_to_a_feed():
    met = [run(scenario(seed)) for seed in range(600)]
    for name in met[0].__dataclass_fields__:
        if name != "resets":
            assert sum(getattr(counters, name) for counters in met) > 0, name
    for reason in met[0].resets:
        assert sum(counters.resets[reason] for counters in met) > 0, reason


def test_a_scenario_runs_the_same_twice():
    assert run(scenario(2)) == run(scenario(2))


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_would_be_noticed(mistake: str):
    mutant = MUTANTS[mistake]
    for seed in range(SEEDS_UNTIL_CAUGHT):
        try:
            run(scenario(seed, mutant.profile), mutant.rules)
        except Broken as broken:
            if mutant.complaint in str(broken):
                return
    pytest.fail(f"{mistake}: not noticed in {SEEDS_UNTIL_CAUGHT} scenarios")
