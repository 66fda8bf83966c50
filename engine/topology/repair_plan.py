"""Where dispatchers go on when they cannot know it themselves: decided here from what was found, nothing is touched.

A mark counts in an incarnation of its source (EVENTS, BULK, LATER) and lies in one of its LOG, or of LATER. Dispatchers translate
one that is older where the streams' lineage says what it means (`engine.log.incarnations`). Else they stop, because only an
operator knows what the new incarnation holds. The operator names a position, and that is written; marks that can be read are
left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import msgspec

from engine.broker.answers import StreamState
from engine.dispatch.source import EVENTS, LATER_PLACE, SOURCES, EventSource, Place
from engine.errors import PartitionStopped, TopologyError
from engine.log.incarnations import RESTORED, continues, place_of, renumbered, translated, younger
from engine.log.marks import NO_MARK, Mark, PlacedMark
from engine.planner.position import repaired
from engine.topology.plan import Plan, Refusal, Step
from seamark.protocol.subjects import log_stream, plan_mark_subject

Position = int | Literal["mark", "first", "last"]
"""Where a partition goes on: after this event, where its mark stands, before the first event kept, or after the last."""

Positions = Mapping[int | None, Position]
"""The positions an operator names in one source: under None that of all partitions, and others for single ones."""


def parse_positions(texts: Sequence[str]) -> dict[str, Positions]:
    """Positions as written on a command line, by source: `first`, `last`, `mark`, `4711`, one partition's `3=4711`.

    Those of another source than EVENTS begin with its name: `BULK:first`, `BULK:3=4711`.

    Raises:
        TopologyError: a text has another form, or two of them name the same partition, or all.
    """
    others = "|".join(source.stream for source in SOURCES if source != EVENTS)
    positions: dict[str, dict[int | None, Position]] = {source.stream: {} for source in SOURCES}
    for text in texts:
        found = re.fullmatch(rf"(?:({others}):)?(?:([0-9]+)=)?(?:(mark|first|last)|([0-9]+))", text)
        if found is None:
            remedy = (
                f"Write first, last, mark or a sequence, or 3=<one of these>; for {others} its name and a colon before."
            )
            raise TopologyError(f"not a position: {text!r}", remedy)
        named = positions[found[1] or EVENTS.stream]
        position = cast(Position, found[3] or int(found[4]))
        if named.setdefault(int(found[2]) if found[2] else None, position) != position:
            raise TopologyError(f"{text!r} is not the only position for the same", "Name one for all, and exceptions.")
    return {**positions}


@dataclass(frozen=True, slots=True)
class Found:
    """What the server holds of one source, whose stream is `events`.

    `marks` are by (place, event partition); `recorded` are the epochs dispatchers expect.
    `planned` are the planners' marks in `jobs`, by the partition of their log.
    `late` are the marks whose last event in the present stream was stored after they were written: another event than they mean.
    """

    events: StreamState
    logs: Mapping[int, StreamState]
    marks: Mapping[tuple[Place, int], PlacedMark]
    recorded: Mapping[str, str]
    revision: int = 0
    late: frozenset[tuple[Place, int]] = frozenset()
    jobs: StreamState | None = None
    planned: Mapping[int, PlacedMark] = field(default_factory=dict)
    source: EventSource = EVENTS
    later: StreamState | None = None

    def stream(self, place: Place) -> StreamState:
        """The stream of a place that holds a mark."""
        found = self.later if place == LATER_PLACE else self.logs[place]
        assert found is not None
        return found

    def marks_of(self, event_partition: int) -> dict[Place, Mark]:
        """The marks of an event partition by the place they lie in."""
        return {p: at.mark for (p, q), at in self.marks.items() if q == event_partition and at.mark is not None}

    def named(self, event_partition: int) -> str:
        """An event partition as operators name it."""
        return f"partition {place_of(self.events.name)}{event_partition}"

    def known(self, place: Place, event_partition: int) -> Mark | None:
        """A mark in the present numbering of its source, if it still tells something."""
        mark = self.marks.get((place, event_partition), NO_MARK).mark
        return None if mark is None or (place, event_partition) in self.late else renumbered(mark, self.events)


def decide(founds: Sequence[Found], positions: Mapping[str, Positions], owner: str) -> Plan:
    """The marks and recorded epochs to write, so that every dispatcher can start.

    Args:
        founds: what the server holds of each source. The first also says what it holds of the planners.
        positions: what the operator names, by source.
        owner: written into every mark, so that no process takes one for its own.
    """
    found = founds[0]
    streams = {each.events.name: each.events for each in founds} | {log_stream(p): at for p, at in found.logs.items()}
    if lacking := [name for name, stream in streams.items() if stream.epoch is None]:
        refusal = Refusal("epochs", f"{', '.join(lacking)} without epoch", "Run seamark topology apply first.")
        return Plan("", refusals=(refusal,))
    outcomes = [each for of in founds for each in _source(of, positions.get(of.events.name, {}), owner)]
    outcomes += _planning(found)
    notes = [*_log_notes(found), *(each for each in outcomes if isinstance(each, str))]
    refusals = [each for each in outcomes if isinstance(each, Refusal)]
    steps = [each for each in outcomes if isinstance(each, Step)]
    epochs = {**found.recorded, **{name: stream.epoch for name, stream in streams.items()}}
    recorded = {name: found.recorded.get(name, "none") for name in epochs}
    if why := [f"{name} {recorded[name]} -> {now}" for name, now in epochs.items() if recorded[name] != now]:
        steps.append(Step("replace_epochs", "epochs", tuple(why), epochs, {"seq": found.revision}))
    return Plan("nothing to repair", tuple(steps), tuple(refusals), tuple(notes))


def _source(found: Found, positions: Positions, owner: str) -> Iterator[Step | Refusal | str]:
    everywhere = positions.get(None, "mark")
    for q in found.logs:
        yield from _partition(found, q, positions.get(q, everywhere), owner)
    for q in sorted(q for q in positions if q is not None and q not in found.logs):
        yield Refusal(found.named(q), "there is no such event partition", "Name those there are.")


def _partition(found: Found, q: int, position: Position, owner: str) -> Iterator[Step | Refusal | str]:
    """Foreign marks first and the home mark last, as in every round. Marks that dispatchers can read are left alone."""
    try:
        home = _home(found, q, position)
    except PartitionStopped as error:
        yield Refusal(found.named(q), error.detail, error.remedy)
        return
    if home is None:
        if found.events.last_seq:
            yield f"{found.named(q)} has no mark: it starts at the first event"
        return
    marks = found.marks_of(q)
    yield from _partition_notes(found, q, home, marks.get(q))
    # Every owner begins with the home mark's term plus one: were it below a foreign mark's, it would step down for ever.
    term = max((mark.term for mark in marks.values()), default=0) + 1
    for p in (*sorted(marks.keys() - {q}, key=str), q):
        known, log = found.known(p, q), found.stream(p)
        sound = known is not None and continues(log, known.stream_epoch)
        if sound and (p != q or (position == "mark" and marks[q].term >= term - 1)):
            continue
        # Of events beyond `home` a foreign mark may tell which are applied; one that cannot be read tells nothing.
        start = msgspec.structs.replace(home, seq=home.next_seq - 1, user=None, unburied=None, refused=None)
        at = home if p == q else known or start
        after = msgspec.structs.replace(at, term=term, owner=owner, stream_epoch=log.epoch or "")
        before = {"seq": found.marks.get((p, q), NO_MARK).seq}
        why = (f"{_shown(marks.get(p), found)} -> {_shown(after, found)}",)
        yield Step("write_mark", found.source.marked(p, q).subject, why, msgspec.to_builtins(after), before)


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
        PartitionStopped: that has to be named, or the source was put back to a backup and still has the epoch of before: then no
            position would make its marks mean anything.
    """
    events, log, placed = found.events, found.logs[q], found.marks.get((q, q), NO_MARK)
    for p, mark in found.marks_of(q).items():
        if mark.epoch == events.epoch and mark.seq > events.last_seq:
            detail = f"{found.source.marked(p, q).subject} is at event {mark.seq}, and {events.name} ends at {events.last_seq}"
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
        raise PartitionStopped(f"{events.name} ends at {events.last_seq}, before {seq}", "Name last instead.")
    left = found.known(q, q) or Mark(events.epoch or "", seq, 0, "", "")
    return msgspec.structs.replace(left.up_to(seq), seq=seq, user=None)


def _shown(mark: Mark | None, found: Found) -> str:
    if mark is None:
        return "no mark"
    partly = f", users up to {mark.user}" if mark.user is not None else ""
    partly += f", dead letters missing from event {mark.unburied} on" if mark.unburied is not None else ""
    return (
        f"event {mark.seq}{partly} of {found.events.name} {mark.epoch} in stream {mark.stream_epoch}, term {mark.term}"
    )


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
        yield f"{found.named(q)}: events {home.next_seq} to {events.first_seq - 1} are no longer in {events.name}"
    if mark and known and known.seq < mark.seq:
        yield f"{found.named(q)}: events {known.seq + 1} to {mark.seq} were dispatched, but are not in the restored {events.name}"
    if known and home.next_seq < known.next_seq:
        yield f"{found.named(q)}: events {home.next_seq} to {known.next_seq - 1} are dispatched again; their records come twice"
