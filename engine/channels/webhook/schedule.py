"""What the answers of endpoints mean, and the numbers of trying again: `engine.jobs.retry` has the rule."""

from __future__ import annotations

from typing import Final

from engine.channels.verdicts import Table, Verdict

DELAYS_SECONDS: Final = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""After the first failure, the second, and so on: 75 hours in all, so that what broke on a Friday is tried again on Monday.
Standard Webhooks recommends these."""

JITTER: Final = 0.2
"""Each delay is up to so much shorter or longer: what failed together must not come back together."""

THROTTLED_SECONDS_MIN: Final = 60.0
"""An endpoint that is overloaded is left alone for so long, whatever it says itself."""

_AGAIN: Final = Verdict("transient")
_THROTTLED: Final = Verdict("throttled", scope="target")

TABLE: Final = Table(
    version="2026-11-29",
    codes={
        # No answer. A message may have arrived; its id tells the receiver.
        "dns": _AGAIN,
        "connect": _AGAIN,
        "tls": _AGAIN,
        "timeout": _AGAIN,
        "reset": _AGAIN,
        "malformed": _AGAIN,
        # The name leads into a network of our own. Whoever named it must not stop the webhooks of others by that.
        "blocked": Verdict("config", scope="target"),
    },
    statuses={
        408: _AGAIN,
        410: Verdict("target_invalid"),
        425: _AGAIN,
        429: _THROTTLED,
        502: _THROTTLED,
        504: _THROTTLED,
    },
    classes={2: Verdict("ok"), 3: Verdict("permanent"), 4: _AGAIN, 5: _AGAIN},
    guesses={},
)
"""https://github.com/standard-webhooks/standard-webhooks, "operational considerations"."""
