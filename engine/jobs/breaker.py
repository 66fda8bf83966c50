"""Breakers: when a provider is not tried. Pure: a breaker is a value, and what happens to it makes another one.

    closed ──(it fails)──▶ open ──(the pause is over)──▶ half open: one probe ──▶ closed, or open for longer

Open, it keeps jobs where they are: nothing burns attempts against a provider that is down. Each key of a provider
has its own.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from engine.channels.channel import Outcome

IN_A_ROW: Final = 5
"""So many failures in a row open it, however few sends there are."""

SHARE: Final = 0.5
SENDS_MIN: Final = 20
"""Or failures that are this share of at least so many recent sends."""

LATE_SECONDS: Final = 5.0
"""What is older counts half: a provider that has gone down is noticed within that time."""

PAUSE_SECONDS: Final = 1.0
PAUSE_SECONDS_MAX: Final = 30.0
"""Until the probe. It doubles with each probe that fails: a provider that was down for a minute is found within half of one."""

CONFIG_PAUSE_SECONDS: Final = 60.0
"""The same where our key or our set-up is wrong: a person has to mend it, and Apple counts wrong tokens."""

PROBE_SECONDS: Final = 35.0
"""A probe of which nothing is heard for so long, a try and a little more, has died with its worker: another may be begun."""

State = Literal["closed", "open", "half_open"]


class Breaker(msgspec.Struct, frozen=True):
    """Whether a provider is tried. Times are seconds of the worker's monotonic clock.

    Args:
        until: open: when the next probe may begin; half open: until when this one is waited for.
        pause_seconds: how long it was open for last.
        why: the code of the outcome that opened it.
        row, failed, sends: failures one after the other; of late, failures and sends.
        halved_at: when the latter two were halved last.
    """

    state: State = "closed"
    until: float = 0.0
    pause_seconds: float = 0.0
    why: str = ""
    row: int = 0
    failed: float = 0.0
    sends: float = 0.0
    halved_at: float = 0.0

    def wait_seconds(self, now: float) -> float:
        """How long nothing may be sent; 0: it may be."""
        return 0.0 if self.state == "closed" else max(0.0, self.until - now)

    def begun(self, now: float) -> Breaker:
        """With a send that has begun: if it was open, this is the probe."""
        return self if self.state == "closed" else replace(self, state="half_open", until=now + PROBE_SECONDS)

    def unbegun(self, now: float) -> Breaker:
        """With a send that did not come to be: if it was the probe, another one may begin."""
        return replace(self, state="open", until=now) if self.state == "half_open" else self

    def told(self, outcome: Outcome, now: float) -> Breaker:
        """With what came of a send. Only what is the provider's or our set-up's doing counts: a wrong address is the job's."""
        if outcome.kind == "config":
            return self._opened(outcome, now, CONFIG_PAUSE_SECONDS)
        failed = outcome.kind in {"transient", "ambiguous"}
        if self.state != "closed":
            # A send that was under way when it opened says nothing new by failing; by arriving it does.
            probed = self.state == "half_open"
            return (self._opened(outcome, now) if probed else self) if failed else Breaker(halved_at=now)
        counted = self._counted(now, failed=failed)
        much = counted.sends >= SENDS_MIN and counted.failed >= counted.sends * SHARE
        opens = failed and (counted.row >= IN_A_ROW or much)
        return counted._opened(outcome, now) if opens else counted  # noqa: SLF001 - its own class

    def _counted(self, now: float, *, failed: bool) -> Breaker:
        halvings = max(0, int((now - self.halved_at) / LATE_SECONDS))
        share = 0.5 ** min(halvings, 64)
        return replace(
            self,
            row=self.row + 1 if failed else 0,
            failed=self.failed * share + failed,
            sends=self.sends * share + 1,
            halved_at=self.halved_at + halvings * LATE_SECONDS,
        )

    def _opened(self, outcome: Outcome, now: float, at_least_seconds: float = PAUSE_SECONDS) -> Breaker:
        doubled = self.pause_seconds * 2 if self.state == "half_open" else 0.0
        pause = max(at_least_seconds, min(PAUSE_SECONDS_MAX, doubled))
        return Breaker("open", now + pause, pause, outcome.code or outcome.kind)
