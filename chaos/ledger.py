"""What happened during a run, as seen from outside: lines of (time, process, operation, phase, facts), in memory and JSONL.

An operation begins with `invoke` and ends with `ok`, `fail` (it certainly had no effect) or `info` (nobody knows: a time-out,
a lost connection). A line that is only ever `invoke` counts as `info`: its process died. Operations:

- `publish`: event, to, key, number (counts up per key); ok adds seq (position in EVENTS).
- `stream`: an `ok` line per LOG at the end: name, epoch, first, last, replica.
- `record`: an `ok` line per record found in a LOG at the end: replica, stream, epoch, seq, user, event, key, and the
  event's place in EVENTS: event_epoch, event_seq.
- `open`: a session begins: session, user, device, cursor (as asked, or None); ok adds resumed, reason, start.
- `deliver`: an `ok` line per frame a device got: session, epoch, seq, prev, event (None for a frame that only moves the cursor).
- `ack`: session, epoch, seq.
- `settle`: an `ok` line: this session was open at the end and has been given the time to get everything.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

Phase = Literal["invoke", "ok", "fail", "info"]


class Line(NamedTuple):
    """One line of the ledger. `call` joins the lines of one operation."""

    at: float
    process: str
    call: int
    op: str
    phase: Phase
    facts: dict[str, Any]


class Ledger:
    """Lines in the order in which they were written."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self.lines = list(lines)
        self._calls = itertools.count(1)
        self._numbers: dict[str, int] = {}

    def next_number(self, key: str) -> int:
        """Counts the events of a key, over all that publish."""
        self._numbers[key] = self._numbers.get(key, 0) + 1
        return self._numbers[key]

    def invoke(self, process: str, op: str, **facts: Any) -> int:
        """An operation begins; returns what its end is to be written with."""
        call = next(self._calls)
        self.lines.append(Line(time.monotonic(), process, call, op, "invoke", facts))
        return call

    def end(self, call: int, process: str, op: str, phase: Phase, **facts: Any) -> None:
        """The operation `call` ended."""
        self.lines.append(Line(time.monotonic(), process, call, op, phase, facts))

    def note(self, process: str, op: str, **facts: Any) -> None:
        """Something that was seen, in one line."""
        self.lines.append(Line(time.monotonic(), process, next(self._calls), op, "ok", facts))

    def dump(self, path: Path) -> None:
        """Write as JSONL."""
        with path.open("w") as file:
            file.writelines(json.dumps(line._asdict()) + "\n" for line in self.lines)

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read what `dump` wrote."""
        with path.open() as file:
            return cls(Line(**json.loads(line)) for line in file)
