"""Faults that a simulated provider has on demand. How one looks on the wire is the simulator's business.

A fault that comes after a message was accepted is the interesting one: the sender cannot know.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec


class Answers(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Refuses with a status, and the provider's own code in its own form.

    Args:
        status: of HTTP, or of SMTP.
        code: as the provider writes it; "": it sends none.
        text: beside it.
        headers: as `{"Retry-After": "7"}`.
    """

    status: int
    code: str = ""
    text: str = "told to fail"
    headers: dict[str, str] = {}


class Hangs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answers nothing until the other side gives up. `accepts`: it has taken the message before."""

    accepts: bool = False


class Resets(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Breaks the connection off (RST) without an answer. `accepts`: it has taken the message before."""

    accepts: bool = False


class Late(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Does as always, after so many seconds."""

    seconds: float


class SlowBody(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Does as always, and then sends the body of its answer byte by byte, with so many seconds between."""

    seconds: float


class NoTls(msgspec.Struct, frozen=True, tag=True):
    """Breaks new connections off during their handshake."""


Fault = Answers | Hangs | Resets | Late | SlowBody | NoTls


class Faults:
    """Which fault the next request meets.

    Args:
        seed: of what is left to chance.
    """

    def __init__(self, seed: int = 0) -> None:
        self._script: deque[Fault | None] = deque()
        self._standing: Fault | None = None
        self._share = 0.0
        self._chance = random.Random(seed)
        self.met: list[Any] = []
        """Faults that requests have met, in order, at most the last 1000."""

    def script(self, faults: Iterable[Fault | None]) -> None:
        """The next requests meet these, one each; None: no fault. They come before the standing one."""
        self._script.extend(faults)

    def stand(self, fault: Fault, share: float = 1.0) -> None:
        """From now on this share of all requests meets `fault`."""
        self._standing, self._share = fault, share

    def clear(self) -> None:
        """From now on all is well."""
        self._script.clear()
        self._standing = None

    def next(self) -> Fault | None:
        """What this request meets; None: nothing."""
        fault = self._script.popleft() if self._script else self._by_chance()
        if fault is not None:
            self.met = [*self.met[-999:], fault]
        return fault

    @property
    def breaks_tls(self) -> bool:
        """Whether a new connection is to fail in its handshake; asked before there is a request."""
        if self._script and isinstance(self._script[0], NoTls):
            self._script.popleft()
            return True
        return isinstance(self._standing, NoTls) and self._chance.random() < self._share

    def _by_chance(self) -> Fault | None:
        if self._standing is None or isinstance(self._standing, NoTls) or self._chance.random() >= self._share:
            return None
        return self._standing
