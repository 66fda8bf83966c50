"""What a try's outcome leads to: an end, or another try, and when. Pure; the numbers are data, one row for each channel."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec

from engine.channels.channel import Job, Outcome, OutcomeKind
from engine.channels.webhook.schedule import DELAYS_SECONDS, JITTER, THROTTLED_SECONDS_MIN
from engine.jobs.claims import Done, End, Leased, Waiting
from engine.plan.rules import Channel


class RetryPolicy(msgspec.Struct, frozen=True):
    """How often and how long a channel tries again.

    Args:
        delays_seconds: the longest pause before each further try: so many tries there are at most, and the first.
        shares: the pause is drawn between these shares of it: (0, 1) is full jitter, after which whoever failed together
            never comes back together.
        horizon_seconds: later than this after the first try there is no other.
        throttled_seconds_min: who is overloaded is left alone for so long, and what he asks for counts up to twice the pause, if
            that is longer; 0: he is waited for as he asks.
    """

    delays_seconds: tuple[float, ...]
    shares: tuple[float, float]
    horizon_seconds: float
    throttled_seconds_min: float = 0.0

    @property
    def tries_max(self) -> int:
        """Never is a job tried more often, those tries included of which nobody knows the end."""
        return len(self.delays_seconds) + 1

    def pause_seconds(
        self,
        attempt: int,
        draw: float,
        *,
        slower: float = 1.0,
        retry_after_seconds: float | None = None,
        throttled: bool = False,
    ) -> float:
        """How long to wait before try number `attempt` (the first is 0).

        Args:
            draw: 0 ≤ draw < 1, random.
            slower: how much longer than usual, as far as it leaves time for other tries.
            retry_after_seconds: what the provider asks for wins: it is waited for in full, and up to a tenth more, because it
                has said the same to everybody.
            throttled: it was too much for him.
        """
        longest = self.delays_seconds[min(attempt, len(self.delays_seconds)) - 1]
        low, high = self.shares
        pause = longest * (low + draw * (high - low))
        if throttled and self.throttled_seconds_min:
            least = self.throttled_seconds_min
            asked = min(retry_after_seconds or 0.0, 2 * max(least, longest))
            # Chance only adds to what was asked for: earlier would be against the endpoint's word.
            return max(pause, max(least, asked) * (1 + draw / 10))
        if retry_after_seconds is not None:
            return max(0.0, retry_after_seconds) * (1 + draw / 10)
        return max(pause, min(pause * slower, self.horizon_seconds / 4))


def _growing(first_seconds: float, factor: float, longest_seconds: float, tries: int) -> tuple[float, ...]:
    return tuple(min(longest_seconds, first_seconds * factor**number) for number in range(tries - 1))


_HOUR: Final = 3600.0

POLICIES: Final[dict[Channel, RetryPolicy]] = {
    # FCM wants 10 s before the first retry and an end after 60 minutes (firebase.google.com/docs/cloud-messaging/scale-fcm).
    "push": RetryPolicy(_growing(20, 2, 600, 9), (0.5, 1), _HOUR),
    # About 19 tries in 72 h, as mail servers do: RFC 5321 section 4.5.4.1 asks for 30 minutes between tries and 4 to 5 days.
    "email": RetryPolicy(_growing(300, 1.8, 6 * _HOUR, 19), (0.8, 1), 72 * _HOUR),
    # Three tries in a day: an SMS costs money each time.
    "sms": RetryPolicy((60, 4 * _HOUR), (0, 1), 24 * _HOUR),
    "webhook": RetryPolicy(DELAYS_SECONDS, (1 - JITTER, 1 + JITTER), 96 * _HOUR, THROTTLED_SECONDS_MIN),
}

BUSY_PAUSE_SECONDS: Final = 30.0
"""How long a job waits for which no connection to its provider was free; and up to as long again."""

CONFIG_PAUSE_SECONDS: Final = 300.0
"""How long a job waits while our key or set-up is wrong. A person has to mend it; the breaker tries it with one job at a time."""

_ENDS: Final[dict[OutcomeKind, End]] = {
    "ok": "sent",
    "permanent": "failed",
    "target_invalid": "failed",
    "opted_out": "suppressed",
    "expired": "expired",
}


def settle(
    job: Job,
    lease: Leased,
    outcome: Outcome,
    policy: RetryPolicy,
    now: datetime,
    draw: float,
    *,
    repeatable: bool,
    slower: float = 1.0,
) -> Waiting | Done:
    """What follows from a try.

    Args:
        lease: under which it was tried.
        now: when it ended.
        draw: 0 ≤ draw < 1, random.
        repeatable: whether it may be tried again although the provider may have taken it.
        slower: how much longer than usual to wait.
    """
    ended = _ENDS.get(outcome.kind)
    if ended is None and (outcome.kind != "ambiguous" or repeatable):
        waiting = _waiting(job, lease, outcome, policy, now, draw, slower)
        if waiting is not None:
            return waiting
    return _done(job, lease, outcome, ended or "failed")


def _waiting(
    job: Job, lease: Leased, outcome: Outcome, policy: RetryPolicy, now: datetime, draw: float, slower: float
) -> Waiting | None:
    """The next try; None: there is none left, or no time for one."""
    # What the target itself brings about costs attempts: there is nobody who mends it.
    ours = outcome.kind == "config" and outcome.scope != "target"
    uncounted = ours or not outcome.begun
    attempt = lease.attempt if uncounted else lease.attempt + 1
    retries_max = (
        policy.tries_max - 1 if outcome.retries_max is None else min(outcome.retries_max, policy.tries_max - 1)
    )
    if not uncounted and attempt + lease.lost > retries_max:
        return None
    tried_at = job.tried_at or now
    pause = (
        (CONFIG_PAUSE_SECONDS if ours else BUSY_PAUSE_SECONDS) * (1 + draw)
        if uncounted
        else policy.pause_seconds(
            attempt,
            draw,
            slower=slower,
            retry_after_seconds=outcome.retry_after_seconds,
            throttled=outcome.kind == "throttled",
        )
    )
    due = in_milliseconds(now + timedelta(seconds=pause))
    over = tried_at + timedelta(seconds=policy.horizon_seconds)
    if due >= over or (job.expires_at is not None and due >= job.expires_at):
        return None
    doubt = lease.doubt or outcome.kind == "ambiguous"
    return Waiting(attempt, due, tried_at, outcome, lease.lost, doubt, lease.members)


def _done(job: Job, lease: Leased, outcome: Outcome, end: End) -> Done:
    if end != "sent" and (lease.doubt or outcome.kind == "ambiguous"):
        # An earlier try may have been taken: to say `failed` would be to know better.
        end = "ambiguous"
    return Done(lease.attempt, end, outcome.code or outcome.kind, outcome, lease.members)


def in_milliseconds(moment: datetime) -> datetime:
    """The moment as names of schedules and their headers have it, so that it is the same wherever it is read."""
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


PUT_BACK_SECONDS_MAX: Final = 60.0
"""How long a job is put back for at most, and up to half as long again. Each time the whole job is written anew."""


def put_back_seconds(put_backs: int, first_seconds: float, draw: float) -> float:
    """How long to put back a job that waits for nobody knows how long: twice as long as the last time, up to a minute.

    Args:
        put_backs: how often it was put back before in this attempt.
        first_seconds: how long the first time.
        draw: 0 ≤ draw < 1, random: many that wait for the same thing do not come back together.
    """
    return min(PUT_BACK_SECONDS_MAX, first_seconds * 2.0 ** min(put_backs, 16)) * (1 + draw / 2)
