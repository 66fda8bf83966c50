"""What all benchmarks say in the same way: progress for people on stderr, figures for machines on stdout."""

from collections.abc import Sequence

from rich.console import Console

_console = Console(stderr=True, highlight=False)


def progress(text: str) -> None:
    """One line for whoever watches."""
    _console.print(text, style="dim")


def per_unit(seconds: float, units: int) -> float:
    """Processor time in microseconds per notification."""
    return round(seconds / max(units, 1) * 1e6, 1)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of the sorted values lie, in the unit they have."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else None


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
