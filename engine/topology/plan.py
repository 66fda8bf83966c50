"""What would have to change on the server so that it agrees with the files: decided here, without touching anything.

Two things are never planned: deleting a stream, and a change that drops stored messages. What cannot be changed in
place is refused with the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from engine.topology.diff import Change, changes_between, lost_by, unchangeable
from engine.topology.files import ConsumerFile, StreamFile, Topology, log_partition
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.subjects import EVENTS_STREAM

EPOCH_KEY: Final = "seamark.epoch"
PARTITIONS_KEY: Final = "seamark.partitions"
RESTORED_KEY: Final = "seamark.restored"
"""`<epoch>.<last seq of the backup>` for each time a stream was restored from one, newest first, separated by blanks."""

_RESTORES_REMEMBERED: Final = 16
"""Positions older than this many restores have to be named by the operator."""

Action = Literal["create_stream", "update_stream", "create_consumer", "update_consumer", "record_epochs"]


@dataclass(frozen=True, slots=True)
class ObservedStream:
    """A stream as its leader described it. `asked_at` is the server's own clock."""

    config: dict[str, Any] = field(repr=False)
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    first_at: datetime | None = None
    asked_at: datetime | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata without the server's own notes."""
        metadata = self.config.get("metadata") or {}
        return {key: value for key, value in metadata.items() if not key.startswith("_nats.")}

    @property
    def epoch(self) -> str | None:
        """The stream's incarnation, None when nobody has written one."""
        return self.metadata.get(EPOCH_KEY)

    @property
    def inherited(self) -> dict[str, int]:
        """The earlier incarnations whose numbering this one continues, each with the last sequence that it shares."""
        shared: dict[str, int] = {}
        last = self.last_seq
        for text in self.metadata.get(RESTORED_KEY, "").split():
            epoch, seq = parse_cursor(text)
            last = min(last, seq)
            shared.setdefault(epoch, last)
        return shared

    def restored(self, epoch: str, backup_last_seq: int | None = None) -> dict[str, str]:
        """Its metadata once it is known to come from a backup, which ended there, and has the new `epoch`."""
        shared = self.last_seq if backup_last_seq is None else min(self.last_seq, backup_last_seq)
        before = [] if self.epoch is None else [f"{self.epoch}.{shared}"]
        lineage = [*before, *self.metadata.get(RESTORED_KEY, "").split()][:_RESTORES_REMEMBERED]
        return self.metadata | ({RESTORED_KEY: " ".join(lineage)} if lineage else {}) | {EPOCH_KEY: epoch}

    @property
    def oldest_age(self) -> timedelta:
        """Age of the oldest stored message; zero for an empty stream."""
        if not self.messages or self.first_at is None or self.asked_at is None:
            return timedelta(0)
        return self.asked_at - self.first_at


@dataclass(frozen=True, slots=True)
class Observed:
    """What the server has. `epochs` is what the control bucket remembers, None when it has never been written."""

    streams: dict[str, ObservedStream] = field(default_factory=dict)
    consumers: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    epochs: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. `target` is a stream, `<stream>/<consumer>`, or the key `epochs`."""

    action: Action
    target: str
    why: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    seen: dict[str, Any] | None = field(default=None, repr=False)

    def line(self) -> str:
        """The step for people."""
        sign = "+" if self.action.startswith("create") else "~"
        what = f"{sign} {self.action.replace('_', ' ')}" + ("" if self.action == "record_epochs" else f" {self.target}")
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
    """The difference between files and server. Apply it with `engine.topology.server.apply`."""

    profile: str
    partitions: int
    steps: tuple[Step, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether server and files agree."""
        return not self.steps and not self.refusals

    def lines(self) -> list[str]:
        """The plan for people, one line a step, refusal or note."""
        lines = [*(step.line() for step in self.steps), *(refusal.line() for refusal in self.refusals)]
        lines += [f"# {note}" for note in self.notes]
        if self.empty:
            lines.append(f"files and server agree ({self.profile}, {self.partitions} partitions)")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "profile": self.profile,
            "partitions": self.partitions,
            "steps": [{"action": step.action, "target": step.target, "why": list(step.why)} for step in self.steps],
            "refusals": [{"target": r.target, "detail": r.detail, "remedy": r.remedy} for r in self.refusals],
            "notes": list(self.notes),
        }


def remembered_partitions(observed: Observed) -> int | None:
    """The number of partitions the server's streams were made for; None on a server without any.

    The metadata of EVENTS says it, else that of any LOG, else the recorded epochs: so that losing one stream cannot
    pass for a fresh start with another number.
    """
    names = ["EVENTS", *sorted(name for name in observed.streams if log_partition(name) is not None)]
    for name in names:
        stream = observed.streams.get(name)
        if stream and (number := stream.metadata.get(PARTITIONS_KEY, "")).isdecimal():
            return int(number)
    if stream := observed.streams.get("EVENTS"):
        dest = (stream.config.get("subject_transform") or {}).get("dest", "")
        number = dest.partition("{{partition(")[2].partition(",")[0].strip()
        if number.isdecimal():
            return int(number)
    known = [p for name in (*observed.streams, *(observed.epochs or {})) if (p := log_partition(name)) is not None]
    return max(known) + 1 if known else None


def decide(topology: Topology, observed: Observed, new_epoch: Callable[[], str], *, recreate: bool = False) -> Plan:
    """The plan that makes the server what the files say.

    Args:
        topology: the files.
        observed: the server.
        new_epoch: called for each stream that needs a tag.
        recreate: whether a stream that existed once is made anew. It is refused otherwise: a stream of that name in
            its place, and no backup can be restored any more.
    """
    has = remembered_partitions(observed)
    if has is not None and has != topology.partitions:
        return Plan(topology.profile, topology.partitions, refusals=(_partitions_refused(has, topology.partitions),))
    steps: list[Step] = []
    refusals: list[Refusal] = []
    for file in topology.streams:
        seen = observed.streams.get(file.name)
        if seen is not None:
            _sort(_change_stream(file, seen, new_epoch), steps, refusals)
        elif (lost := _existed(observed, file.name)) is not None and not recreate:
            refusals.append(_lost(file.name, lost))
        else:
            _sort(_create(file, new_epoch(), lost), steps, refusals)
    for consumer in topology.consumers:
        config = observed.consumers.get((consumer.stream, consumer.name))
        _sort(_create_consumer(consumer) if config is None else _change_consumer(consumer, config), steps, refusals)
    steps += _epochs_step(topology, observed)
    return Plan(topology.profile, topology.partitions, tuple(steps), tuple(refusals), tuple(_notes(topology, observed)))


def _sort(outcome: Step | list[Refusal] | None, steps: list[Step], refusals: list[Refusal]) -> None:
    if isinstance(outcome, Step):
        steps.append(outcome)
    elif outcome:
        refusals.extend(outcome)


def _partitions_refused(has: int, asked: int) -> Refusal:
    detail = f"the server's streams were made for {has} partitions, {asked} are asked for"
    remedy = (
        f"Ask for {has}: another number would move users to other logs and break every cursor. "
        "For another number set up a second deployment and move services over to it."
    )
    return Refusal("partitions", detail, remedy)


def _existed(observed: Observed, name: str) -> str | None:
    """The epoch of a stream that is gone; "unknown" where its record is gone, too, and others say that there was one."""
    if observed.epochs is not None:
        return observed.epochs.get(name)
    keeps = name == EVENTS_STREAM or log_partition(name) is not None
    at_work = any(seen.last_seq > 0 for other, seen in observed.streams.items() if log_partition(other) is not None)
    return "unknown" if keeps and at_work else None


def _lost(name: str, epoch: str) -> Refusal:
    return Refusal(
        name,
        f"it existed once (epoch {epoch}) and is gone",
        f"Restore its backup if there is one: nats stream restore <folder>, then seamark topology restore {name}. "
        "Only if there is none: seamark topology apply --recreate makes an empty one, and after that none can be restored.",
    )


def _create(file: StreamFile, epoch: str, lost_epoch: str | None) -> Step:
    # The epoch is created together with the stream: there is no moment in which the stream exists without one.
    metadata = (file.config.get("metadata") or {}) | {EPOCH_KEY: epoch}
    config = file.config | {"metadata": metadata}
    why = [f"{file.config.get('num_replicas', 1)} replica(s), file {file.filename}"]
    if lost_epoch is not None:
        why.append(f"empty, though it existed once (epoch {lost_epoch})")
    return Step("create_stream", file.name, tuple(why), config)


def _change_stream(file: StreamFile, seen: ObservedStream, new_epoch: Callable[[], str]) -> Step | list[Refusal] | None:
    changes = list(changes_between("stream", file.config, seen.config))
    refusals = [
        Refusal(file.name, f"{change} cannot be changed on an existing stream", _remedy_rebuild(file.name, change))
        for change in changes
        if unchangeable("stream", change)
    ]
    for change in changes:
        if loss := lost_by(change, seen.messages, seen.bytes, seen.oldest_age.total_seconds()):
            remedy = f"Nothing stored is dropped from here. If it may go: nats stream edit {file.name}, plan again."
            refusals.append(Refusal(file.name, f"{change} would {loss}", remedy))
    if refusals:
        return refusals
    metadata = seen.metadata | (file.config.get("metadata") or {})
    why = [str(change) for change in changes]
    if EPOCH_KEY not in metadata:
        metadata[EPOCH_KEY] = new_epoch()
        why.append("it has no epoch, it gets one")
    if not why:
        return None
    return Step("update_stream", file.name, tuple(why), file.config | {"metadata": metadata}, seen.config)


def _create_consumer(file: ConsumerFile) -> Step:
    return Step("create_consumer", f"{file.stream}/{file.name}", (f"file {file.filename}",), file.config)


def _change_consumer(file: ConsumerFile, seen: Mapping[str, Any]) -> Step | list[Refusal] | None:
    target = f"{file.stream}/{file.name}"
    changes = list(changes_between("consumer", file.config, seen))
    refused = [change for change in changes if unchangeable("consumer", change)]
    if refused:
        remedy = (
            f"Stop what reads through it, run nats consumer rm {file.stream} {file.name} and apply again: "
            "no position is lost, it lives with the effect (a dispatcher's in its marks)."
        )
        return [Refusal(target, f"{change} cannot be changed on an existing consumer", remedy) for change in refused]
    if not changes:
        return None
    metadata = {key: value for key, value in (seen.get("metadata") or {}).items() if not key.startswith("_nats.")}
    config = file.config | ({"metadata": metadata} if metadata else {})
    return Step("update_consumer", target, tuple(str(change) for change in changes), config, dict(seen))


def _remedy_rebuild(name: str, change: Change) -> str:
    return (
        f"Set {change.field} in the file back to {change.server!r}, or move the messages of {name} "
        "into a stream made from the file yourself (nats stream backup, nats stream restore)."
    )


def recorded_streams(streams: Iterable[str]) -> Iterator[str]:
    """The streams whose epochs dispatchers compare with the control bucket: EVENTS and every LOG."""
    return (name for name in streams if name == "EVENTS" or log_partition(name) is not None)


def _epochs_step(topology: Topology, observed: Observed) -> list[Step]:
    recorded = observed.epochs or {}
    missing = [name for name in recorded_streams([file.name for file in topology.streams]) if name not in recorded]
    return [Step("record_epochs", "epochs", (f"seen for the first time: {', '.join(missing)}",))] if missing else []


def _notes(topology: Topology, observed: Observed) -> Iterator[str]:
    """What an operator should know and no step touches."""
    events = observed.streams.get("EVENTS")
    if observed.epochs is None and events and events.messages:
        yield "no epochs were recorded though EVENTS holds events: they are taken as found"
    for name, epoch in (observed.epochs or {}).items():
        stream = observed.streams.get(name)
        if stream is None or stream.epoch != epoch:
            yield f"{name} is not the stream recorded with epoch {epoch}: dispatchers wait for seamark topology repair"
    named = {(file.stream, file.name) for file in topology.consumers}
    for stream_name, consumer in observed.consumers:
        if stream_name == "EVENTS" and consumer.startswith("dispatch-") and (stream_name, consumer) not in named:
            yield f"EVENTS/{consumer} is in no file and is left alone"
