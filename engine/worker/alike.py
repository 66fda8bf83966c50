"""Jobs that are alike are decided about once: most are sent now, and that depends on no moment and no name."""

from __future__ import annotations

from typing import Final, NamedTuple

from engine.channels.channel import Job
from engine.directory.rules import TenantRules
from engine.plan.decide import has_moments
from engine.plan.decisions import Decision, Inputs
from engine.plan.profile import Profile
from engine.worker.caps import cap_of

KEPT_MAX: Final = 1024
"""Kinds of jobs that are remembered of a channel. Beyond that all are forgotten, and decided about anew."""


class Sent(NamedTuple):
    """What is remembered of a kind: its jobs are sent now.

    Attributes:
        category: of their notifications.
        held: the rules and the profile that this was decided from. Kinds are told apart by the identity of these objects, so they
            are kept alive.
    """

    category: str | None
    held: tuple[TenantRules, Profile]


class Alike:
    """The kinds of jobs that are sent now. What makes a kind: type, category, lane, who chose the channel, rules, profile.

    Nothing is remembered of what ends by itself, was cancelled or noticed, of caps, and of users whom a kill switch is set for.
    """

    def __init__(self) -> None:
        self._kept: dict[object, Sent] = {}

    def of(self, job: Job, rules: TenantRules, profile: Profile) -> Sent | None:
        """What was decided about jobs like this one, which has nothing of its own; None: nothing that would hold for it."""
        return None if job.expires_at is not None else self._kept.get(_kind(job, rules, profile))

    def keep(self, job: Job, rules: TenantRules, profile: Profile, inputs: Inputs, decision: Decision) -> None:
        """Remember what was decided, if it holds for others, and at any time."""
        capped = cap_of(inputs, job.channel) is not None
        if decision.when != "now" or capped or inputs.expires_at is not None or has_moments(inputs):
            return
        if len(self._kept) >= KEPT_MAX:
            self._kept.clear()
        self._kept[_kind(job, rules, profile)] = Sent(inputs.category, (rules, profile))


def _kind(job: Job, rules: TenantRules, profile: Profile) -> object:
    return job.type, job.category, job.lane, job.requested, id(rules), id(profile)
