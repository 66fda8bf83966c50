"""The jobs that follow from a plan, and how they are cut into batches. Without I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

from engine.broker.jetstream import Outgoing
from engine.channels.channel import Job, Lane
from engine.jobs.messages import message_of, schedule_of
from engine.limits import BATCH_BYTES_MAX, BATCH_MESSAGES_MAX
from engine.plan.decide import wakes
from engine.plan.decisions import Decision, Inputs, Stage
from engine.plan.rules import Channel
from engine.planner.plans import Due
from seamark.protocol.events import INAPP

DIGEST: Final = "digest/"
"""What the id of a digest's job begins with. It goes on with the digest's key: its category and the end of its window."""

_OVERHEAD_BYTES: Final = 256
"""What a message costs beside its payload, its headers and its subject."""


class Following(NamedTuple):
    """What follows from a record in JOBS. `seq`: the record's."""

    seq: int
    messages: tuple[Outgoing, ...]


def jobs_of(due: Due, inputs: Inputs, decisions: Mapping[str, Decision]) -> Iterator[Outgoing]:
    """The jobs of a notification: one for each channel that it goes by, now or later.

    A channel with several targets has one job, which its worker splits: which targets there are then is not known now.
    """
    for channel, decision in decisions.items():
        if channel == INAPP or decision.when == "never":
            continue
        woken = wakes(decision, inputs)
        if woken is None:
            yield message_of(_job(due, inputs, channel, "first", inputs.now))
        elif woken[0] == "digest":
            yield schedule_of(_digest(inputs, channel, decision, woken[1]), woken[1])
        else:
            yield schedule_of(_job(due, inputs, channel, *woken), woken[1])


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
        data=cast("dict[str, Any]", due.data),  # as it stands in the record: nothing is gained by reading it here
        trace=due.trace or "",
        stored_at=due.stored_at,
        requested=notification.channels is not None,
        transaction=due.transaction[1] if due.transaction is not None else "",
    )


def _digest(inputs: Inputs, channel: str, decision: Decision, ends_at: datetime) -> Job:
    """The job that asks at the end of a window what belongs into it. Every record of the window makes the same one."""
    return Job(
        id=DIGEST + decision.when.partition(":")[2],
        tenant=inputs.notification.tenant,
        user=inputs.notification.user,
        type="digest",
        channel=cast("Channel", channel),
        stage="digest",
        first_at=ends_at,
        category=inputs.category or "",
    )


def _lane(inputs: Inputs) -> Lane:
    if inputs.critical:
        return "critical"
    return "bulk" if inputs.notification.priority == "low" else "normal"


def batches(following: Sequence[Following], end_seq: int) -> Iterator[tuple[int, list[Outgoing]]]:
    """Cut what follows from a round into batches, each with the record up to which it covers them. A record's jobs stay together.

    `end_seq`: the last record of the round, which the last batch covers.

    A schedule stands once in a batch. Others that would have its name say the same: records of one digest.
    """
    batch: dict[object, Outgoing] = {}
    size, reached = 0, 0
    for seq, messages in following:
        bytes_ = sum(len(one.payload) + len(one.headers) + len(one.subject) + _OVERHEAD_BYTES for one in messages)
        if batch and (len(batch) + len(messages) >= BATCH_MESSAGES_MAX or size + bytes_ > BATCH_BYTES_MAX):
            yield reached, list(batch.values())
            batch, size = {}, 0
        for one in messages:
            batch[one.subject if one.headers else (seq, one.subject)] = one
        size, reached = size + bytes_, seq
    if batch:
        yield end_seq, list(batch.values())
