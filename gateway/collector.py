"""The garbage collector, set for a process that holds many long-lived sessions."""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 20_000
"""Objects more than at the last collection before the young are looked at: about a millisecond's work."""

MIDDLE: Final = 20
"""Young collections before the middle generation is looked at."""

OLD: Final = 50
"""Middle collections before the old generation may be: every 20 million objects."""


def tune() -> None:
    """Collect seldom, and never look at what exists now. For a process of the gateway, once, at its start.

    A session is about a hundred tracked objects, all released by their reference counts when it ends (a test holds them
    to that), so the collector finds nothing among them. By its defaults it would look through all of them again and again
    while a reconnect storm builds them up: a third of the storm's CPU, and pauses of a hundred milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
