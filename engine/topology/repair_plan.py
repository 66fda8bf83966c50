"""Where dispatchers go on after streams were restored or re-created: decided here from what was found, nothing is touched.

A mark counts in an incarnation of EVENTS and lies in an incarnation of its LOG. When one of them has changed, dispatchers
stop, because only an operator knows what the new incarnation still holds. The operator names a position for each event
partition; what still means something is kept, what does not is set to that position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from msgspec import to_builtins

from engine.errors import TopologyError
from engine.log.marks import NO_MARK, Mark, PlacedMark
from engine.topology.plan import ObservedStream, Refusal
from seamark.protocol.subjects import EVENTS_STREAM, log_stream, mark_subject

Position = int | Literal["mark", "first", "last"]
"""Where a partition goes on: after this event, where its mark stands, before the first event kept, or after the last."""

WORDS: Final = ("mark", "first", "last")


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions an operator names: one for all, others for single event partitions."""

    everywhere: Position = "mark"
    single: Mapping[int, Position] = field(default_factory=dict)

    def of(self, event_partition: int) -> Position:
        """The position of one event partition."""
        return self.single.get(event_partition, self.everywhere)

    def named(self, event_partition: int) -> bool:
        """Whether more was said than to go on where the mark stands."""
        return self.of(event_partition) != "mark"


def parse_positions(texts: Sequence[str]) -> Positions:
    """Positions as written on a command line: `first`, `last`, `mark`, `4711`, or one partition's `3=4711`.

    Raises:
        TopologyError: a text has another form, or two of them name the same partition.
    """
    everywhere: list[Position] = []
    single: dict[int, Position] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if (value not in WORDS and not value.isdecimal()) or (equals and not name.isdecimal()):
            raise TopologyError(
                f"not a position: {text!r}", "Write first, last, mark or a sequence, or 3=<one of these>."
            )
        position: Position = value if value in WORDS else int(value)  # type: ignore[assignment]
        if not equals:
            everywhere.append(position)
        elif single.setdefault(int(name), position) != position:
            raise TopologyError(f"partition {name} is named twice", "Name each partition once.")
    if len(set(everywhere)) > 1:
        raise TopologyError("two positions are named for all partitions", "Name one, and the exceptions as 3=4711.")
    return Positions(everywhere[0] if everywhere else "mark", single)


@dataclass(frozen=True, slots=True)
class Found:
    """What the server holds. `marks` by (LOG partition, event partition); `recorded` are the epochs dispatchers expect.

    `late` are the marks whose last event in the present EVENTS (`covered`) was stored after they were written: another
    event than they mean.
    """

    partitions: int
    events: ObservedStream
    logs: Mapping[int, ObservedStream]
    marks: Mapping[tuple[int, int], PlacedMark]
    recorded: Mapping[str, str]
    revision: int = 0
    late: frozenset[tuple[int, int]] = frozenset()

    def covered(self, partition: int, event_partition: int) -> int:
        """The last event of the present EVENTS that a mark tells to be dispatched; 0: it tells of none."""
        mark = self.mark(partition, event_partition).mark
        if mark is None:
            return 0
        last = self.events.last_seq if mark.epoch == self.events.epoch else self.events.inherited.get(mark.epoch, 0)
        return min(mark.seq, last)

    def mark(self, partition: int, event_partition: int) -> PlacedMark:
        """A mark, or none."""
        return self.marks.get((partition, event_partition), NO_MARK)

    def epochs(self) -> dict[str, str]:
        """The epochs the streams carry now."""
        streams = {EVENTS_STREAM: self.events} | {log_stream(p): log for p, log in self.logs.items()}
        return {name: stream.epoch for name, stream in streams.items() if stream.epoch is not None}


@dataclass(frozen=True, slots=True)
class MarkStep:
    """A mark to write in place of the one that was found."""

    partition: int
    event_partition: int
    before: PlacedMark
    after: Mark

    @property
    def subject(self) -> str:
        """Where it is written."""
        return mark_subject(self.partition, self.event_partition)

    def line(self) -> str:
        """The step for people."""
        return f"~ {self.subject}: {_told(self.before.mark)} -> {_told(self.after)}"


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair would do.

    `inherited` are the earlier incarnations of EVENTS whose numbers still hold, each up to a sequence; `next_seqs` is the
    first event each event partition dispatches afterwards.
    """

    events_epoch: str
    inherited: Mapping[str, int] = field(default_factory=dict)
    marks: tuple[MarkStep, ...] = ()
    epochs_before: Mapping[str, str] = field(default_factory=dict)
    epochs_after: Mapping[str, str] = field(default_factory=dict)
    revision: int = 0
    next_seqs: Mapping[int, int] = field(default_factory=dict)
    claims: Literal["replayed", "all", "none"] = "replayed"
    stale_claims: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to repair."""
        return not (self.marks or self.refusals or self.stale_claims or self.epochs_before != self.epochs_after)

    def lines(self) -> list[str]:
        """The plan for people: all of it, before anything is done."""
        lines = [f"- {self.stale_claims} claim(s) of another incarnation of EVENTS"] if self.stale_claims else []
        lines += [step.line() for step in self.marks]
        for name, epoch in self.epochs_after.items():
            if self.epochs_before.get(name) != epoch:
                lines.append(f"~ recorded epoch of {name}: {self.epochs_before.get(name, 'none')} -> {epoch}")
        lines += [refusal.line() for refusal in self.refusals]
        lines += [f"# {note}" for note in self.notes]
        return lines or ["nothing to repair"]

    def to_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "marks": [
                {"subject": step.subject, "before": to_builtins(step.before.mark), "after": to_builtins(step.after)}
                for step in self.marks
            ],
            "epochs": {"before": dict(self.epochs_before), "after": dict(self.epochs_after)},
            "next": {str(q): seq for q, seq in self.next_seqs.items()},
            "stale_claims": self.stale_claims,
            "refusals": [{"target": r.target, "detail": r.detail, "remedy": r.remedy} for r in self.refusals],
            "notes": list(self.notes),
        }


def _told(mark: Mark | None) -> str:
    if mark is None:
        return "no mark"
    partly = f", users up to {mark.user}" if mark.user is not None else ""
    partly += f", dead letters missing from event {mark.unburied} on" if mark.unburied is not None else ""
    return f"event {mark.seq}{partly} of EVENTS {mark.epoch} in LOG {mark.stream_epoch}, term {mark.term}"


def decide(found: Found, positions: Positions, owner: str) -> RepairPlan:
    """The marks and recorded epochs that let every dispatcher start at its position.

    Args:
        found: what the server holds.
        positions: what the operator names.
        owner: written into every mark, so that no process takes one for its own.
    """
    events_epoch = found.events.epoch
    lacking = [name for name in _names(found) if name not in found.epochs()]
    if events_epoch is None or lacking:
        detail = f"{', '.join(lacking or [EVENTS_STREAM])} without epoch or missing"
        return RepairPlan("", refusals=(Refusal("epochs", detail, "Run seamark topology apply first."),))
    steps: list[MarkStep] = []
    refusals: list[Refusal] = []
    notes: list[str] = list(_log_notes(found))
    next_seqs: dict[int, int] = {}
    for q in range(found.partitions):
        home = _set_back(found, q, named=positions.named(q)) or _home(found, q, positions.of(q))
        if isinstance(home, Refusal):
            refusals.append(home)
            continue
        next_seqs[q] = home.next_seq if home else found.events.first_seq
        notes += _partition_notes(found, q, home)
        steps += _steps(found, q, home, positions.named(q), owner)
    if unknown := sorted(set(positions.single) - set(range(found.partitions))):
        refusals.append(Refusal(f"partition {unknown[0]}", "there is no such event partition", "Name those there are."))
    return RepairPlan(
        events_epoch,
        found.events.inherited,
        tuple(steps),
        epochs_before=found.recorded,
        epochs_after=dict(found.recorded) | found.epochs(),
        revision=found.revision,
        next_seqs=next_seqs,
        refusals=tuple(refusals),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Point:
    """A position in the present numbering of EVENTS."""

    seq: int
    user: str | None = None

    @property
    def next_seq(self) -> int:
        return self.seq if self.user is not None else self.seq + 1


def _names(found: Found) -> Iterator[str]:
    yield EVENTS_STREAM
    yield from (log_stream(p) for p in range(found.partitions))


def _set_back(found: Found, q: int, *, named: bool) -> Refusal | None:
    """EVENTS was put back to a backup and still has the epoch of before: no position would make its marks mean anything.

    That an event is younger than its mark may also come from clocks that disagree: whoever knows so names a position.
    """
    for p in range(found.partitions):
        mark = found.mark(p, q).mark
        if mark is None or mark.epoch != found.events.epoch:
            continue
        if mark.seq > found.events.last_seq:
            detail = f"{mark_subject(p, q)} is at event {mark.seq}, and EVENTS ends at {found.events.last_seq}"
        elif (p, q) in found.late and not named:
            detail = f"event {mark.seq} of EVENTS is younger than {mark_subject(p, q)}, which tells it to be dispatched"
        else:
            continue
        remedy = (
            "EVENTS was restored from a backup: run seamark topology restore EVENTS=<its last sequence there> first."
        )
        if mark.seq <= found.events.last_seq:
            remedy += f" If it was not, the servers' clocks disagreed: name the position, --at {q}={mark.seq}."
        return Refusal(f"partition {q}", detail, remedy)
    return None


def _home(found: Found, q: int, position: Position) -> _Point | Refusal | None:
    """Where event partition `q` goes on; None when it has never been dispatched and needs no mark."""
    events = found.events
    if position == "first":
        return _Point(max(0, events.first_seq - 1))
    if position == "last":
        return _Point(events.last_seq)
    if isinstance(position, int):
        if position > events.last_seq:
            return Refusal(
                f"partition {q}", f"EVENTS ends at {events.last_seq}, before {position}", "Name last instead."
            )
        return _Point(position)
    mark, log = found.mark(q, q).mark, log_stream(q)
    if (q, q) in found.late:
        return Refusal(
            f"partition {q}",
            f"event {found.covered(q, q)} of the restored EVENTS is younger than the mark of before: the backup ended earlier",
            f"Name the last event of the backup: {q}=<sequence>. Events behind it that were accepted since are dispatched then.",
        )
    if mark is not None:
        if (point := _renumbered(found, mark)) is not None:
            return point
        detail = f"its mark counts in EVENTS {mark.epoch}, which is not the present one ({events.epoch}) nor its backup"
        return Refusal(f"partition {q}", detail, f"Name a position: first, last or {q}=<sequence>.")
    # Nothing of it was ever dispatched: it is the log that was recorded, or its backup, and no other log has heard of it.
    known = {None, found.logs[q].epoch, *found.logs[q].inherited}
    if found.recorded.get(log) in known and not _foreign_marks(found, q):
        return None
    reach = max((point.seq for _, other in _foreign_marks(found, q) if (point := _renumbered(found, other))), default=0)
    hint = f" Its marks in other logs reach event {reach}." if reach else ""
    return Refusal(
        f"partition {q}", f"{log} was re-created and holds no mark", f"Name first, last or {q}=<sequence>.{hint}"
    )


def _foreign_marks(found: Found, q: int) -> list[tuple[int, Mark]]:
    marks = ((p, found.mark(p, q).mark) for p in range(found.partitions) if p != q)
    return [(p, mark) for p, mark in marks if mark is not None]


def _renumbered(found: Found, mark: Mark) -> _Point | None:
    """A mark's position in the present numbering, None when that is not known.

    After a restore from a backup the numbering is the old one up to the backup's last event; what came behind it is lost,
    and other events will have these numbers.
    """
    if mark.epoch == found.events.epoch:
        return _Point(mark.seq, mark.user)
    shared = found.events.inherited.get(mark.epoch)
    if shared is None:
        return None
    return _Point(mark.seq, mark.user) if mark.seq <= shared else _Point(shared)


def _steps(found: Found, q: int, home: _Point | None, named: bool, owner: str) -> Iterator[MarkStep]:
    """Foreign marks first and the home mark last, as in every round. Marks that mean what they say are left alone."""
    terms = [
        placed.mark.term for (_, event_partition), placed in found.marks.items() if event_partition == q and placed.mark
    ]
    term = max(terms, default=0) + 1
    for p, foreign in _foreign_marks(found, q):
        if home is not None and not _sound(found, p, foreign):
            # Of events beyond `home` it may tell which are applied; one that cannot be read tells nothing.
            known = None if (p, q) in found.late else _renumbered(found, foreign)
            point = known or _Point(home.next_seq - 1)
            yield _step(found, p, q, point, term, owner)
    mark = found.mark(q, q).mark
    # Every owner begins with the home mark's term plus one: were it below a foreign mark's, it would step down for ever.
    outdone = mark is not None and mark.term < term - 1
    if home is not None and (named or mark is None or outdone or not _sound(found, q, mark)):
        yield _step(found, q, q, home, term, owner)


def _sound(found: Found, partition: int, mark: Mark) -> bool:
    return mark.epoch == found.events.epoch and mark.stream_epoch == found.logs[partition].epoch


def _step(found: Found, p: int, q: int, point: _Point, term: int, owner: str) -> MarkStep:
    unburied = _unburied(found, found.mark(p, q).mark, point)
    after = Mark(found.events.epoch or "", point.seq, term, owner, found.logs[p].epoch or "", point.user, unburied)
    return MarkStep(p, q, found.mark(p, q), after)


def _unburied(found: Found, mark: Mark | None, point: _Point) -> int | None:
    """The first event whose dead letter is still missing. Events behind `point` are dispatched, and so buried, again."""
    if mark is None or mark.unburied is None:
        return None
    known = found.events.last_seq if mark.epoch == found.events.epoch else found.events.inherited.get(mark.epoch, 0)
    return mark.unburied if mark.unburied <= min(known, point.seq) else None


def _log_notes(found: Found) -> Iterator[str]:
    for p, log in found.logs.items():
        recorded = found.recorded.get(log_stream(p), log.epoch)
        if recorded != log.epoch:
            yield (
                f"{log_stream(p)} is another incarnation than recorded: what events of other partitions had added to it "
                "since the backup is missing, and comes back only by naming an earlier position for those partitions"
            )


def _partition_notes(found: Found, q: int, home: _Point | None) -> Iterator[str]:
    if home is None:
        yield f"partition {q} was never dispatched: it starts at the first event"
        return
    if home.next_seq < found.events.first_seq:
        yield f"partition {q}: events {home.next_seq} to {found.events.first_seq - 1} are no longer in EVENTS"
    mark = found.mark(q, q).mark
    if (
        mark is not None
        and mark.epoch != found.events.epoch
        and (q, q) not in found.late
        and (point := _renumbered(found, mark))
        and point.seq < mark.seq
    ):
        yield f"partition {q}: events {point.seq + 1} to {mark.seq} were dispatched, but are not in the restored EVENTS"
    if mark is not None and home.next_seq < mark.next_seq and mark.epoch == found.events.epoch:
        yield f"partition {q}: events {home.next_seq} to {mark.next_seq - 1} are dispatched again; their records come twice"
