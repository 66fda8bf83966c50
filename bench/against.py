"""`against`: another benchmark in this tree and in an earlier one, in turn: what else the machine does meets both alike."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import progress

HERE = Path(__file__).parent.parent
RUN_SECONDS_MAX = 1800.0


class Unknown(Exception):
    """What git says of the revision."""


def run(revision: str, rounds: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m bench <arguments>` in both trees, `rounds` times each. Figures that only one of them prints are left out.

    Every other round begins with the other tree: a machine that grows slower or faster all the time favours none.

    Raises:
        Unknown: no such revision, or this tree is no git checkout.
        subprocess.CalledProcessError: a benchmark failed.
    """
    before: list[dict[str, float]] = []
    now: list[dict[str, float]] = []
    with _tree(revision) as tree:
        for number in range(rounds):
            turns = [(tree, before), (HERE, now)]
            for where, found in turns if number % 2 == 0 else reversed(turns):
                progress(f"round {number + 1} of {rounds}: {'here' if where is HERE else revision}")
                found.append(_figures(where, arguments))
    return {
        "benchmark": "against",
        "revision": revision,
        "arguments": list(arguments),
        "figures": {name: _compared(name, before, now) for name in before[0] if all(name in run for run in now)},
    }


@contextlib.contextmanager
def _tree(revision: str) -> Iterator[Path]:
    """The revision in a folder of its own, for as long as the block lasts."""
    folder = Path(tempfile.mkdtemp(prefix="seamark-against-"))
    try:
        packed = subprocess.run(["git", "archive", revision], cwd=HERE, capture_output=True)
        if packed.returncode:
            raise Unknown(packed.stderr.decode().strip())
        subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _figures(tree: Path, arguments: Sequence[str]) -> dict[str, float]:
    """The numbers that one run printed, by name."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        stdout=subprocess.PIPE,
        timeout=RUN_SECONDS_MAX,
    )
    printed = json.loads(done.stdout.splitlines()[-1])
    return dict(flat("", {name: part for name, part in printed.items() if name not in ("machine", "quick")}))


def flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a JSON value: `("result.runs.0.p99_ms", 12.5)`, and so on."""
    match value:
        case bool():
            pass
        case int() | float():
            yield name, value
        case dict() | list():
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from flat(f"{name}.{key}" if name else str(key), part)


def _compared(name: str, before: Sequence[dict[str, float]], now: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The values of one figure in the order of the runs, their medians' ratio, and how far the runs of one tree lie apart."""
    old, new = ([run[name] for run in runs if name in run] for runs in (before, now))
    return {
        "before": old,
        "now": new,
        "ratio": round(median(new) / median(old), 3) if median(old) else None,
        "spread": [round((max(runs) - min(runs)) / median(runs), 3) if median(runs) else None for runs in (old, new)],
    }
