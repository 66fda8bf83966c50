"""Which gateways there are, by what was heard of them: pure, and forgotten by itself."""

from __future__ import annotations

from gateway.presence.limits import GATEWAY_FORGOTTEN_SECONDS, GATEWAYS_MAX


class Roll:
    """The gateways that may have sessions.

    A gateway says every few seconds that it is there, and says so when it leaves. One that falls silent is remembered for as
    long as it may have sessions: cut off, it ends them by itself before that (`gateway.presence.gateways`).

    Args:
        now: from when on was listened, in monotonic seconds.
    """

    def __init__(self, now: float) -> None:
        self._heard_at: dict[str, float] = {}
        self._since = now

    def heard(self, gateway: str, now: float) -> None:
        """It is there."""
        if gateway in self._heard_at or len(self._heard_at) < GATEWAYS_MAX:
            self._heard_at[gateway] = now
        else:
            self._since = now  # one more than can be remembered: then not all are known

    def left(self, gateway: str) -> None:
        """It has ended its sessions, and leaves."""
        self._heard_at.pop(gateway, None)

    def deaf(self, now: float) -> None:
        """Until now nothing could be heard for a while: of gateways that came and fell silent meanwhile nothing is known."""
        self._since = now

    def known(self, now: float) -> set[str]:
        """Those that may have sessions, as far as was heard."""
        for gateway, at in list(self._heard_at.items()):
            if now - at > GATEWAY_FORGOTTEN_SECONDS:
                del self._heard_at[gateway]
        return set(self._heard_at)

    def complete(self, now: float) -> bool:
        """Whether these are all: one that nothing was heard of since `since` has ended its sessions by now."""
        return now - self._since > GATEWAY_FORGOTTEN_SECONDS
