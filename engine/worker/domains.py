"""The gate of a domain of recipients at a provider of e-mail: a domain that defers mails holds up its own, and no others.

A mail goes through two gates: this one, and that of its provider behind it. This one closes only for what is the domain's doing
(`Outcome.scope`); anything else is the provider's, or the mail's. A domain that defers mails of one provider may take them from
the next, which has other addresses and another name there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

from engine.channels.channel import Job, Outcome
from engine.channels.email.settings import DomainSettings
from engine.jobs.breaker import Breaker
from engine.jobs.desk import Over
from engine.jobs.redisbucket import RedisBucket
from engine.jobs.retry import POLICIES
from engine.worker.gate import Gate

DEFERRED_SECONDS: Final = 60.0
"""How long a domain is left alone if it does not say for how long: Gmail and Outlook take some mails a minute later."""

DEFERRED_SECONDS_MAX: Final = 900.0
"""The same after many mails of which it has deferred each, unless it asks for more: the wait doubles with each. All that wait for
it are looked at anew once for each wait."""

PUT_BACK_SECONDS_MAX: Final = DEFERRED_SECONDS_MAX
"""How long a job is put back for at most because of its domain, and up to half as long again. By then there may be another
provider, or the job may be over."""

WINDOW_MAX: Final = 64
"""A domain that has taken so many mails since it last deferred one is as others are: any number may be under way to it."""


class DomainGate(Gate):
    """One for each domain and provider, in each process; only its limit is shared.

    After a deferral one mail is tried when the wait is over, then one more at a time for each that is taken (slow start, as in
    RFC 5681): all that have waited would be deferred again together, and each would have cost an attempt.
    """

    def __init__(self, provider: str, domain: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(provider, domain, clock=clock)
        self._of = "domain"
        self._window = self._at_once = math.inf

    def limited(self, settings: DomainSettings, bucket: RedisBucket | None) -> None:
        """Keep to what the providers' file says of it from now on."""
        self._at_once, self._bucket = settings.at_once or math.inf, bucket

    @property
    def at_once(self) -> float:
        """How many mails may be under way to it from this process."""
        return min(self._window, self._at_once)

    @property
    def shut(self) -> bool:
        """Whether it takes no mail because of what the domain has answered."""
        return self.breaker.wait_seconds(self._clock()) > 0

    @property
    def apart(self) -> bool:
        """As of any gate. Every mail has a domain, so one waits for that only where its provider would let it go on."""
        return self.whole is None or (self.whole.wait_seconds() == 0 and not self.whole.full)

    @property
    def put_back_seconds_max(self) -> float:
        """As long as the domain has asked for, within reason: many wait for it, and each time all of them are looked at again."""
        return PUT_BACK_SECONDS_MAX if self.apart else super().put_back_seconds_max

    async def told(self, outcome: Outcome, *, retry: bool, seconds: float = 0.0) -> None:
        """What came of a mail."""
        assert self.whole is not None
        await self.whole.told(outcome, retry=retry, seconds=seconds)
        now = self._clock()
        if outcome.kind == "ok":
            if self.breaker.state == "open":
                return  # it was under way when the domain began to defer: nothing has changed
            self._window = self._window + 1 if self._window < WINDOW_MAX else math.inf
            self._changed(self.breaker.told(outcome, now))
        elif outcome.scope != "domain":
            self._changed(self.breaker.unbegun(now))
        elif outcome.kind == "throttled":
            # Those that were under way together are deferred together: only a probe says that it still defers.
            longer = self.breaker.pause_seconds * (2 if self.breaker.state == "half_open" else 1)
            wait = max(outcome.retry_after_seconds or DEFERRED_SECONDS, min(longer, DEFERRED_SECONDS_MAX))
            until = max(now + wait, self.breaker.until if self.breaker.state == "open" else 0.0)
            self._window = 1
            self._changed(Breaker("open", until, wait, outcome.code))
            await self._refused()
        else:
            self._changed(self.breaker.told(outcome, now))


def waited_out(job: Job, gates: Iterable[Gate]) -> Over | None:
    """The end of a job whose domain defers mails at all providers, and has done so until the job's channel tries nothing again.

    Of thousands that wait for a domain only one is tried at a time, so most of them have no try from which retries count.
    """
    gates = list(gates)
    if not all(isinstance(gate, DomainGate) and gate.shut for gate in gates):
        return None
    waited_seconds = (datetime.now(UTC) - (job.tried_at or job.first_at)).total_seconds()
    if waited_seconds <= POLICIES[job.channel].horizon_seconds:
        return None
    outcome = Outcome(kind="throttled", code=gates[0].breaker.why, scope="domain")
    return Over("failed", outcome.code, outcome)
