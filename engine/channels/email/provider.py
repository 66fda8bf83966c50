"""What sends mails: a relay by SMTP, or a service by HTTP. Both are asked in the same way, and answer in the same way."""

from __future__ import annotations

from typing import Protocol

import msgspec

from engine.channels.channel import Outcome
from engine.channels.email.message import Mail


class Attempt(msgspec.Struct, frozen=True):
    """What a provider has made of a mail.

    Args:
        outcome: what it comes to, if no other provider is asked.
        elsewhere: the provider has not taken it, for a reason of its own (it is away, overloaded, or set up wrongly): another may.
    """

    outcome: Outcome
    elsewhere: bool = False


class MailProvider(Protocol):
    """Sends one mail to one recipient. `send` ends within its deadline, and raises nothing of the network or of the provider."""

    name: str

    async def send(self, mail: Mail, recipient: str, *, deadline_seconds: float) -> Attempt: ...

    async def close(self) -> None: ...


def judged(outcome: Outcome) -> Attempt:
    """An answer that was given: what is about our key or our speed there says nothing about another provider."""
    ours = outcome.kind == "config" or (outcome.kind == "throttled" and outcome.scope in ("key", "provider"))
    return Attempt(outcome, elsewhere=ours)
