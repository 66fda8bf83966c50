"""What would have to change on the server so that it agrees with the files: decided here, without touching anything.

Two things are never planned: deleting a stream, and a change that drops stored messages. What cannot be changed in
place is refused with the way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from engine.broker.answers import EPOCH_KEY, StreamState, own_metadata
from engine.dispatch.source import SOURCES
from engine.log.incarnations import continues
from engine.log.marks import NO_MARK, PlacedMark
from engine.topology.diff import Change, changes_between, lost_by, unchangeable
from engine.topology.files import File, Topology, is_log, log_partition
from seamark.protocol.subjects import EVENTS_STREAM, log_stream, plan_mark_subject

_SOURCES: Final = frozenset(source.stream for source in SOURCES)

Action = Literal[
    "create_stream",
    "update_stream",
    "create_consumer",
    "update_consumer",
    "record_epochs",
    "begin_planning",
    "forget_claims",
    "write_mark",
    "replace_epochs",
]


@dataclass(frozen=True, slots=True)
class Observed:
    """What the server has. `epochs` is what the control bucket remembers, None when it has never been written.

    `planned`: the planners' marks in JOBS, by the partition of their log.
    """

    streams: dict[str, StreamState] = field(default_factory=dict)
    consumers: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    epochs: dict[str, str] | None = None
    planned: dict[int, PlacedMark] = field(default_factory=dict)

    def config(self, file: File) -> dict[str, Any] | None:
        """The configuration on the server of what a file describes."""
        if file.kind == "consumer":
            return self.consumers.get((file.stream, file.name))
        return self.streams[file.name].config if file.name in self.streams else None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. `target` is a stream, `<stream>/<consumer>`, the subject of a mark, or the key `epochs`."""

    action: Action
    target: str
    why: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    seen: Mapping[str, Any] | None = field(default=None, repr=False)

    def line(self) -> str:
        """The step for people."""
        sign = "+" if self.action.startswith("create") else "~"
        what = f"{sign} {self.action.replace('_', ' ')}" + (
            f" {self.target}" if "." in self.target or self.config.get("name") else ""
        )
        return f"{what}: {'; '.join(self.why)}" if self.why else what


@dataclass(frozen=True, slots=True)
class Refusal:
    """A difference that will not be made to disappear, and what an operator can do."""

    target: str
    detail: str
    remedy: str

    def line(self) -> str:
        """The refusal for people."""
        return f"! {self.target}: {self.detail}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done in this order, what is refused, and what an operator should know and no step touches.

    `agreed` is said when there is nothing to do.
    """

    agreed: str
    steps: tuple[Step, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, and nothing is refused."""
        return not self.steps and not self.refusals

    def lines(self) -> list[str]:
        """The plan for people, one line a step, refusal or note."""
        lines = [step.line() for step in self.steps] + [refusal.line() for refusal in self.refusals]
        lines += [f"# {note}" for note in self.notes]
        return [*lines, self.agreed] if self.empty else lines


def remembered_partitions(observed: Observed) -> int | None:
    """The number of partitions the server's streams were made for; None on a server without any.

    The metadata of EVENTS says it, else that of any LOG, else the recorded epochs: so that losing one stream cannot
    pass for a fresh start with another number.
    """
    events = observed.streams.get(EVENTS_STREAM)
    logs = [stream for name, stream in sorted(observed.streams.items()) if is_log(name)]
    numbers = [stream.partitions for stream in (*filter(None, [events]), *logs)]
    if events is not None:
        transform = (events.config.get("subject_transform") or {}).get("dest", "")
        numbers += [int(number) for number in re.findall(r"\{\{partition\((\d+),", transform)]
    known = [p for name in (*observed.streams, *(observed.epochs or {})) if (p := log_partition(name)) is not None]
    return next((number for number in numbers if number is not None), max(known) + 1 if known else None)


def decide(topology: Topology, observed: Observed, new_epoch: Callable[[], str], *, recreate: bool = False) -> Plan:
    """The plan that makes the server what the files say.

    Args:
        new_epoch: called for each stream that needs a tag.
        recreate: whether a stream that existed once is made anew. It is refused otherwise: a stream of that name in
            its place, and no backup can be restored any more.
    """
    agreed = f"files and server agree ({topology.profile}, {topology.partitions} partitions)"
    has = remembered_partitions(observed)
    if has is not None and has != topology.partitions:
        return Plan(agreed, refusals=(_partitions_refused(has, topology.partitions),))
    outcomes: list[Step | Refusal] = []
    for file in (*topology.streams, *topology.consumers):
        seen = observed.config(file)
        outcomes += _create(file, observed, new_epoch, recreate) if seen is None else _change(file, observed, new_epoch)
    outcomes += _begin_planning(topology, observed)
    recorded = observed.epochs or {}
    if unknown := [name for name in recorded_streams(file.name for file in topology.streams) if name not in recorded]:
        outcomes.append(Step("record_epochs", "epochs", (f"seen for the first time: {', '.join(unknown)}",)))
    steps = tuple(each for each in outcomes if isinstance(each, Step))
    refusals = tuple(each for each in outcomes if isinstance(each, Refusal))
    return Plan(agreed, steps, refusals, tuple(_notes(topology, observed)))


def _begin_planning(topology: Topology, observed: Observed) -> Iterator[Step]:
    """Where JOBS was never there, or was lost, nothing tells what was planned: all that logs hold counts as planned."""
    for p in range(topology.partitions):
        if observed.planned.get(p, NO_MARK).mark is None:
            why = f"behind what {log_stream(p)} holds by then, for JOBS has no mark of it"
            yield Step("begin_planning", plan_mark_subject(p), (why,))


def _partitions_refused(has: int, asked: int) -> Refusal:
    remedy = (
        f"Ask for {has}: another number would move users to other logs and break every cursor. "
        "For another number set up a second deployment and move services over to it."
    )
    return Refusal("partitions", f"the server's streams were made for {has} partitions, {asked} are asked for", remedy)


def _create(file: File, observed: Observed, new_epoch: Callable[[], str], recreate: bool) -> Iterator[Step | Refusal]:
    if file.kind == "consumer":
        yield Step("create_consumer", file.target, (f"file {file.filename}",), file.config)
        return
    lost = _existed(observed, file.name)
    if lost is not None and not recreate:
        yield Refusal(
            file.name,
            f"it existed once (epoch {lost}) and is gone",
            f"Restore its backup if there is one: nats stream restore <folder>, then seamark topology restore {file.name}. "
            "Only if there is none: seamark topology apply --recreate makes an empty one, and after that none can be restored.",
        )
        return
    # The epoch is created together with the stream: there is no moment in which the stream exists without one.
    metadata = (file.config.get("metadata") or {}) | {EPOCH_KEY: new_epoch()}
    why = [f"{file.config.get('num_replicas', 1)} replica(s), file {file.filename}"]
    if lost is not None:
        why.append(f"empty, though it existed once (epoch {lost})")
    yield Step("create_stream", file.name, tuple(why), file.config | {"metadata": metadata})


def _existed(observed: Observed, name: str) -> str | None:
    """The epoch of a stream that is gone; "unknown" where its record is gone, too, and others say that there was one."""
    if observed.epochs is not None:
        return observed.epochs.get(name)
    at_work = any(seen.last_seq > 0 for other, seen in observed.streams.items() if is_log(other))
    return "unknown" if at_work and any(recorded_streams([name])) else None


def _change(file: File, observed: Observed, new_epoch: Callable[[], str]) -> Iterator[Step | Refusal]:
    seen = observed.config(file) or {}
    changes = list(changes_between(file.kind, file.config, seen))
    refusals = [
        Refusal(file.target, f"{change} cannot be changed on an existing {file.kind}", _way_out(file, change))
        for change in changes
        if unchangeable(file.kind, change)
    ]
    why = [str(change) for change in changes]
    metadata = own_metadata(seen) | (file.config.get("metadata") or {})
    if file.kind == "stream":
        refusals += _losses(file, changes, observed.streams[file.name])
        if EPOCH_KEY not in metadata:
            metadata[EPOCH_KEY] = new_epoch()
            why.append("it has no epoch, it gets one")
    if refusals:
        yield from refusals
    elif why:
        action: Action = "update_stream" if file.kind == "stream" else "update_consumer"
        yield Step(action, file.target, tuple(why), file.config | ({"metadata": metadata} if metadata else {}), seen)


def _way_out(file: File, change: Change) -> str:
    if file.kind == "consumer":
        return (
            f"Stop what reads through it, run nats consumer rm {file.stream} {file.name} and apply again: "
            "no position is lost, it lives with the effect (a dispatcher's in its marks)."
        )
    return (
        f"Set {change.field} in the file back to {change.server!r}, or move the messages of {file.name} "
        "into a stream made from the file yourself (nats stream backup, nats stream restore)."
    )


def _losses(file: File, changes: Iterable[Change], seen: StreamState) -> Iterator[Refusal]:
    oldest_age_seconds = seen.asked_at - seen.oldest_at if seen.messages else 0.0
    for change in changes:
        if loss := lost_by(change, seen.messages, seen.bytes, oldest_age_seconds):
            remedy = f"Nothing stored is dropped from here. If it may go: nats stream edit {file.name}, plan again."
            yield Refusal(file.name, f"{change} would {loss}", remedy)


def recorded_streams(streams: Iterable[str]) -> Iterator[str]:
    """The streams whose epochs dispatchers compare with the control bucket: their sources and every LOG."""
    return (name for name in streams if name in _SOURCES or is_log(name))


def _notes(topology: Topology, observed: Observed) -> Iterator[str]:
    events = observed.streams.get(EVENTS_STREAM)
    if observed.epochs is None and events and events.messages:
        yield "no epochs were recorded though EVENTS holds events: they are taken as found"
    for name, epoch in (observed.epochs or {}).items():
        stream = observed.streams.get(name)
        if stream is None or not continues(stream, epoch):
            yield f"{name} is not the stream recorded with epoch {epoch}: dispatchers wait for seamark topology repair"
    named = {file.target for file in topology.consumers}
    for stream_name, consumer in observed.consumers:
        target = f"{stream_name}/{consumer}"
        if stream_name in _SOURCES and consumer.startswith("dispatch-") and target not in named:
            yield f"{target} is in no file and is left alone"
