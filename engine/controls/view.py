"""What the controls in force mean for whoever is about to do something: pure, and made once for each document."""

from __future__ import annotations

from typing import Literal, NamedTuple

from engine.controls.document import Document, Kill, Pause, Throttle
from engine.plan import decisions
from seamark.protocol.subjects import fnv1a


class Verdict(NamedTuple):
    """`go`; `hold`: put it back; `drop`: it ends as `killed:<switch>`."""

    effect: Literal["go", "hold", "drop"]
    switch: str = ""


GO = Verdict("go")


class Controls:
    """The controls of one document."""

    __slots__ = ("_kills", "_pauses", "_throttles")

    def __init__(self, document: Document = Document()) -> None:  # noqa: B008 - it is immutable
        controls = [each.control for each in document.controls]
        self._kills = tuple(each for each in controls if isinstance(each, Kill))
        self._pauses = frozenset((each.lane, each.channel) for each in controls if isinstance(each, Pause))
        self._throttles = tuple(each for each in controls if isinstance(each, Throttle))

    @property
    def kill(self) -> bool:
        """Whether there is any kill switch: mostly there is none, and every job asks."""
        return bool(self._kills)

    def verdict(self, tenant: str, channel: str, provider: str | None, category: str | None, user: str = "") -> Verdict:
        """Whether something may be sent to a user. A switch that holds goes before one that drops: nothing is lost by it.

        Args:
            provider: None: not chosen yet; switches of providers do not count then.
        """
        found = GO
        for kill in self._kills:
            if _hits(kill, tenant, channel, provider, category) and not let_through(kill, tenant, user):
                if kill.mode == "hold":
                    return Verdict("hold", kill.name)
                if found is GO:
                    found = Verdict("drop", kill.name)
        return found

    def drops(self, tenant: str, user: str) -> tuple[decisions.Kill, ...]:
        """The switches by which a user's notifications end where they are planned, whatever provider would send them."""
        if not self._kills:
            return ()  # nearly always, and every notification asks
        return tuple(
            decisions.Kill(kill.name, kill.channel, kill.category)
            for kill in self._kills
            if kill.mode == "drop"
            and kill.provider is None
            and kill.tenant in (None, tenant)
            and not let_through(kill, tenant, user)
        )

    def holds_all(self, channel: str) -> bool:
        """Whether nothing of a channel is sent to anybody: then its jobs are better left where they are."""
        return any(
            kill.mode == "hold"
            and kill.channel in (None, channel)
            and (kill.tenant, kill.provider, kill.category) == (None, None, None)
            and kill.percent == 0
            for kill in self._kills
        )

    def paused(self, lane: str, channel: str | None = None) -> bool:
        """Whether a lane waits, of a channel or (None) of all."""
        return (lane, None) in self._pauses or (channel is not None and (lane, channel) in self._pauses)

    def throttles(self, tenant: str, type: str) -> tuple[Throttle, ...]:
        """Those that count an event: all of them must let it through."""
        return tuple(each for each in self._throttles if each.tenant == tenant and _covers(each.type, type))


def let_through(kill: Kill, tenant: str, user: str) -> bool:
    """Whether a user is among the share that a switch lets through again.

    The order of users is that of a hash, the same for all switches: who is let through at 10 % is so at 50 %.
    """
    return kill.percent > 0 and fnv1a(f"{tenant}\0{user}".encode()) % 100 < kill.percent


def _hits(kill: Kill, tenant: str, channel: str, provider: str | None, category: str | None) -> bool:
    return (
        channel != "inapp"
        and kill.tenant in (None, tenant)
        and kill.channel in (None, channel)
        and kill.provider in (None, provider)
        and kill.category in (None, category)
    )


def _covers(pattern: str | None, type: str) -> bool:
    if pattern is None or pattern == type:
        return True
    return pattern.endswith(".*") and type.startswith(pattern[:-1])
