"""Where dispatchers go on when they cannot know it themselves: decided here from what was found, nothing is touched.

A mark counts in an incarnation of EVENTS and lies in an incarnation of its LOG. Dispatchers translate one that is older where
the streams' lineage says what it means (`engine.log.incarnations`). Else they stop, because only an operator knows what the new
incarnation holds. The operator names a position, and that is written; marks that can be read are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import msgspec

from engine.broker.answers import StreamState
from engine.errors import PartitionStopped, TopologyError
from engine.log.incarnations import RESTORED, continues, renumbered, translated, younger
from engine.log.marks import NO_MARK, Mark, PlacedMark
from engine.planner.position import repaired
from engine.topology.plan import Plan, Refusal, Step
from seamark.protocol.subjects import EVENTS_STREAM, log_stream, mark_subject, plan_mark_subject

Position = int | Literal["mark", "first", "last"]
"""Where a partition goes on: after this event, where its mark stands, before the first event kept, or after the last."""

Positions = Mapping[int | None, Position]
"""The positions an operator names: under None that of all partitions, and others for single ones."""


def parse_positions(texts: Sequence[str]) -> Positions:
    """Positions as written on a command line: `first`, `last`, `mark`, `4711`, or one partition's `3=4711`.

    Raises:
        TopologyError: a text has another form, or two of them name the same partition, or all.
    """
    positions: dict[int | None, Position] = {}
    for text in texts:
        found = re.fullmatch(r"(?:([0-9]+)=)?(?:(mark|first|last)|([0-9]+))", text)
        if found is None:
            remedy = "Write first, last, mark or a sequence, or 3=<one of these>."
            raise TopologyError(f"not a position: {text!r}", remedy)
        position = cast(Position, found[2] or int(found[3]))
        if positions.setdefault(int(found[1]) if found[1] else None, position) != position:
            raise TopologyError(f"{text!r} is not the only position for the same", "Name one for all, and exceptions.")
    return positions


@dataclass(frozen=True, slots=True)
class Found:
    """What the server holds. `marks` by (LOG partition, event partition); `recorded` are the epochs dispatchers expect.

    `planned` are the planners' marks in `jobs`, by the partition of their log.
    `late` are the marks whose last event in the present EVENTS was stored after they were written: another event than they mean.
    """

    events: StreamState
    logs: Mapping[int, StreamState]
    marks: Mapping[tuple[int, int], PlacedMark]
    recorded: Mapping[str, str]
    revision: int = 0
    late: frozenset[tuple[int, int]] = frozenset()
    jobs: StreamState | None = None
    planned: Mapping[int, PlacedMark] = field(default_factory=dict)

    def marks_of(self, event_partition: int) -> dict[int, Mark]:
        """The marks of an event partition by the partition of the LOG they lie in."""
        return {p: at.mark for (p, q), at in self.marks.items() if q == event_partition and at.mark is not None}

    def known(self, partition: int, event_partition: int) -> Mark | None:
        """A mark in the present numbering of EVENTS, if it still tells something."""
        mark = self.marks.get((partition, event_partition), NO_MARK).mark
        return None if mark is None or (partition, event_partition) in self.late else renumbered(mark, self.events)


def decide(found: Found, positions: Positions, owner: str) -> Plan:
    """The marks and recorded epochs to write, so that every dispatcher can start.

    Args:
        found: what the server holds.
        positions: what the operator names.
        owner: written into every mark, so that no process takes one for its own.
    """
    streams = {EVENTS_STREAM: found.events} | {log_stream(p): log for p, log in found.logs.items()}
    if lacking := [name for name, stream in streams.items() if stream.epoch is None]:
        refusal = Refusal("epochs", f"{', '.join(lacking)} without epoch", "Run seamark topology apply first.")
        return Plan("", refusals=(refusal,))
    everywhere = positions.get(None, "mark")
    outcomes = [each for q in found.logs for each in _partition(found, q, positions.get(q, everywhere), owner)]
    outcomes += _planning(found)
    notes = [*_log_notes(found), *(each for each in outcomes if isinstance(each, str))]
    refusals = [each for each in outcomes if isinstance(each, Refusal)]
    refusals += [
        Refusal(f"partition {q}", "there is no such event partition", "Name those there are.")
        for q in sorted(q for q in positions if q is not None and q not in found.logs)
    ]
    steps = [each for each in outcomes if isinstance(each, Step)]
    epochs = {**found.recorded, **{name: stream.epoch for name, stream in streams.items()}}
    recorded = {name: found.recorded.get(name, "none") for name in epochs}
    if why := [f"{name} {recorded[name]} -> {now}" for name, now in epochs.items() if recorded[name] != now]:
        steps.append(Step("replace_epochs", "epochs", tuple(why), epochs, {"seq": found.revision}))
    return Plan("nothing to repair", tuple(steps), tuple(refusals), tuple(notes))


def _partition(found: Found, q: int, position: Position, owner: str) -> Iterator[Step | Refusal | str]:
    """Foreign marks first and the home mark last, as in every round. Marks that dispatchers can read are left alone."""
    try:
        home = _home(found, q, position)
    except PartitionStopped as error:
        yield Refusal(f"partition {q}", error.detail, error.remedy)
        return
    if home is None:
        yield f"partition {q} has no mark: it starts at the first event"
        return
    marks = found.marks_of(q)
    yield from _partition_notes(found, q, home, marks.get(q))
    # Every owner begins with the home mark's term plus one: were it below a foreign mark's, it would step down for ever.
    term = max((mark.term for mark in marks.values()), default=0) + 1
    for p in (*sorted(marks.keys() - {q}), q):
        known, log = found.known(p, q), found.logs[p]
        sound = known is not None and continues(log, known.stream_epoch)
        if sound and (p != q or (position == "mark" and marks[q].term >= term - 1)):
            continue
        # Of events beyond `home` a foreign mark may tell which are applied; one that cannot be read tells nothing.
        at = home if p == q else known or msgspec.structs.replace(home, seq=home.next_seq - 1, user=None, unburied=None)
        after = msgspec.structs.replace(at, term=term, owner=owner, stream_epoch=log.epoch or "")
        before = {"seq": found.marks.get((p, q), NO_MARK).seq}
        why = (f"{_shown(marks.get(p))} -> {_shown(after)}",)
        yield Step("write_mark", mark_subject(p, q), why, msgspec.to_builtins(after), before)


def _planning(found: Found) -> Iterator[Step | str]:
    """A log that was made anew holds nothing that was planned, and what it holds by now was most likely planned before."""
    if found.jobs is None:
        return
    for p, placed in found.planned.items():
        log, subject = found.logs[p], plan_mark_subject(p)
        try:
            after = repaired(placed, log, found.jobs)
        except PartitionStopped as error:
            yield f"{subject}: {error}"
            continue
        if after is not None:
            why = f"planning goes on behind record {after.seq} of {log.name} {log.epoch}"
            yield Step("write_mark", subject, (why,), msgspec.to_builtins(after), {"seq": placed.seq})


def _home(found: Found, q: int, position: Position) -> Mark | None:
    """Where event partition `q` goes on, in the present numbering; None: there is no mark, and none is needed.

    Raises:
        PartitionStopped: that has to be named, or EVENTS was put back to a backup and still has the epoch of before: then no
            position would make its marks mean anything.
    """
    events, log, placed = found.events, found.logs[q], found.marks.get((q, q), NO_MARK)
    for p, mark in found.marks_of(q).items():
        if mark.epoch == events.epoch and mark.seq > events.last_seq:
            detail = f"{mark_subject(p, q)} is at event {mark.seq}, and EVENTS ends at {events.last_seq}"
            raise PartitionStopped(detail, RESTORED.format(events.name))
        if position == "mark" and (p, q) in found.late and (p == q or mark.epoch == events.epoch):
            raise younger(q, events.name, mark, renumbered(mark, events) or mark)
    if position == "mark":
        held = placed.mark
        if held is not None:  # who repairs says that the LOG is the one whose marks it holds
            held = msgspec.structs.replace(held, stream_epoch=log.epoch or "")
        try:
            return translated(PlacedMark(placed.seq, held), q, events, log, found.recorded)
        except PartitionStopped as error:
            reach = max((known.seq for p in found.logs if (known := found.known(p, q))), default=0)
            hint = f". Its marks in other logs reach event {reach}" if reach and held is None else ""
            raise PartitionStopped(error.detail, error.remedy + hint) from error
    seq = {"first": max(0, events.first_seq - 1), "last": events.last_seq}.get(str(position), position)
    assert isinstance(seq, int)
    if seq > events.last_seq:
        raise PartitionStopped(f"EVENTS ends at {events.last_seq}, before {seq}", "Name last instead.")
    left = found.known(q, q) or Mark(events.epoch or "", seq, 0, "", "")
    return msgspec.structs.replace(left.up_to(seq), seq=seq, user=None)


def _shown(mark: Mark | None) -> str:
    if mark is None:
        return "no mark"
    partly = f", users up to {mark.user}" if mark.user is not None else ""
    partly += f", dead letters missing from event {mark.unburied} on" if mark.unburied is not None else ""
    return f"event {mark.seq}{partly} of EVENTS {mark.epoch} in LOG {mark.stream_epoch}, term {mark.term}"


def _log_notes(found: Found) -> Iterator[str]:
    for log in found.logs.values():
        if found.recorded.get(log.name, log.epoch) != log.epoch:
            yield (
                f"{log.name} is another incarnation than recorded: what events of other partitions had added to it "
                "since the backup is missing, and comes back only by naming an earlier position for those partitions"
            )


def _partition_notes(found: Found, q: int, home: Mark, mark: Mark | None) -> Iterator[str]:
    events, known = found.events, found.known(q, q)
    if home.next_seq < events.first_seq:
        yield f"partition {q}: events {home.next_seq} to {events.first_seq - 1} are no longer in EVENTS"
    if mark and known and known.seq < mark.seq:
        yield f"partition {q}: events {known.seq + 1} to {mark.seq} were dispatched, but are not in the restored EVENTS"
    if known and home.next_seq < known.next_seq:
        yield f"partition {q}: events {home.next_seq} to {known.next_seq - 1} are dispatched again; their records come twice"
