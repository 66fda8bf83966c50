"""The metrics of processes that do the same work, added up as if they were one process. Without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from prometheus_client import Metric
from prometheus_client.registry import Collector

Families = Sequence[Metric]

SUMMED: Final = frozenset({
    "process_max_fds", "process_open_fds", "process_resident_memory_bytes", "process_virtual_memory_bytes",
    "seamark_dispatcher_append_stalled", "seamark_gateway_sessions",
})  # fmt: skip
"""Gauges of which each process has a part: their sum is shown. Of a gauge that is named nowhere here it is the largest."""

EARLIEST: Final = frozenset({"process_start_time_seconds"})
"""Gauges that say since when: the earliest is shown, as of those that prometheus-client names `…_created`."""

_COUNTS: Final = frozenset({"counter", "histogram"})


class AddedUp(Collector):
    """What several processes have counted: what those have counted that have ended stays counted.

    Else the sum would fall when a process is replaced, and whoever reads it would take the rest for counted anew.
    """

    def __init__(self) -> None:
        self._last: dict[int, Families] = {}
        self._ended: Families = ()
        self._now: Families = ()

    def take(self, answers: Mapping[int, Families]) -> None:
        """Take what processes have said, by their numbers.

        Of a process that says nothing, what it had counted before stays in the sum, and its gauges are left out.
        """
        for number, said in answers.items():
            before = self._last.get(number, ())
            if before and _instance(before) != _instance(said):
                self._ended = added((self._ended, _counts(before)))
        silent = [_counts(said) for number, said in self._last.items() if number not in answers]
        self._last.update(answers)
        self._now = added((self._ended, *silent, *answers.values()))

    def collect(self) -> Families:
        """The sums, as of the last `take`."""
        return self._now


def added(expositions: Iterable[Families]) -> Families:
    """Families of several processes as one: counts and histograms summed up, gauges by what they mean, the largest by default.

    The largest says the worst of what is an age, and of what is 1 while something is wrong.
    """
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in (one for each in expositions for one in each):
        families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        found = values.setdefault(family.name, {})
        for sample in family.samples:
            key = sample.name, tuple(sample.labels.items())
            found[key] = _together(family, found[key], sample.value) if key in found else sample.value
    for name, family in families.items():
        for (sample_name, labels), value in values[name].items():
            family.add_sample(sample_name, dict(labels), value)
    return list(families.values())


def _together(family: Metric, one: float, other: float) -> float:
    if family.name in EARLIEST or family.name.endswith("_created"):
        return min(one, other)
    return one + other if family.type in _COUNTS or family.name in SUMMED else max(one, other)


def _counts(families: Families) -> Families:
    return [one for one in families if one.type in _COUNTS]


def _instance(families: Families) -> str:
    """Which process has said this: a new one counts from 0."""
    samples = (sample for one in families if one.name == "target_info" for sample in one.samples)
    return next((sample.labels["service_instance_id"] for sample in samples), "")
