"""Places where a failure test lets a process die at the worst moment. Without the variable they cost one comparison."""

from __future__ import annotations

import os
import signal

_NAME, _, _COUNT = os.environ.get("SEAMARK_FAIL_POINT", "").partition(":")
_left = int(_COUNT or 1)


def reach(name: str) -> None:
    """Die by SIGKILL here if `SEAMARK_FAIL_POINT` is `<name>` or `<name>:<n>`, at the n-th time."""
    global _left
    if name != _NAME:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
