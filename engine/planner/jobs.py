"""The jobs that follow from a plan, and how they are cut into batches. Without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final, cast

import msgspec
from msgspec.structs import replace

from engine.broker.jetstream import Outgoing
from engine.channels.channel import Job, Lane
from engine.jobs.digests import digest_id
from engine.jobs.messages import message_of, schedule_of
from engine.limits import BATCH_BYTES_MAX, BATCH_MESSAGES_MAX
from engine.plan.decide import decide, wakes
from engine.plan.decisions import Decision, Inputs, Stage
from engine.plan.rules import Channel
from engine.planner.plans import Due
from seamark.protocol.events import INAPP

NEVER_THROTTLED: Final = Decision("never", "throttled")

_OVERHEAD_BYTES: Final = 256
"""What a message costs beside its payload, its headers and its subject."""


class Following(msgspec.Struct, frozen=True, gc=False):
    """What follows from a record in JOBS. `seq`, `trace`, `stored_at` (Unix nanoseconds): the record's."""

    seq: int
    messages: tuple[Outgoing, ...]
    trace: str | None = None
    stored_at: int = 0


def jobs_of(due: Due, inputs: Inputs, decisions: Mapping[str, Decision]) -> tuple[Outgoing, ...]:
    """The jobs of a notification: one for each channel that it goes by, now or later.

    A channel with several targets has one job, which its worker splits: which targets there are then is not known now.
    """
    made = _made(due, inputs, decisions)
    return tuple([message_of(job) if at is None else schedule_of(job, at) for job, at in made])


def throttled_of(due: Due, inputs: Inputs, decisions: Mapping[str, Decision]) -> list[Job]:
    """The jobs that there would be, had the tenant fewer waiting."""
    if not inputs.throttled or not any(one == NEVER_THROTTLED for one in decisions.values()):
        return []
    free = replace(inputs, throttled=False)
    others = {channel: decide(channel, free) for channel, one in decisions.items() if one == NEVER_THROTTLED}
    return [job for job, _ in _made(due, free, others)]


def _made(due: Due, inputs: Inputs, decisions: Mapping[str, Decision]) -> Iterator[tuple[Job, datetime | None]]:
    """Jobs, and when each is due; none: at once."""
    for channel, decision in decisions.items():
        if channel == INAPP or decision.when == "never":
            continue
        woken = wakes(decision, inputs)
        if woken is None:
            yield _job(due, inputs, channel, "first", inputs.now), None
        elif woken[0] == "digest":
            yield _digest(inputs, channel, decision, woken[1]), woken[1]
        else:
            yield _job(due, inputs, channel, *woken), woken[1]


def _job(due: Due, inputs: Inputs, channel: str, stage: Stage, first_at: datetime) -> Job:
    notification, rule = inputs.notification, inputs.rule
    return Job(
        id=notification.id,
        tenant=notification.tenant,
        user=notification.user,
        type=notification.type,
        channel=cast("Channel", channel),
        lane=_lane(inputs),
        stage=stage,
        semantics=(rule.semantics if rule is not None else None) or "at_least_once",
        first_at=first_at,
        expires_at=inputs.expires_at,
        category=inputs.category or "",
        collapse_key=due.collapse_key or "",
        data=due.data,  # as it stands in the record: nothing is gained by reading it here
        trace=due.trace or "",
        stored_at=due.stored_at,
        requested=notification.channels is not None,
        transaction=due.transaction[1] if due.transaction is not None else "",
    )


def _digest(inputs: Inputs, channel: str, decision: Decision, ends_at: datetime) -> Job:
    """The job that asks at the end of a window what belongs into it. Every record of the window makes the same one."""
    key = decision.when.partition(":")[2]
    return Job(
        id=digest_id(key),
        tenant=inputs.notification.tenant,
        user=inputs.notification.user,
        type="digest",
        channel=cast("Channel", channel),
        stage="digest",
        first_at=ends_at,
        category=inputs.category or "",
        digest=key,
    )


def _lane(inputs: Inputs) -> Lane:
    if inputs.critical:
        return "critical"
    return "bulk" if inputs.notification.priority == "low" else "normal"


def batches(following: Sequence[Following]) -> Iterator[list[Following]]:
    """Cut what follows from a round into batches. A record's jobs stay together."""
    batch: list[Following] = []
    size = count = 0
    for one in following:
        bytes_ = 0
        for each in one.messages:
            bytes_ += len(each.payload) + len(each.headers) + len(each.subject) + _OVERHEAD_BYTES
        if batch and (count + len(one.messages) >= BATCH_MESSAGES_MAX or size + bytes_ > BATCH_BYTES_MAX):
            yield batch
            batch, size, count = [], 0, 0
        batch.append(one)
        size, count = size + bytes_, count + len(one.messages)
    if batch:
        yield batch


def messages_of(batch: Iterable[Following]) -> list[Outgoing]:
    """The messages of a batch. A schedule stands once in it: others of its name say the same, as records of one digest do."""
    named = {one.subject if one.headers else (each.seq, one.subject): one for each in batch for one in each.messages}
    return list(named.values())
