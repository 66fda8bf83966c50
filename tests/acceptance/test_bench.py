"""Every benchmark runs, on tiny numbers, and prints the figures it is there for as one JSON object."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ended

SECONDS_MAX = 400

pytestmark = pytest.mark.timeout(SECONDS_MAX + 30)


def run(*arguments: str) -> dict[str, Any]:
    """What one benchmark printed; its own children die with it."""
    done = ended(["bench", *arguments, "--quick"], timeout_seconds=SECONDS_MAX)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def is_told(name: str, figures: dict[str, Any]) -> None:
    """Holds what a benchmark has printed against what every benchmark prints."""
    assert figures["benchmark"] == name
    assert figures["quick"] is True
    assert {"cores", "load_1m", "store"} <= figures["machine"].keys()
    assert figures["result"]
    assert figures["yardstick"]
    assert all(figures["yardstick"].values())
    assert isinstance(figures["ratio"], int | float | None)
    if name not in ("inbox", "import"):  # they ask PostgreSQL only: no notification is on its way
        assert any(key.startswith("cpu_us_per_") for key in figures)


@pytest.mark.parametrize(
    "name",
    [
        "campaign",
        "channels",
        "dispatch",
        "later",
        "users",
        "plan",
        "fanout",
        "storm",
        "idle",
        "resume",
        "inbox",
        "import",
    ],
)
def test_a_benchmark_prints_its_result_beside_the_yardstick_of_the_same_run(name: str) -> None:
    is_told(name, run(name))


def test_rebuilding_is_measured_for_every_projection_beside_a_bare_pull() -> None:
    figures = run("rebuild")
    assert figures["yardstick"]["pulled_records_per_second"] > 0
    assert figures["result"].keys() == figures["ratio"].keys() == {"unread", "inbox", "deliveries"}
    assert all(one["records_per_second"] > 0 and one["cpu_us_per_record"] for one in figures["result"].values())
    assert all(ratio > 0 for ratio in figures["ratio"].values())


def test_sustained_load_says_how_far_projections_were_behind_shows_each_stretch_and_compares_with_another_pipeline(
    tmp_path: Path,
) -> None:
    cpu = {"publisher": 1.0, "broker": 1.0, "dispatcher": 1.0, "gateway": 1.0, "devices": 1.0}
    line = {"rate": 200, "held": True, "cpu_us_per_notification": cpu}
    other = tmp_path / "other.py"
    other.write_text(f"import json\nprint(json.dumps({line!r}))\n")
    figures = run("sustained", "--projections", "--stretch-seconds", "0.1", "--prototype", str(other))
    is_told("sustained", figures)
    compared = figures["prototype"]
    assert compared["before"] == compared["after"] == [line]
    assert compared["held_ratio"] in (0.0, 1.0)  # on a busy machine even this little may come late
    assert compared["cpu_ratios_by_rate"]["200"].keys() == {"dispatcher", "gateway", "broker"}
    [measured] = figures["result"]["runs"]
    assert measured["projections_caught_up_after_seconds"] is not None
    assert measured["lag_max"].keys() == {"dispatcher", "unread", "inbox", "deliveries"}
    assert measured["cpu_us_per_notification"]["projector"] > 0
    stretches = measured["course"]
    assert stretches
    assert sum(one["delivered"] for one in stretches) <= measured["delivered"]
    assert all({"p99_ms", "lag_max", "cpu_us_per_notification"} <= one.keys() for one in stretches)


def test_a_benchmark_is_compared_with_an_earlier_tree_in_turn() -> None:
    done = ended(["bench", "against", "HEAD", "--rounds", "1", "--", "idle", "--quick"], timeout_seconds=SECONDS_MAX)
    assert done.returncode == 0, done.stderr[-3000:]
    compared = json.loads(done.stdout)["figures"]["result.sessions"]
    assert compared == {"before": [50], "now": [50], "ratio": 1.0, "spread": [0.0, 0.0]}


def test_a_revision_that_git_does_not_know_is_named() -> None:
    done = ended(["bench", "against", "nowhere", "--", "idle", "--quick"], timeout_seconds=SECONDS_MAX)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
