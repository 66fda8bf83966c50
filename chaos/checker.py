"""Judges a ledger: what Seamark promises, as invariants over what was seen. Every value is unique, so no search is needed.

- `lost`: an acknowledged event is in the log of every user it names, on every replica that was read.
- `phantom`: a record was published by somebody, for this user, and its publication did not certainly fail.
- `duplicate`: an event is in a user's log once.
- `truth`: a position (stream, epoch, seq) holds one record, whoever was asked: replicas, devices.
- `order`: events of one key stand in a user's log in publish order, and in the order in which EVENTS holds them.
- `session`: a session gets rising sequences, chained by `prev`, and exactly its user's records between where it began and
  the last one it got; a settled session got all; a device's next session asks for nothing beyond what the device was given.
- `resume`: a session is resumed exactly where it asked to, or told a reason; a cursor of another epoch or from the future
  never resumes.
- `cursor`: a device's acknowledged cursor never goes back, and never beyond what the session was given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from chaos.ledger import Line

RESET_REASONS = frozenset({"new", "epoch", "future", "trimmed"})


class Violation(NamedTuple):
    """A promise that was not kept."""

    invariant: str
    detail: str


class Published(NamedTuple):
    """An event as its publisher saw it. `phase`: ok, fail, or info when nobody knows."""

    event: str
    to: frozenset[str]
    key: str
    number: int
    phase: str
    seq: int | None


class Found(NamedTuple):
    """A record in a LOG."""

    stream: str
    epoch: str
    seq: int
    user: str
    event: str
    key: str
    event_epoch: str
    event_seq: int


class Delivered(NamedTuple):
    """A frame a device got. `event` is None when it only moves the cursor."""

    epoch: str
    seq: int
    prev: int | None
    event: str | None


@dataclass(slots=True)
class Session:
    """One connection of a device."""

    name: str
    user: str
    device: str
    asked: tuple[str, int] | None
    resumed: bool = False
    reason: str | None = None
    start: tuple[str, int] | None = None
    delivered: list[Delivered] = field(default_factory=list)
    acks: list[tuple[str, int]] = field(default_factory=list)
    settled: bool = False


@dataclass(slots=True)
class History:
    """A ledger, sorted into what the checks need."""

    published: dict[str, Published] = field(default_factory=dict)
    replicas: dict[str, list[Found]] = field(default_factory=lambda: defaultdict(list))
    streams: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)

    @property
    def logs(self) -> dict[str, list[Found]]:
        """Every user's log, as the first replica has it."""
        logs: dict[str, list[Found]] = defaultdict(list)
        for found in next(iter(self.replicas.values()), []):
            logs[found.user].append(found)
        return logs


def read(lines: Iterable[Line]) -> History:
    """Sort a ledger."""
    history = History()
    for line in lines:
        facts = line.facts
        match line.op, line.phase:
            case "publish", "invoke":
                history.published[facts["event"]] = Published(
                    facts["event"], frozenset(facts["to"]), facts["key"], facts["number"], "info", None
                )
            case "publish", phase:
                before = history.published[facts["event"]]
                history.published[facts["event"]] = before._replace(phase=phase, seq=facts.get("seq"))
            case "stream", _:
                history.streams[facts["name"]] = (facts["epoch"], facts["first"], facts["last"])
                history.replicas[facts["replica"]]  # a replica that holds nothing was asked all the same
            case "record", _:
                history.replicas[facts["replica"]].append(Found(**{n: facts[n] for n in Found._fields}))
            case "open", "invoke":
                asked = tuple(facts["cursor"]) if facts["cursor"] else None
                history.sessions[facts["session"]] = Session(facts["session"], facts["user"], facts["device"], asked)
            case "open", "ok":
                session = history.sessions[facts["session"]]
                session.resumed, session.reason = facts["resumed"], facts["reason"]
                session.start = tuple(facts["start"])
            case "deliver", _:
                history.sessions[facts["session"]].delivered.append(
                    Delivered(facts["epoch"], facts["seq"], facts["prev"], facts["event"])
                )
            case "ack", "ok":
                history.sessions[facts["session"]].acks.append((facts["epoch"], facts["seq"]))
            case "settle", _:
                history.sessions[facts["session"]].settled = True
    return history


def check(lines: Iterable[Line]) -> list[Violation]:
    """Every violation in a ledger; empty when all promises were kept."""
    history = read(lines)
    checks = (
        check_lost,
        check_phantoms,
        check_duplicates,
        check_truth,
        check_order,
        check_sessions,
        check_resumes,
        check_cursors,
    )
    return [violation for one in checks for violation in one(history)]


def check_lost(history: History) -> Iterator[Violation]:
    """Also says where in the key's history the loss is: a hole in the middle is worse than a missing end."""
    wanted: dict[str, dict[str, Published]] = defaultdict(dict)
    for published in history.published.values():
        if published.phase == "ok":
            for user in published.to:
                wanted[user][published.event] = published
    for replica, records in history.replicas.items():
        there: dict[str, set[str]] = defaultdict(set)
        for found in records:
            there[found.user].add(found.event)
        for user, events in wanted.items():
            for event in events.keys() - there[user]:
                yield Violation("lost", f"{event} for {user} on {replica} ({_place(event, events, there[user])})")


def _place(event: str, wanted: dict[str, Published], there: set[str]) -> str:
    lost = wanted[event]
    same = [p.number for p in wanted.values() if p.key == lost.key and p.event in there]
    if not same:
        return "all of its key"
    return "the end" if lost.number > max(same) else "the beginning" if lost.number < min(same) else "the middle"


def check_phantoms(history: History) -> Iterator[Violation]:
    for replica, records in history.replicas.items():
        for found in records:
            published = history.published.get(found.event)
            if published is None or published.phase == "fail" or found.user not in published.to:
                yield Violation("phantom", f"{found.event} for {found.user} at {found.stream}:{found.seq} on {replica}")


def check_duplicates(history: History) -> Iterator[Violation]:
    for replica, records in history.replicas.items():
        seen: dict[tuple[str, str], int] = {}
        for found in records:
            first = seen.setdefault((found.user, found.event), found.seq)
            if first != found.seq:
                yield Violation("duplicate", f"{found.event} for {found.user} at {first} and {found.seq} on {replica}")


def check_truth(history: History) -> Iterator[Violation]:
    truth: dict[tuple[str, str, int], str] = {}
    homes: dict[str, str] = {}
    for replica, records in history.replicas.items():
        for found in records:
            homes[found.user] = found.stream
            told = truth.setdefault((found.stream, found.epoch, found.seq), found.event)
            if told != found.event:
                yield Violation("truth", f"{found.stream}:{found.seq} is {told} and, on {replica}, {found.event}")
    for session in history.sessions.values():
        for frame in session.delivered:
            if frame.event is None or session.user not in homes:
                continue
            told = truth.get((homes[session.user], frame.epoch, frame.seq), frame.event)
            if told != frame.event:
                yield Violation("truth", f"{session.user}:{frame.seq} is {told}, {session.name} got {frame.event}")


def check_order(history: History) -> Iterator[Violation]:
    for replica, records in history.replicas.items():
        last: dict[tuple[str, str], Found] = {}
        for found in sorted(records, key=lambda found: (found.stream, found.seq)):
            before = last.get((found.user, found.key))
            last[found.user, found.key] = found
            if before is None:
                continue
            numbers = [history.published[f.event].number for f in (before, found) if f.event in history.published]
            older = found.event_epoch == before.event_epoch and found.event_seq < before.event_seq
            if older or numbers != sorted(numbers):
                yield Violation("order", f"{found.event} follows {before.event} for {found.user} on {replica}")


def check_sessions(history: History) -> Iterator[Violation]:
    logs = history.logs
    given: dict[tuple[str, str, str], int] = {}
    for session in history.sessions.values():
        if session.start is None:
            continue
        if session.asked is not None:
            before = given.get((session.user, session.device, session.asked[0]))
            if before is not None and session.asked[1] > before:
                yield Violation(
                    "session", f"{session.name} asked for {session.asked}, its device had been given {before}"
                )
        last, got = session.start[1], []
        for frame in session.delivered:
            if frame.seq < last or (frame.event is not None and frame.seq == last):
                yield Violation("session", f"{session.name} got {frame.seq} after {last}")
            if frame.prev is not None and frame.prev != last:
                yield Violation("session", f"{session.name} got {frame.seq} with prev {frame.prev} after {last}")
            last = max(last, frame.seq)
            if frame.event is not None:
                got.append((frame.seq, frame.event))
        given[session.user, session.device, session.start[0]] = last
        log = [(f.seq, f.event) for f in logs.get(session.user, []) if f.epoch == session.start[0]]
        due = sorted((seq, event) for seq, event in log if session.start[1] < seq and (session.settled or seq <= last))
        if sorted(got) != due:
            missing, extra = sorted(set(due) - set(got))[:3], sorted(set(got) - set(due))[:3]
            yield Violation("session", f"{session.name} of {session.user} misses {missing} and has {extra} too many")


def check_resumes(history: History) -> Iterator[Violation]:
    epochs = {epoch for epoch, _, _ in history.streams.values()}
    for session in history.sessions.values():
        if session.start is None:
            continue
        if session.resumed:
            if session.asked is not None and session.asked != session.start:
                yield Violation("resume", f"{session.name} asked for {session.asked} and began at {session.start}")
            if session.asked is not None and epochs and session.asked[0] not in epochs:
                yield Violation("resume", f"{session.name} resumed in another epoch, {session.asked}")
            if session.asked is not None and session.asked[1] > max(s[2] for s in history.streams.values()):
                yield Violation("resume", f"{session.name} resumed in the future, {session.asked}")
        elif session.reason not in RESET_REASONS:
            yield Violation("resume", f"{session.name} was not resumed and told {session.reason!r}")


def check_cursors(history: History) -> Iterator[Violation]:
    acked: dict[tuple[str, str, str], int] = {}
    for session in history.sessions.values():
        given = max((frame.seq for frame in session.delivered), default=session.start[1] if session.start else 0)
        for epoch, seq in session.acks:
            before = acked.get((session.user, session.device, epoch), 0)
            if seq < before:
                yield Violation("cursor", f"{session.device} of {session.user} went back from {before} to {seq}")
            if seq > given:
                yield Violation("cursor", f"{session.name} acknowledged {seq}, it was given {given}")
            acked[session.user, session.device, epoch] = max(seq, before)
