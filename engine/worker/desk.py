"""The desk of a channel: decides about its jobs by what holds now, and has them sent by the provider whose turn it is.

What is decided about a job when it is handed out is the same as what a planner decided about its record, from what holds by
now. So preferences, suppressions, controls, cancels and expiry hold for whatever waits, and nothing has to be called back.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import structlog
from msgspec.structs import replace

from engine import metrics
from engine.cancels import Cancels
from engine.channels.channel import Job, Outcome, Unsendable
from engine.controls.view import Verdict
from engine.controls.watching import WatchedControls
from engine.errors import BrokerError, StoreUnavailable
from engine.jobs.claims import End
from engine.jobs.desk import Hold, Over, Send, Split
from engine.jobs.digests import STAGE as DIGEST
from engine.jobs.receipts import ENDED_BY
from engine.jobs.retry import put_back_seconds
from engine.letters.letter import THROTTLED
from engine.plan.decide import decide, wakes
from engine.plan.decisions import Decision, Facts, Inputs
from engine.plan.gathering import gathered
from engine.plan.profile import Profile
from engine.plan.rules import Channel
from engine.planner.shares import Shares
from engine.traces.spans import active
from engine.worker import attempts
from engine.worker.alike import Alike
from engine.worker.caps import Caps, cap_of
from engine.worker.contexts import Contexts, Rules
from engine.worker.domains import waited_out
from engine.worker.facts import facts_of, notification_of
from engine.worker.gate import WAIT_SECONDS_MAX
from engine.worker.gates import Gates
from engine.worker.holding import HELD_SECONDS, held, hold, longer, ours
from engine.worker.providers import Provider
from engine.worker.targets import Nowhere, Several, Target, Targets, Unusable
from seamark.protocol.subjects import encode_token

_log = structlog.get_logger("seamark.worker")

CONTROLS_SECONDS_MAX: Final = 2.0
"""A worker that has not heard from the control bucket for so long begins no send: so a kill switch holds within that time."""

AGAIN_SECONDS: Final = 1.0
"""The shortest pause of a job that wakes and must wait for the same reason again. It doubles each time, up to a minute."""

ANOTHER_SECONDS: Final = 5.0
"""What must be left of a try for another provider to be asked in it."""

_decisions_of = functools.cache(metrics.worker_decisions.labels)

AskWoken = Callable[[Job], Awaitable[Hold | Over | Send | Split | Facts]]
"""What is asked first about a job that was woken; with facts, its decision goes on from these."""


class Profiles(Protocol):
    """Users as decisions see them."""

    async def of(self, tenant: str, user: str, /) -> Profile:
        """One user. Raises StoreUnavailable."""


class Aim:
    """Where a job goes, and by whom. A `Send.target`.

    Args:
        providers: that may send it, in the order in which they are asked.
        chosen: whose turn was taken.
    """

    __slots__ = ("chosen", "providers", "target")

    def __init__(self, target: Target, providers: Sequence[Provider]) -> None:
        self.target, self.providers = target, providers
        self.chosen: Provider | None = None


class WorkerDesk:
    """The desk of one channel of a worker. An `engine.jobs.desk.Desk`.

    Args:
        providers: of the channel, as they are configured at the moment.
        caps: how many messages users may get; none: as many as there are.
        stages: what is asked first about woken jobs, by their stage; about a digest always `DIGEST`.
        shares: how much the tenant may have waiting; none: as much as there is.
        fallback: what is done where a user has no token any more.
        noted: told of each try at a webhook's endpoint.
    """

    def __init__(
        self,
        channel: Channel,
        providers: Callable[[], Sequence[Provider]],
        gates: Gates,
        controls: WatchedControls,
        cancels: Cancels,
        rules: Rules,
        profiles: Profiles,
        targets: Targets,
        contexts: Contexts,
        *,
        caps: Caps | None = None,
        stages: Mapping[str, AskWoken] | None = None,
        shares: Shares | None = None,
        fallback: Callable[[Job], Awaitable[None]] | None = None,
        noted: Callable[[Job, Outcome, datetime], Awaitable[None]] | None = None,
    ) -> None:
        self._channel = channel
        self._providers, self._gates = providers, gates
        self._controls, self._cancels = controls, cancels
        self._rules, self._profiles = rules, profiles
        self._targets, self._contexts = targets, contexts
        self._caps, self._stages = caps, stages or {}
        self._shares, self._fallback, self._noted = shares, fallback, noted
        self._spans, self._alike = active(), Alike()
        # A push that comes twice replaces itself on the device; an endpoint knows a webhook by its id.
        self.repeatable = channel in {"push", "webhook"}

    # --- what is to be done with a job -------------------------------------------------------------------------------

    def open(self, lane: str) -> bool:
        """Whether jobs of a lane are worth taking. Those that are not taken stay in JOBS, and cost nothing."""
        if self._deaf() or self._controls.controls.paused(lane, self._channel):
            return False
        if self._controls.controls.holds_all(self._channel):
            return False
        gates = [self._gates.of(one) for one in self._providers()]
        return any(gate.wait_seconds() == 0 and (lane == "critical" or not gate.full) for gate in gates)

    def _deaf(self) -> bool:
        return self._controls.age_seconds > CONTROLS_SECONDS_MAX

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        """What is to be done with a job by what holds now.

        Raises:
            StoreUnavailable: what it is decided from cannot be read.
        """
        decided = self._controlled(job) or await self._decided(job)
        _decisions_of(self._channel, type(decided).__name__.lower()).inc()
        return decided

    def _controlled(self, job: Job) -> Hold | Over | None:
        """What operators have set, which holds for every job."""
        controls = self._controls.controls
        if self._deaf():
            return hold(CONTROLS_SECONDS_MAX, "controls_old")
        if controls.paused(job.lane, job.channel):
            return held(job, "paused")
        verdict = controls.verdict(job.tenant, job.channel, None, job.category or None, job.user)
        if verdict.effect == "hold":
            return held(job, f"killed:{verdict.switch}")
        if verdict.effect != "drop" or (job.digest and job.members is None):
            return None  # a digest's notifications are looked up first, so that each of them ends
        return Over("suppressed", f"killed:{verdict.switch}")

    async def _decided(self, job: Job) -> Send | Hold | Over | Split:
        woken = self._stages.get(DIGEST if job.digest else job.stage)
        found = await woken(job) if woken is not None else None
        if found is not None and not isinstance(found, Facts):
            return found
        now = datetime.now(UTC)  # before anything is read: whatever has changed by then is in what is read
        if job.transaction:
            await self._cancels.heard()
        rules = await self._rules.of(job.tenant)
        profile = await self._profiles.of(job.tenant, job.user)
        kills = self._controls.controls.drops(job.tenant, job.user)
        as_others = job.stage == "first" and found is None and not job.transaction and not kills
        if as_others and (sent := self._alike.of(job, rules, profile)) is not None:
            return await self.aim(job, sent.category, profile)
        cancelled = bool(job.transaction) and self._cancels.holds(encode_token(job.tenant), job.transaction)
        facts = facts_of(job, found, cancelled=cancelled)
        inputs = gathered(notification_of(job), facts, rules, profile, kills, now)
        decision = decide(job.channel, inputs)
        if decision.when == "now" and (capped_until := await self._capped(job, inputs)) is not None:
            inputs = replace(inputs, facts=replace(inputs.facts, capped_until=capped_until))
            decision = decide(job.channel, inputs)
        if decision.when != "now":
            return await self._not_now(job, decision, inputs)
        if as_others:
            self._alike.keep(job, rules, profile, inputs, decision)
        return await self.aim(job, inputs.category, inputs.profile)

    async def _capped(self, job: Job, inputs: Inputs) -> datetime | None:
        """Until when the user gets no more by this channel; None: there is no cap, a place was free, or it is critical."""
        cap = cap_of(inputs, job.channel)
        return None if self._caps is None or cap is None else await self._caps.take(job, *cap)

    async def _not_now(self, job: Job, decision: Decision, inputs: Inputs) -> Hold | Over:
        woken = wakes(decision, inputs)
        if woken is not None:
            stage, due = woken
            if job.stage == stage:
                # The broker's clock may be ahead of ours: without a pause it would hand the job out again at once.
                pause = put_back_seconds(job.put_backs, AGAIN_SECONDS, random.random())
                due = max(due, inputs.now + timedelta(seconds=pause))
            return Hold(due, decision.why, stage)
        if decision.why == "no_token":
            await self._escalate_without_token(job)
        return Over(ENDED_BY.get(decision.why, "suppressed"), decision.why)

    async def _escalate_without_token(self, job: Job) -> None:
        if self._fallback is not None and not job.target:
            await self._fallback(job)

    async def aim(
        self, job: Job, category: str | None = None, profile: Profile | None = None
    ) -> Send | Hold | Over | Split:
        """What to send to whom, where it is decided that it is sent now.

        Args:
            category: of the notification.
            profile: of the user; none: it is read.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        found = await self._targets.find(job, category, datetime.now(UTC))
        match found:
            case Nowhere(why):
                if why == "no_token":
                    await self._escalate_without_token(job)
                return Over("suppressed", why)
            case Several(ids):
                if not job.digest and await self._is_crowded_out(job):
                    return Over("suppressed", THROTTLED)
                return Split(ids)
            case Unusable(code):
                return ours(job, Outcome(kind="config", code=code, scope="target"))
        serving = _serving(self._providers(), found)
        if not serving:
            # It is our configuration that lacks something, for this token only: it waits as for any fault of ours.
            return ours(job, Outcome(kind="config", code="no_provider", scope="target"))
        serving, switch = self._not_dropped(job, serving)
        if not serving:
            return Over("suppressed", f"killed:{switch}")
        if over := waited_out(job, (self._gates.of(one, found.key) for one in serving)):
            return over
        context = await self._contexts.of(job, profile or await self._profiles.of(job.tenant, job.user))
        try:
            rendered = serving[0].channel.render(job, context)
        except Unsendable as error:
            if error.outcome.kind == "config":
                return ours(job, error.outcome)
            ended: End = "expired" if error.outcome.kind == "expired" else "failed"
            return Over(ended, error.outcome.code or error.outcome.kind, error.outcome)
        return Send(rendered, Aim(found, serving))

    async def _is_crowded_out(self, job: Job) -> bool:
        """Whether the tenant has so many jobs waiting that this one must not become several; the letter of it can be replayed."""
        if self._shares is None:
            return False
        return (await self._shares.above([job.tenant])).holds(job.tenant, critical=job.lane == "critical")

    def _not_dropped(self, job: Job, serving: list[Provider]) -> tuple[list[Provider], str]:
        """The providers that no switch of theirs has dropped the jobs of; the switch, if there is one."""
        if not self._controls.controls.kill:
            return serving, ""
        verdicts = {one.name: self._verdict(job, one) for one in serving}
        switch = next((one.switch for one in verdicts.values() if one.effect == "drop"), "")
        return [one for one in serving if verdicts[one.name].effect != "drop"], switch

    def _verdict(self, job: Job, provider: Provider) -> Verdict:
        return self._controls.controls.verdict(job.tenant, job.channel, provider.name, job.category or None, job.user)

    # --- the try -----------------------------------------------------------------------------------------------------

    async def turn(self, job: Job, send: Send) -> float:
        """Take a slot at the first provider that may be asked; else in how many seconds to ask again."""
        aim = _aim(send)
        waits, apart = [], bool(aim.target.key)
        for provider in aim.providers:
            if self._verdict(job, provider).effect != "go":
                waits.append(HELD_SECONDS)
                continue
            if seconds := self._gates.take_place(provider, aim.target.key, aim):
                waits.append(seconds)
                continue
            gate = self._gates.of(provider, aim.target.key)
            seconds = await gate.slot()
            if seconds >= 0:
                aim.chosen = provider
                # An operator may have set something meanwhile, the controls be old by now, or the provider be down.
                if not self._stopped(job, provider) and not gate.down:
                    return 0.0
                self.unused(send)
                return longer(job, HELD_SECONDS)
            self._gates.free_place(provider, aim.target.key, aim)
            waits.append(min(-seconds, gate.put_back_seconds_max))
            apart = apart and gate.apart
        seconds = min(waits)
        # Of a provider nothing more is taken meanwhile; jobs for an endpoint or a domain are handed out all the same.
        spread = seconds * random.uniform(1.0, 1.5)
        return max(spread, longer(job, min(seconds, WAIT_SECONDS_MAX))) if apart else spread

    def _stopped(self, job: Job, provider: Provider) -> bool:
        """Whether what operators have set by now forbids to send this by the provider."""
        return self._controlled(job) is not None or self._verdict(job, provider).effect != "go"

    def unused(self, send: Send) -> None:
        """Give the turn back: a probe that nobody makes would keep a breaker from closing, and a place would stay taken."""
        aim = _aim(send)
        if aim.chosen is not None:
            self._gates.free_place(aim.chosen, aim.target.key, aim)
            self._gates.of(aim.chosen, aim.target.key).unused()

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        """Try it by the provider whose turn was taken, and by others in order, where that one certainly did not take it."""
        aim = _aim(send)
        assert aim.chosen is not None, "who sends has taken a turn"
        end, outcome = time.monotonic() + deadline_seconds, await self._try(job, send, aim.chosen, deadline_seconds)
        behind = aim.providers[aim.providers.index(aim.chosen) + 1 :]
        for provider in behind:
            left = end - time.monotonic()
            if not outcome.elsewhere or left < ANOTHER_SECONDS:
                break
            # The first one may have taken half a minute to refuse, and an operator have set something meanwhile.
            if self._stopped(job, provider) or self._gates.take_place(provider, aim.target.key, aim):
                continue
            gate = self._gates.of(provider, aim.target.key)
            if await gate.enter(wait_seconds_max=0.0) != 0:
                self._gates.free_place(provider, aim.target.key, aim)
            elif self._stopped(job, provider):  # set while the bucket was asked
                self._gates.free_place(provider, aim.target.key, aim)
                gate.unused()
            else:
                outcome = await self._try(job, send, provider, left)
        return outcome

    async def _try(self, job: Job, send: Send, provider: Provider, deadline_seconds: float) -> Outcome:
        target, began, at = _aim(send).target, time.monotonic(), datetime.now(UTC)
        outcome = await attempts.in_time(
            provider.channel.send(
                send.rendered, target.of_channel, key=job.message_key, deadline_seconds=deadline_seconds
            ),
            deadline_seconds,
        )
        invalid_at = outcome.target_invalid_at or (at if outcome.kind == "target_invalid" else None)
        outcome = replace(
            outcome,
            provider=outcome.provider or provider.name,
            target_digest=target.fingerprint,
            target_invalid_at=invalid_at,
        )
        took_seconds = time.monotonic() - began
        attempts.tell(job, outcome, took_seconds)
        attempts.trace(self._spans, job, outcome, at)
        self._gates.free_place(provider, target.key, send.target)
        await self._gates.of(provider, target.key).told(outcome, retry=job.attempt > 0, seconds=took_seconds)
        if self._noted is not None:
            await self._noted(job, outcome, at)
        if self._fallback is not None and outcome.kind == "target_invalid":
            await self._escalate_if_last_token(job)
        return outcome

    async def _escalate_if_last_token(self, job: Job) -> None:
        """The token of this job is gone. If it was the user's last, what was to follow if nobody saw the push follows at once."""
        try:
            if self._fallback is not None and not await self._targets.has_other_token(job):
                await self._fallback(job)
        except (StoreUnavailable, BrokerError) as error:
            _log.warning("not_escalated_at_once", why=str(error)[:200])

    def slower(self, outcome: Outcome) -> float:
        """How much longer than usual a retry after this outcome waits."""
        found = [one for one in self._providers() if one.name == outcome.provider and outcome.kind != "ok"]
        return self._gates.of(found[0]).slower() if found else 1.0


def _aim(send: Send) -> Aim:
    assert isinstance(send.target, Aim), "what this desk sends it has aimed itself"
    return send.target


def _serving(providers: Sequence[Provider], target: Target) -> list[Provider]:
    """The providers that may send to a target: of push the first that is for the token's platform and app."""
    if not any(one.platform for one in providers):
        return list(providers)
    token: Any = target.of_channel
    fitting = [one for one in providers if one.platform == token.platform and (not one.apps or token.app in one.apps)]
    return fitting[:1]
