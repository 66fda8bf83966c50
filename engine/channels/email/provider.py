"""What sends mails: a relay by SMTP, or a service by HTTP. Both are asked in the same way, and answer in the same way."""

from __future__ import annotations

from typing import Protocol

import msgspec

from engine.channels.channel import Outcome
from engine.channels.email.message import Mail


class MailProvider(Protocol):
    """Sends one mail to one recipient. `send` ends within its deadline, and raises nothing of the network or of the provider.

    An outcome says `elsewhere` where the provider has certainly not taken the mail, for a reason of its own: it is away,
    overloaded, or set up wrongly. Another one may be asked at once, then.
    """

    name: str

    async def send(self, mail: Mail, recipient: str, *, deadline_seconds: float) -> Outcome: ...

    async def close(self) -> None: ...


def judged(outcome: Outcome) -> Outcome:
    """An answer that was given: what is about our key or our speed there says nothing about another provider."""
    ours = (outcome.kind == "config" and outcome.scope != "target") or (
        outcome.kind == "throttled" and outcome.scope in ("key", "provider")
    )
    return msgspec.structs.replace(outcome, elsewhere=True) if ours else outcome
