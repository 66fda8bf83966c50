"""Waiting, in tests without a loop, for what another process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    look: Callable[[], T],
    *,
    seconds: float = 40.0,
    every_seconds: float = 0.02,
    said: Callable[[], object] = lambda: "",
) -> T:
    """Poll until `look()` is true; its value.

    Args:
        look: may fail by an assertion of its own where waiting has become vain.
        said: what the process that is waited for has printed; shown when the time is over.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {said()}"
        time.sleep(every_seconds)
    return found
