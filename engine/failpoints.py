"""Places where a failure test lets a process die or freeze at the worst moment. Without the variable: one comparison.

`SEAMARK_FAIL_POINT=<name>[:<n>[:stop]]`: at the n-th time (first by default) the process kills itself, or with `stop`
suspends itself until somebody continues it.
"""

from __future__ import annotations

import os
import signal

_NAME, _, _REST = os.environ.get("SEAMARK_FAIL_POINT", "").partition(":")
_COUNT, _, _HOW = _REST.partition(":")
_SIGNAL = signal.SIGSTOP if _HOW == "stop" else signal.SIGKILL
_left = int(_COUNT or 1)


def reach(name: str) -> None:
    """Die (or freeze) here if `SEAMARK_FAIL_POINT` names this place and this is the n-th time."""
    global _left
    if name != _NAME:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), _SIGNAL)
