"""Every metric is declared in one module of its package, and processes that do the same work are counted as one."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import engine.metrics
import gateway.metrics
import projections.metrics
from gateway.join.port import FeedCounters
from ops.addedup import EARLIEST, SUMMED, AddedUp, added

ROOT = Path(__file__).parents[2]
PACKAGES = ("seamark", "engine", "projections", "gateway", "ops")
MODULES = (engine.metrics, gateway.metrics, projections.metrics)
KINDS = {"Counter", "Enum", "Gauge", "Histogram", "Info", "Summary", "CounterMetricFamily", "GaugeMetricFamily"}

LARGEST = {
    "seamark_cancels_unheard", "seamark_funnel_notifications", "seamark_jobs_subjects", "seamark_partition_owned",
    "seamark_partition_stopped", "seamark_planner_lag_seconds", "seamark_projection_lag_seconds",
    "seamark_retention_kept_timestamp_seconds", "seamark_retention_overdue_seconds", "seamark_retention_undivided",
    "seamark_providers_stale", "seamark_worker_breaker_open",
}  # fmt: skip
"""Gauges of which the largest holds for all processes: 1 while something is so in one of them, an age, a part of a whole."""


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_counts_is_declared_in_one_module(package: str) -> None:
    elsewhere = [
        f"{path.relative_to(ROOT)}: {name.name}"
        for path in (ROOT / package).rglob("*.py")
        if path != ROOT / package / "metrics.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == prometheus_client.__name__
        for name in node.names
        if name.name in KINDS
    ]
    assert elsewhere == []


def declared() -> list[Counter | Gauge | Histogram]:
    found = [one for module in MODULES for one in vars(module).values() if isinstance(one, Counter | Gauge | Histogram)]
    return found + [one for one in engine.metrics._PARTITION_METRICS if one not in found]


def test_names_say_whose_they_are_and_how_a_gauge_adds_up_is_said_of_each() -> None:
    names = [one.describe()[0].name for one in declared()]
    assert len(names) > 40
    assert len(set(names)) == len(names)
    assert [name for name in names if not name.startswith("seamark_")] == []
    gauges = {one.describe()[0].name for one in declared() if isinstance(one, Gauge)}
    ours = {name for name in SUMMED | EARLIEST if name.startswith("seamark_")}
    assert gauges == ours | LARGEST, "a new gauge goes into SUMMED or EARLIEST of ops/addedup.py, or into LARGEST here"
    assert not ours & LARGEST


def test_documents_name_every_metric_and_none_that_is_gone() -> None:
    families = [
        family for one in (*declared(), gateway.metrics.FeedCollector(FeedCounters())) for family in one.collect()
    ]
    shown = {family.name + "_total" * (family.type == "counter") for family in families}
    text = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"\bseamark_[a-z_]+", text))
    assert shown - named == set(), "say in docs/operations.md what they count"
    assert named - shown == set(), "no metric is called so"


def exposition(instance: str, tries: int, sessions: int, started: int, lag: float) -> Sequence[Metric]:
    """What a process says, by way of what is sent."""
    registry = CollectorRegistry()
    Info("target", "who", registry=registry).info({"service_instance_id": instance})
    Counter("tries", "tries", ("kind",), registry=registry).labels('o"k').inc(tries)
    Gauge("seamark_gateway_sessions", "open", ("carrier",), registry=registry).labels("ws").set(sessions)
    Gauge("process_start_time_seconds", "when", registry=registry).set(started)
    Gauge("lag_seconds", "age", registry=registry).set(lag)
    took = Histogram("took_seconds", "took", buckets=(1, 5), registry=registry)
    for number in range(tries):
        took.observe(number)
    return list(text_string_to_metric_families(generate_latest(registry).decode()))


def said(families: Sequence[Metric]) -> dict[str, float]:
    """The samples as they are sent, by name and labels; those of when something was made are left out."""
    added_up = AddedUp()
    added_up.take({0: families})
    lines = (line.rpartition(" ") for line in generate_latest(added_up).decode().splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in lines if "_created" not in name}


def test_processes_are_counted_together_and_gauges_by_what_they_mean() -> None:
    both = added([exposition("host-1", 3, 2, 100, 0.5), exposition("host-2", 7, 5, 90, 4)])
    assert said(both) == {
        'target_info{service_instance_id="host-1"}': 1,
        'target_info{service_instance_id="host-2"}': 1,
        'tries_total{kind="o\\"k"}': 10,
        'seamark_gateway_sessions{carrier="ws"}': 7,
        "process_start_time_seconds": 90,
        "lag_seconds": 4,
        'took_seconds_bucket{le="1.0"}': 4,
        'took_seconds_bucket{le="5.0"}': 9,
        'took_seconds_bucket{le="+Inf"}': 10,
        "took_seconds_count": 10,
        "took_seconds_sum": 3 + 21,
    }


def test_no_sum_falls_when_a_process_is_silent_or_replaced() -> None:
    kept = AddedUp()

    def tries() -> float:
        return said(kept.collect())['tries_total{kind="o\\"k"}']

    kept.take({0: exposition("host-1", 3, 2, 100, 0), 1: exposition("host-2", 7, 5, 100, 0)})
    assert tries() == 10
    kept.take({1: exposition("host-2", 8, 5, 100, 0)})
    assert tries() == 11
    assert said(kept.collect())['seamark_gateway_sessions{carrier="ws"}'] == 5, "of one that is silent nobody knows"
    for count in (0, 2):
        kept.take({0: exposition("host-3", count, 0, 200, 0), 1: exposition("host-2", 8, 5, 100, 0)})
        assert tries() == 11 + count
    kept.take({0: exposition("host-4", 1, 0, 300, 0), 1: exposition("host-2", 8, 5, 100, 0)})
    assert tries() == 14
