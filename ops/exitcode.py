"""What the end of a process says to whoever started it: an orchestrator, a script, a parent process."""

from __future__ import annotations

from typing import Final

from engine.errors import InvalidSetting, TopologyError

FAILED: Final = 1
MISCONFIGURED: Final = 78
"""EX_CONFIG of sysexits.h: starting again will not help before somebody changes something."""


def exit_code_of(error: BaseException) -> int:
    """78 for a setting or stream that has to be changed first, 1 for what another try may mend."""
    return MISCONFIGURED if isinstance(error, (InvalidSetting, TopologyError)) else FAILED
