"""What a provider's answer means, as data: a table from codes and statuses to what follows.

Providers keep splitting their codes, so a table only names those that mean something else than their status. Whatever it does
not name is judged by its class, 4xx or 5xx, and said to be unknown, so that somebody looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from engine.channels.channel import Outcome, OutcomeKind, Scope

RETRY_AFTER_SECONDS_MAX: Final = 86_400.0
"""No provider that is asked to send at once is waited for any longer; it may have said nonsense."""


PROVEN_SECONDS: Final = 60.0
"""For so long after a provider has taken something our key is right, whatever it answers to another target: whoever chooses a
target, or is one, must not stop a provider for everybody."""


class Verdict(msgspec.Struct, frozen=True):
    """What an answer means. The members are those of `Outcome`."""

    kind: OutcomeKind
    scope: Scope = "message"
    retries_max: int | None = None
    retry_after_seconds: float | None = None
    elsewhere: bool = False
    alarm: bool = False


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What the answers of one kind of provider mean.

    Args:
        version: when it was last held against the provider's own pages.
        codes: the provider's own codes, whatever the status beside them is.
        statuses: HTTP statuses that mean something else than their class.
        classes: the first digits of statuses that the provider's contract speaks of.
        guesses: the first digits of the others, with what is most likely meant. These are said to be unknown.
    """

    version: str
    codes: Mapping[str, Verdict]
    statuses: Mapping[int, Verdict]
    classes: Mapping[int, Verdict]
    guesses: Mapping[int, Verdict]

    def judged(
        self, provider: str, status: int, code: str = "", *, retry_after_seconds: float | None = None
    ) -> Outcome:
        """What an answer of `status` with the provider's own `code` has come to.

        Args:
            provider: its name in the configuration.
            status: of HTTP; 0: the code came without one, as in callbacks.
            code: "": there is none.
            retry_after_seconds: how long the provider asks to wait; it wins over the table.
        """
        named = self.codes.get(code)
        verdict = named or self.statuses.get(status) or self.classes.get(status // 100)
        known = named is not None or (verdict is not None and not code)  # else somebody has to look at the code
        verdict = verdict or self.guesses.get(status // 100, UNKNOWN)
        wait = verdict.retry_after_seconds if retry_after_seconds is None else retry_after_seconds
        if verdict.kind not in ("transient", "throttled"):
            wait = None
        return Outcome(
            kind=verdict.kind,
            provider=provider,
            code="/".join(filter(None, (str(status or ""), code))),
            scope=verdict.scope,
            retry_after_seconds=None if wait is None else min(wait, RETRY_AFTER_SECONDS_MAX),
            retries_max=verdict.retries_max,
            elsewhere=verdict.elsewhere,
            alarm=verdict.alarm,
            known=known,
        )


UNKNOWN: Final = Verdict("transient", retries_max=2)
"""Of answers that are in no class: it may work later, and a few tries show whether it does."""
