"""What a person has to look at in what providers say, whether they answer a try or report of it later."""

from __future__ import annotations

import structlog

from engine import metrics
from engine.channels.channel import Outcome

_log = structlog.get_logger("seamark.channels")


def point_out(channel: str, outcome: Outcome) -> None:
    """Count and log an outcome by a code that the tables do not name, and one that raises an alarm."""
    if not outcome.known:
        metrics.provider_unknown_codes.labels(channel, outcome.provider).inc()
        _log.warning("provider_code_unknown", channel=channel, provider=outcome.provider, code=outcome.code)
    if outcome.alarm:
        metrics.provider_alarms.labels(channel, outcome.provider).inc()
        _log.error("provider_alarm", channel=channel, provider=outcome.provider, code=outcome.code)
