"""What a simulated provider has accepted: the ground truth of what was sent, and how often."""

from __future__ import annotations

from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

KEPT_MAX: Final = 100_000
"""The oldest go then: a stack that runs for weeks stays small, and tests send less. `forgotten` counts them."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """A message that a provider took.

    Args:
        id: what the provider calls it.
        channel: `push`, `email`, `sms` or `webhook`.
        to: the number, address, token or endpoint.
        key: what makes it the same message when it comes again, as far as the protocol says; "": it does not.
        shown: what a person would see, by its parts.
        raw: what of the request may be worth a look.
    """

    id: str
    channel: str
    to: str
    at: datetime
    key: str = ""
    shown: dict[str, Any] = {}
    raw: dict[str, Any] = {}


class AcceptLog:
    """Messages in the order in which they were accepted."""

    def __init__(self, kept_max: int = KEPT_MAX) -> None:
        self._messages: deque[Accepted] = deque(maxlen=kept_max)
        self.accepted = 0
        """How many there were in all."""

    @property
    def forgotten(self) -> int:
        """How many are no longer kept."""
        return self.accepted - len(self._messages)

    def add(self, **message: Any) -> Accepted:
        """Note a message, as accepted now."""
        accepted = Accepted(at=datetime.now(UTC), **message)
        self._messages.append(accepted)
        self.accepted += 1
        return accepted

    def messages(self, *, to: str | None = None) -> list[Accepted]:
        """Those that are kept, the oldest first; `to`: of one target only."""
        return [message for message in self._messages if to in (None, message.to)]

    def repeated(self) -> dict[str, int]:
        """Keys of messages that were accepted more than once, and how often."""
        counts = Counter(message.key for message in self._messages if message.key)
        return {key: count for key, count in counts.items() if count > 1}

    def clear(self) -> None:
        """Forget all."""
        self._messages.clear()
        self.accepted = 0
