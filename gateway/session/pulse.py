"""Whether a client is alive and keeps to what one client may send: its frames, our pings, what has not left."""

from __future__ import annotations

from typing import Final

from gateway.limits import FRAMES_PER_MINUTE
from gateway.options import Times
from gateway.session.outlet import Outlet

_ALLOWANCE: Final = float(FRAMES_PER_MINUTE)
_PER_SECOND: Final = FRAMES_PER_MINUTE / 60


class Pulse:
    """One session's signs of life. Times are those of the shared wheel, in seconds.

    Args:
        now: when the session began.
        times: when a silent client is pinged, and how long it may take to answer.
        outlet: where pings leave, and what knows how long nothing has left.

    Attributes:
        heard_at: when the client last showed life; where it cannot, when it was last given the chance.
    """

    __slots__ = ("_allowance", "_outlet", "_pinged_at", "_times", "heard_at")

    def __init__(self, now: float, times: Times, outlet: Outlet) -> None:
        self._times = times
        self._outlet = outlet
        self.heard_at = now
        self._pinged_at = 0.0
        self._allowance = _ALLOWANCE

    def heard(self, now: float) -> bool:
        """A frame has come. False: more than a client may send (token bucket over the frames of a minute)."""
        allowance = self._allowance + (now - self.heard_at) * _PER_SECOND
        if allowance > _ALLOWANCE:  # noqa: PLR1730 - each frame is counted: a comparison costs a third of a call of min()
            allowance = _ALLOWANCE
        self._allowance = allowance = allowance - 1
        self.heard_at = now
        return allowance >= 0

    def lost(self, now: float) -> bool:
        """Whether a ping, or what was sent, has waited for too long."""
        if self._pinged_at > self.heard_at:
            return now - self._pinged_at >= self._times.pong_seconds
        return self._outlet.stuck_seconds() >= self._times.ping_seconds + self._times.pong_seconds

    def ping_if_silent(self, now: float) -> float:
        """Ping a client that was silent for long; returns the seconds until it is time to look again."""
        times = self._times
        if self._pinged_at > self.heard_at:
            return self._pinged_at + times.pong_seconds - now
        silent = now - self.heard_at
        if silent < times.ping_seconds:
            return times.ping_seconds - silent
        if self._outlet.ping():
            self._pinged_at = now
            return times.pong_seconds
        self.heard_at = now
        return times.ping_seconds
