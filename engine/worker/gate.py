"""The gate in front of a provider: whether something may be sent to it now, by its breaker, what it asks for, and its limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Literal

import structlog
from msgspec.structs import replace

from engine import metrics
from engine.channels.channel import Outcome
from engine.jobs.breaker import Breaker
from engine.jobs.budget import Budget
from engine.jobs.redisbucket import BucketUnavailable, RedisBucket

_log = structlog.get_logger("seamark.worker")

SLOT_SECONDS_MAX: Final = 3.0
"""How long a job may wait for its slot inside the worker; if the slot is further away, the job is put back. At a limit of 20 a
second for each worker, all that it has under way gets a slot in that time. And no critical job waits longer behind others."""

LATE_SECONDS: Final = 0.1
"""How late a slot may be used: over ten seconds that adds a hundredth to what a provider's limit allows."""

SLOW_SECONDS: Final = 2.0
"""Whoever took so long for the last send holds what others wait for (`engine.worker.gates`)."""

WAIT_SECONDS_MAX: Final = 15.0
"""How long a job is put back for at most when its provider is not to be asked: the provider may be back sooner than expected."""

SLOTS_MAX: Final = 3
"""How many slots a job may take and miss before it is put back: its worker has no time for it."""

OURS: Final = frozenset({"message", "target", "domain"})
"""Scopes of outcomes that say nothing of the provider itself: others to it may go on."""

WHOLE: Final = frozenset({"key", "provider"})
"""Scopes of outcomes that hold for all keys of a provider: our own key is wrong, or what all of them may take is used up."""

BURDENED: Final = frozenset({"throttled", "config"})
"""Of an endpoint these are failures like others: one that is asked too much, or leads nowhere, is asked less often."""


Noted = Callable[[str, Literal["open", "closed"], str], None]


class Gate:
    """One for each provider and key of it, in each process; only the limit is shared.

    Args:
        provider: by its name in the configuration.
        key: which of several that fare apart, as the endpoint of a webhook or a browser's push service; "": it has one only.
        single: the key is one target, an endpoint; what that brings about by itself is its own failure.
        bucket: its limit; none: none is known.
        clock: monotonic, in seconds.
        noted: told the provider, `open` or `closed`, and why, when its breaker changes; nobody is told of keys.
    """

    def __init__(
        self,
        provider: str,
        key: str = "",
        *,
        single: bool = False,
        bucket: RedisBucket | None = None,
        clock: Callable[[], float] = time.monotonic,
        noted: Noted | None = None,
    ) -> None:
        self._provider, self._key, self._single = provider, key, single
        self._bucket, self._clock = bucket, clock
        self._asked_until = self._full_until = 0.0
        self._budget, self._noted = Budget(), noted
        self._took_seconds: float | None = None
        self.whole: Gate | None = None
        """Of one key: the gate of its provider, whose limit holds for all keys together."""
        self.breaker = Breaker()
        self._of = "provider" if not key else "endpoint" if single else "service"

    @property
    def down(self) -> bool:
        """Whether its breaker is open, or that of its provider."""
        return any(gate.breaker.state == "open" for gate in self._gates())

    @property
    def apart(self) -> bool:
        """Whether what finds no slot here does so because of its key, while others to the same provider go on."""
        return bool(self._key)

    @property
    def put_back_seconds_max(self) -> float:
        """How long a job is put back for at most that finds no slot here."""
        return WAIT_SECONDS_MAX

    def wait_seconds(self) -> float:
        """For how long nothing may be sent to it, whatever its limit says; 0: it may."""
        now = self._clock()
        return max(self.breaker.wait_seconds(now), self._asked_until - now, 0.0)

    @property
    def full(self) -> bool:
        """Whether its next slots are taken: who comes now is sent away, so nothing more should come."""
        return self._clock() < self._full_until

    @property
    def slow(self) -> bool | None:
        """Whether the last send took long; None: there was none yet."""
        return None if self._took_seconds is None else self._took_seconds > SLOW_SECONDS

    async def enter(self, *, wait_seconds_max: float = SLOT_SECONDS_MAX) -> float:
        """Take a slot: how long to wait until it; less than 0: there is none, and it is worth asking again after so many seconds.

        While Redis is away there is no limit to be known, and what may be sent twice goes on (`engine.jobs.life`).
        """
        wait = self.wait_seconds()
        if wait > 0:
            return -wait
        seconds = 0.0
        if self._bucket is not None:
            try:
                taken, seconds = await self._bucket.take(wait_seconds_max=wait_seconds_max)
            except BucketUnavailable:
                metrics.worker_limits_unknown.labels(self._provider).inc()
                taken = True
            if not taken:
                self._full_until = self._clock() + seconds
                return -max(seconds, 0.001)
        if self.whole is not None:  # after its own limit: what finds no slot there takes none from other keys
            of_all = await self.whole.enter(wait_seconds_max=wait_seconds_max)
            if of_all < 0:
                return of_all
            seconds = max(seconds, of_all)
            if self.wait_seconds() > 0:  # it has opened meanwhile
                self.whole.unused()
        if self.wait_seconds() > 0:
            return -self.wait_seconds()
        self._changed(self.breaker.begun(self._clock()))
        return seconds

    async def slot(self) -> float:
        """Take a slot and wait for it: 0 when it has come; less than 0: there is none, as `enter` says.

        Slots that are used late come together with those of others: a process that stood still would send all of its own at once.
        Who is late takes another one.
        """
        for _ in range(SLOTS_MAX):
            seconds = await self.enter()
            if seconds <= 0:
                return seconds
            due, entered = self._clock() + seconds, [(gate, gate.breaker) for gate in self._gates()]
            await asyncio.sleep(seconds)
            opened = any(gate.breaker.state != "closed" and gate.breaker.until != was.until for gate, was in entered)
            if not opened and self._clock() - due <= LATE_SECONDS:
                return 0.0
            for gate, was in entered:
                if gate.breaker.until == was.until:  # a probe that was begun here, and not by somebody else meanwhile
                    gate._changed(gate.breaker.unbegun(self._clock()))  # noqa: SLF001 - its own class
            if opened:
                # It has opened meanwhile, and perhaps somebody is probing already: all that wait here would be probes, too.
                return -max(*(gate.wait_seconds() for gate in self._gates()), LATE_SECONDS)
        return -LATE_SECONDS

    def _gates(self) -> list[Gate]:
        """All that a send goes through here: this one, and that of its provider."""
        return [self] if self.whole is None else [self, self.whole]

    def unused(self) -> None:
        """A slot that was taken came to no send."""
        if self.whole is not None:
            self.whole.unused()
        self._changed(self.breaker.unbegun(self._clock()))

    def slower(self) -> float:
        """How much longer than usual a retry waits that is scheduled now."""
        return self._budget.slower(self._clock())

    async def told(self, outcome: Outcome, *, retry: bool, seconds: float = 0.0) -> None:
        """What came of a send that took so long."""
        self._took_seconds, self._budget = seconds, self._budget.told(self._clock(), retry=retry)
        of_all = outcome.kind in BURDENED and outcome.scope in WHOLE
        if self.whole is not None:
            await self.whole._told_by(outcome, self, retry=retry, of_all=of_all)  # noqa: SLF001 - its own class
        if self.whole is None or not of_all:
            await self._judge(outcome)

    async def _told_by(self, outcome: Outcome, key: Gate, *, retry: bool, of_all: bool) -> None:
        """What came of a send by one of the keys."""
        if not key._single:
            # Retries are slowed by provider. Those to the endpoints of one tenant must not slow those of others.
            self._budget = self._budget.told(self._clock(), retry=retry)
        if of_all or outcome.kind == "ok":
            await self._judge(outcome)
        else:
            # As a probe of all it has told nothing: a token that is gone would keep everybody waiting for another one.
            self._changed(self.breaker.unbegun(self._clock()))

    async def _judge(self, outcome: Outcome) -> None:
        now = self._clock()
        if self._single and outcome.kind in BURDENED:
            self._changed(self.breaker.told(replace(outcome, kind="transient"), now))
        elif _of_recipient(outcome) or not outcome.begun:
            self._changed(self.breaker.unbegun(now))  # as a probe it has told nothing
        else:
            self._changed(self.breaker.told(outcome, now))
        if outcome.kind != "throttled" or outcome.scope in OURS:
            return
        self._asked_until = max(self._asked_until, now + (outcome.retry_after_seconds or 0.0))
        await self._refused()

    async def _refused(self) -> None:
        """Whoever is behind the gate says that it was too much: lower its limit."""
        if self._bucket is not None:
            try:
                await self._bucket.refused()
            except BucketUnavailable:
                metrics.worker_limits_unknown.labels(self._provider).inc()

    def _changed(self, breaker: Breaker) -> None:
        before, self.breaker = self.breaker, breaker
        if before.state == breaker.state:
            return
        if not self._key:
            metrics.worker_breaker_open.labels(self._provider).set(breaker.state != "closed")
            if self._noted is not None and breaker.state != "half_open":
                self._noted(self._provider, breaker.state, breaker.why)
        say = _log.info if breaker.state == "closed" or self._key else _log.warning
        # Whose it is, without a name: a domain may be that of one person.
        say("breaker_changed", provider=self._provider, of=self._of, state=breaker.state, why=breaker.why)

    async def close(self) -> None:
        """Drop the connection of its limit."""
        if self._bucket is not None:
            await self._bucket.close()


def _of_recipient(outcome: Outcome) -> bool:
    """Whether a failure is that of the address: a full mailbox, a server of the recipient that is away, a set-up of his own."""
    if outcome.kind not in {"transient", "config"}:
        return False
    return outcome.soft_bounce or outcome.scope in {"target", "domain"}
