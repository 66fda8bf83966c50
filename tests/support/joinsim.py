"""A world in virtual time for `gateway.feed`: one log with a leader and two replicas, sessions, sockets and devices.

A `Scenario` is data: knobs of the network and a list of steps. `run` plays it against a `Rules` (which feed class and
which driver to use, so that deliberate mistakes can be put in) and raises `Broken` when a promise is not kept. Every
decision of the network comes from the scenario's own seed, so a run can be repeated.

What the world grants (see the module docstring of `gateway.feed`): the front of the log is trimmed only beyond records
a minute old; a stream made anew, or gone back, is so on all servers at once and no live copy of before comes after.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

from engine.cursor import Cursor
from gateway.feed import Ask, Feed, FeedCounters, LogState, ResetReason, Snapshot, State

WATCH_SECONDS = 5.0
CHECK_SECONDS = 30.0
YOUNG_SECONDS = 60.0
"""Nothing younger is trimmed."""
HEAL_SECONDS = 45.0
"""A check every 30 s, and what it takes to act on it."""
LOSSLESS_SECONDS = 5.0
"""The longest a record may take when no live copy is lost but in the race of a join, and replicas lag."""
PROMPT_SECONDS = 0.9
"""The same without such a race, replicas nearly in step: sooner than the check that follows a join."""


class Broken(AssertionError):
    """A promise was not kept."""


class Step(NamedTuple):
    """`gap` seconds after the step before it, `kind` happens; `a` and `b` choose what exactly."""

    gap: float
    kind: str
    a: int = 0
    b: int = 0


@dataclass(frozen=True)
class Scenario:
    """Knobs and steps. Probabilities are per message or request; times are in seconds."""

    seed: int
    steps: tuple[Step, ...]
    devices: int = 2
    history: int = 8
    loss: float = 0.0
    duplicate: float = 0.0
    disorder: float = 0.0
    failure: float = 0.0
    race_seconds: float = 0.0
    lag_seconds: float = 0.0
    latency_seconds: float = 0.01
    slow_answers: float = 0.0
    no_snapshot: float = 0.0
    projection_lag_seconds: float = 0.5
    page: int = 3
    parked_limit: int = 4
    room: int = 256
    drain_seconds: float = 0.001


GAPS = (0.0, 0.003, 0.02, 0.1, 0.4, 1.5, 6.0, 70.0)


@dataclass(frozen=True)
class Profile:
    """What kind of scenarios to draw: the steps with their weights, and which values the knobs may take."""

    kinds: Mapping[str, int]
    gaps: tuple[float, ...] = (8, 8, 8, 6, 5, 3, 1, 0.3)
    knobs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    whole: float = 0.5
    """Share of the kinds that a scenario has: what it leaves out does not drown the rest."""


TROUBLE = Profile(
    kinds={
        "publish": 30, "others": 8, "connect": 10, "disconnect": 6, "cut": 4, "erase": 4, "trim": 4, "recreate": 1,
        "back": 1, "stall": 4, "lag": 3, "leaderless": 2, "apply": 1, "pong": 5, "forget": 1, "rejoin": 8, "wait": 2,
    },
    knobs={
        "loss": (0.0, 0.1, 0.4, 1.0),
        "duplicate": (0.0, 0.1, 0.3),
        "disorder": (0.0, 0.1, 0.3),
        "failure": (0.0, 0.0, 0.1, 0.3),
        "race_seconds": (0.0, 0.05, 0.3),
        "lag_seconds": (0.0, 0.05, 0.3, 3.0),
        "latency_seconds": (0.002, 0.01, 0.03),
        "slow_answers": (0.0, 0.0, 0.2),
        "no_snapshot": (0.0, 0.0, 0.3),
        "projection_lag_seconds": (0.0, 0.1, 2.0),
        "page": (1, 2, 3, 256),
        "parked_limit": (1, 2, 4, 256),
        "room": (1, 2, 8, 256),
        "drain_seconds": (0.001, 0.001, 0.05, 0.3),
    },
)  # fmt: skip
LOSSLESS = Profile(
    kinds={
        "publish": 30, "others": 8, "connect": 10, "disconnect": 6, "erase": 4, "trim": 4, "recreate": 1, "lag": 3,
        "pong": 5, "forget": 1, "rejoin": 12,
    },
    knobs={
        "race_seconds": (0.05, 0.3),
        "lag_seconds": (0.0, 0.05, 0.3, 3.0),
        "latency_seconds": (0.002, 0.01, 0.03),
        "no_snapshot": (0.0, 0.3),
        "projection_lag_seconds": (0.0, 0.1, 2.0),
        "page": (4, 256),
        "parked_limit": (1, 2, 256),
    },
)  # fmt: skip
PROMPT = Profile(
    kinds={"publish": 20, "others": 8, "disconnect": 3, "erase": 4, "pong": 5, "rejoin": 30},
    gaps=(4, 4, 4, 8, 8, 3, 0, 0),
    knobs={
        "lag_seconds": (0.0, 0.05),
        "latency_seconds": (0.005, 0.01),
        "page": (4, 256),
        "parked_limit": (1, 2, 256),
    },
    whole=0.9,
)
READING = Profile(
    kinds={"publish": 10, "others": 10, "connect": 10, "disconnect": 10, "trim": 30, "stall": 4, "forget": 4},
    gaps=(1, 1, 4, 8, 8, 8, 8, 1),
    knobs={
        "history": (8, 20),
        "lag_seconds": (0.0, 0.05),
        "latency_seconds": (0.01, 0.3),
        "slow_answers": (0.0, 0.3),
        "page": (1, 2, 3),
        "room": (1, 2, 256),
        "drain_seconds": (0.05, 0.3, 1.0),
    },
    whole=0.9,
)
PROFILES = (TROUBLE, LOSSLESS, TROUBLE, PROMPT, TROUBLE, READING)
LOSSLESS_KINDS = frozenset(LOSSLESS.kinds)


def scenario(seed: int, profile: Profile | None = None) -> Scenario:
    """The scenario number `seed`; the profiles take turns unless one is given."""
    rng = Random(seed)
    profile = profile or PROFILES[seed % len(PROFILES)]
    kinds = {"publish": profile.kinds["publish"]}
    for kind, weight in profile.kinds.items():
        if rng.random() < profile.whole:
            kinds[kind] = weight * rng.choice((1, 1, 1, 6))
    names, weights = list(kinds), list(kinds.values())
    steps = tuple(
        Step(
            rng.choices(GAPS, profile.gaps)[0], rng.choices(names, weights)[0], rng.randrange(64), rng.randrange(64)
        )
        for _ in range(rng.randrange(10, 60))
    )
    drawn: dict[str, Any] = {"devices": rng.randrange(1, 4), "history": rng.randrange(12)}
    drawn |= {name: rng.choice(values) for name, values in profile.knobs.items()}
    return Scenario(seed=seed, steps=(Step(0.0, "connect", 0, rng.randrange(64)), *steps), **drawn)


# --- the log


class Record:
    """A record of the user followed. `gone` says why it is not owed to anybody any more."""

    __slots__ = ("born", "epoch", "gone", "prev", "seq")

    def __init__(self, epoch: str, seq: int, prev: int, born: float) -> None:
        self.epoch = epoch
        self.seq = seq
        self.prev = prev
        self.born = born
        self.gone: Literal["", "erased", "trimmed", "lost"] = ""

    def __repr__(self) -> str:
        return f"<{self.epoch}.{self.seq} prev {self.prev} {self.gone}>"


def _seq(record: Record) -> int:
    return record.seq


class View:
    """A prefix of what happened to the log: the leader's is the whole, a replica's may end earlier."""

    def __init__(self) -> None:
        self.epoch = "e0"
        self.first = 1
        self.last = 0
        self.records: list[Record] = []

    def apply(self, operation: tuple[Any, ...]) -> None:
        kind = operation[1]
        if kind == "append":
            _, _, seq, record = operation
            self.last = seq
            if record is not None:
                self.records.append(record)
        elif kind == "erase":
            if operation[2] in self.records:
                self.records.remove(operation[2])
        elif kind == "trim":
            self.first = operation[2]
            self.records = [record for record in self.records if record.seq >= self.first]
        elif kind == "recreate":
            self.epoch, self.first, self.last, self.records = operation[2], 1, 0, []
        else:
            self.last = operation[2]
            self.records = [record for record in self.records if record.seq <= self.last]
            self.first = min(self.first, self.last + 1)

    def state(self) -> LogState:
        return LogState(self.epoch, self.first, self.last)

    def head(self) -> int:
        return self.records[-1].seq if self.records else 0

    def since(self, seq: int, limit: int) -> tuple[list[Record], bool]:
        start = bisect_left(self.records, seq, key=_seq)
        return self.records[start : start + limit], len(self.records) > start + limit


class Replica(View):
    def __init__(self) -> None:
        super().__init__()
        self.applied = 0
        self.lag = 0.0


class Device:
    """What a device holds: a cursor. It keeps the books of what it was shown and complains."""

    def __init__(self, world: World, name: int) -> None:
        self.world = world
        self.name = name
        self.cursor: Cursor | None = None
        self.session: Session | None = None
        self.deceived = False
        """The log went back below what this device holds; what it sees until the next reset proves nothing."""

    def receive(self, frame: tuple[Any, ...]) -> None:
        kind, prev, cursor, record = frame
        if kind in {"ready", "reset"}:
            if kind == "reset":
                self.deceived = False
            elif self.cursor is not None and cursor != self.cursor:
                raise Broken(f"resumed at {cursor} where {self.cursor} was asked for")
            self.cursor = cursor
            return
        held = self.cursor
        if held is None:
            raise Broken(f"{kind} {cursor} before ready or reset")
        if prev != held.seq:
            raise Broken(f"{kind} {cursor} says it follows {prev}, the device holds {held}")
        if record is not None and cursor.seq <= held.seq:
            raise Broken(f"{record} after {held}: doubled or out of order")
        if cursor.seq < held.seq:
            raise Broken(f"{kind} goes back from {held} to {cursor}")
        self.cursor = cursor
        if (record is not None and (record.gone == "lost" or record.epoch != cursor.epoch)) or (
            cursor.epoch == self.world.leader.epoch and cursor.seq > self.world.leader.last
        ):
            self.deceived = True
        if not self.deceived:
            self.world.no_hole(held, cursor.seq - (record is not None), f"device {self.name}: {kind}")


# --- a session: the port of a feed, its socket and its questions


@dataclass(frozen=True)
class Rules:
    """What is being tried: the feed, and a driver with or without a mistake."""

    feed: Callable[..., Feed] = Feed
    subscribe_late: bool = False
    revoke_frames: bool = False


class Session:
    """One connection of a device: implements `Port`."""

    def __init__(self, world: World, device: Device, hello: Cursor | Literal["start"] | None) -> None:
        self.world = world
        self.device = device
        self.hello = hello
        self.queue: deque[tuple[Any, ...]] = deque()
        self.blocked = False
        self.draining = False
        self.stalled_until = 0.0
        self.fifo_at = 0.0
        self.cut_until = 0.0
        self.open = True
        self.sent: Cursor | None = None
        self.settled_at = 0.0  # when it was last (re)set or joined
        self.restarts = 0
        self.feed = world.rules.feed(self, world.counters, parked_limit=world.scenario.parked_limit)
        self.subscribed_at: float | None = None
        if not world.rules.subscribe_late:
            self.subscribe()
        self.born = world.now
        if isinstance(hello, Cursor):
            self.sent = hello
        self.watched_at_hello = world.watched
        world.after(world.latency(), lambda: self.feed.hello(hello))
        world.after(CHECK_SECONDS * world.rng.random(), self.tick)

    def subscribe(self) -> None:
        # A confirmed SUB on one server says nothing about when the leader's server knows of it.
        self.subscribed_at = self.world.now + self.world.rng.random() * self.world.scenario.race_seconds

    def tick(self) -> None:
        if self.open:
            self.feed.check()
            self.world.after(CHECK_SECONDS, self.tick)

    def close(self) -> None:
        self.open = False
        self.feed.close()

    # live copies

    def hears(self, record: Record) -> None:
        world, rng, knobs = self.world, self.world.rng, self.world.knobs
        if self.subscribed_at is None or world.now < self.subscribed_at or world.now < self.cut_until:
            return
        if rng.random() < knobs.loss:
            return
        for _ in range(2 if rng.random() < knobs.duplicate else 1):
            delay = 0.001 + 0.004 * rng.random()
            if rng.random() < knobs.disorder:
                delay += rng.choice((0.02, 0.3, 1.0))
                at = world.now + delay
            else:
                at = self.fifo_at = max(self.fifo_at + 1e-6, world.now + delay)
            world.at(at, lambda r=record: self.live(r))

    def live(self, record: Record) -> None:
        if record.gone != "lost":
            self.feed.live(record.seq, record.prev, record)

    # the socket

    def write(self, kind: str, cursor: Cursor, record: Record | None = None) -> None:
        prev = self.sent.seq if self.sent is not None else 0
        self.queue.append((kind, prev, cursor, record))
        self.sent = cursor
        if not self.draining:
            self.draining = True
            self.world.after(self.world.knobs.drain_seconds, self.drain)

    def drain(self) -> None:
        if not self.open:
            return
        if self.world.now < self.stalled_until:
            self.world.at(self.stalled_until, self.drain)
            return
        if self.queue:
            self.device.receive(self.queue.popleft())
        if self.blocked and self.has_room():
            self.blocked = False
            self.feed.writable()
        self.draining = bool(self.queue) or self.blocked
        if self.draining:
            self.world.after(self.world.knobs.drain_seconds, self.drain)

    def has_room(self) -> bool:
        return len(self.queue) < self.world.knobs.room

    def room(self) -> bool:
        if self.has_room():
            return True
        self.blocked = True
        return False

    def deliver(self, seq: int, message: Record) -> bool:  # type: ignore[override]
        if not self.room():
            if self.world.rules.revoke_frames:
                self.queue = deque(frame for frame in self.queue if frame[0] != "record")
            return False
        if seq != message.seq:
            raise Broken(f"{message} sent as {seq}")
        self.write("record", Cursor(self.feed.epoch, seq), message)
        return True

    def resumed(self, cursor: Cursor) -> None:
        if self.hello is None or (isinstance(self.hello, Cursor) and cursor != self.hello):
            raise Broken(f"resumed at {cursor} after a hello with {self.hello}")
        leader = self.world.leader
        if self.hello == "start" and cursor.epoch == leader.epoch and cursor.seq >= leader.first:
            raise Broken(f"start at {cursor} leaves out what begins at {leader.first}")
        self.settled_at = self.world.now
        self.write("ready", cursor)

    def caught_up(self, cursor: Cursor) -> None:
        self.write("live", cursor)
        told = self.watched_at_hello
        if self.world.now < self.world.applying_until + 1.0 or self.world.went_back_since(self.born):
            told = None  # the leader itself may have shown less, or does by now
        if told is not None and told.epoch == cursor.epoch and self.restarts == 0 and not self.device.deceived:
            # What the leader told before the hello is the least that must have been shown by now.
            self.world.no_hole(cursor, told.last_seq, f"device {self.device.name}: caught up at {cursor}")
        if self.subscribed_at is None:
            self.subscribe()

    def reset(self, reason: ResetReason, snapshot: Snapshot, cursor: Cursor) -> None:
        world, leader = self.world, self.world.leader
        checkpoint = snapshot.checkpoint
        if checkpoint is not None and checkpoint.epoch != cursor.epoch:
            raise Broken(f"a snapshot at {checkpoint} with the cursor {cursor}")
        if cursor.epoch == leader.epoch and not (reason is ResetReason.NEW and checkpoint is None):
            covered = checkpoint or Cursor(cursor.epoch, 0)
            if cursor.seq < covered.seq:
                raise Broken(f"reset to {cursor}, before its snapshot at {checkpoint}")
            if any(covered.seq < record.seq <= cursor.seq for record in leader.records):
                raise Broken(f"reset to {cursor} leaves out what its snapshot at {checkpoint} does not show")
        self.restarts += 1
        self.settled_at = world.now
        self.device.deceived = False
        self.queue.clear() if world.rules.revoke_frames else None
        self.write("reset", cursor)

    def justify(self, reason: ResetReason) -> None:
        leader, held, deceived = self.world.leader, self.sent, self.device.deceived
        if reason is ResetReason.NEW:
            just = self.hello is None and held is None
        elif held is None:
            just = self.hello == "start" and reason is not ResetReason.FUTURE
        elif reason is ResetReason.EPOCH:
            just = held.epoch != leader.epoch
        elif reason is ResetReason.FUTURE:
            just = deceived or held.seq > leader.last or self.world.went_back_since(self.born)
        else:
            just = leader.first > self.feed.last + 1 or leader.epoch != held.epoch
        if not just:
            raise Broken(f"reset({reason.value}) of a session at {held} while the log is {leader.state()}")

    # questions

    def ask(self, ask: Ask, serve: Callable[[], Callable[[], None]], generation: int, *, leader: bool) -> None:
        """`serve` runs when the server answers and gives what to do when the answer arrives."""
        world = self.world

        def served() -> None:
            lost = world.rng.random() < world.knobs.failure or world.now < self.cut_until
            if lost or (leader and world.now < world.leaderless_until):
                world.after(0.25, lambda: self.feed.failed(generation, ask))
            else:
                world.after(world.latency(), serve())

        world.after(world.latency(), served)

    def want_head(self, generation: int, ask: Ask) -> None:
        world, feed = self.world, self.feed

        def by_leader() -> Callable[[], None]:
            state, head = world.leader_state(), world.leader.head()
            return lambda: feed.head(generation, ask, head, state.last_seq, state)

        def by_replica(state: LogState) -> Callable[[], Callable[[], None]]:
            def serve() -> Callable[[], None]:
                view = world.replica()
                head, up_to = view.head(), view.last
                return lambda: feed.head(generation, ask, head, up_to, state)

            return serve

        def check() -> Callable[[], None]:
            state = world.leader_state()
            return lambda: self.ask(ask, by_replica(state), generation, leader=False)

        if ask is Ask.LEADER:
            self.ask(ask, by_leader, generation, leader=True)
        elif ask is Ask.CHECK:
            self.ask(ask, check, generation, leader=True)
        elif world.watched is None:
            world.after(0.1, lambda: self.want_head(generation, ask))
        else:
            self.ask(ask, by_replica(world.watched), generation, leader=False)

    def want_page(self, generation: int, seq: int) -> None:
        def serve() -> Callable[[], None]:
            records, more = self.world.replica().since(seq, self.world.knobs.page)
            return lambda: self.feed.page(generation, records, more)

        self.ask(Ask.PAGE, serve, generation, leader=False)

    def want_next(self, generation: int, seq: int) -> None:
        def serve() -> Callable[[], None]:
            records, _ = self.world.leader.since(seq, 1)
            found = records[0] if records and records[0].seq <= self.world.leader_state().last_seq else None
            return lambda: self.feed.next(generation, found)

        self.ask(Ask.NEXT, serve, generation, leader=True)

    def want_state(self, generation: int) -> None:
        def serve() -> Callable[[], None]:
            state = self.world.leader_state()
            return lambda: self.feed.leader(generation, state)

        self.ask(Ask.STATE, serve, generation, leader=True)

    def want_snapshot(self, generation: int, reason: ResetReason) -> None:
        world = self.world
        self.justify(reason)

        def answer() -> None:
            snapshot = None if world.rng.random() < world.knobs.no_snapshot else Snapshot(world.checkpoint())
            world.after(world.latency(), lambda: self.feed.snapshot(generation, snapshot))

        world.after(world.latency(), answer)

    def later(self, generation: int, delay_seconds: float, ask: Ask) -> None:
        self.world.after(delay_seconds, lambda: self.feed.timer(generation, ask))


# --- the world


class World:
    """Time, the log, and everybody who looks at it."""

    def __init__(self, scenario: Scenario, rules: Rules) -> None:
        self.scenario = scenario
        self.rules = rules
        self.rng = Random(scenario.seed ^ 0x5EA)
        self.knobs = _Knobs.of(scenario)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.counters = FeedCounters()
        self.leader = View()
        self.replicas = [Replica(), Replica()]
        self.operations: list[tuple[Any, ...]] = []
        self.history: dict[str, list[Record]] = {"e0": []}
        self.leaderless_until = 0.0
        self.applying_until = 0.0
        self.quiet_watches = 0  # answers of the watch until publishing goes on
        self.back_at = -1e9
        self.rebuild_at = 0.0  # projections show the old incarnation until then
        self.projected = Cursor("e0", 0)
        self.watched: LogState | None = None
        self.watched_at = 0.0  # when its answer was given
        self.trimmed_at = -1.0
        self.devices = [Device(self, name) for name in range(scenario.devices)]
        trouble = (scenario.loss, scenario.disorder, scenario.duplicate, scenario.failure, scenario.slow_answers)
        self.lossless = not any(trouble) and scenario.room >= 256 and scenario.drain_seconds <= 0.001
        self.lossless = self.lossless and all(step.kind in LOSSLESS_KINDS for step in scenario.steps)
        self.prompt = scenario.race_seconds == 0.0 and scenario.lag_seconds <= 0.05 and scenario.latency_seconds <= 0.01
        self.prompt = self.prompt and not any(step.kind in {"lag", "recreate"} for step in scenario.steps)
        for replica in self.replicas:
            replica.lag = scenario.lag_seconds * self.rng.random()
        self.begin()

    # time

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (when, self.count, what))

    def after(self, delay: float, what: Callable[[], None]) -> None:
        self.at(self.now + delay, what)

    def run_until(self, when: float) -> None:
        heap = self.heap
        while heap and heap[0][0] <= when:
            self.now, _, what = heapq.heappop(heap)
            what()
        self.now = when

    def latency(self) -> float:
        if self.rng.random() < self.knobs.slow_answers:
            return 0.2 + self.rng.random()
        return 0.001 + self.knobs.latency_seconds * self.rng.random()

    # the log

    def operate(self, *operation: Any, born: float | None = None) -> None:
        self.operations.append((self.now if born is None else born, *operation))
        self.leader.apply(self.operations[-1])

    def begin(self) -> None:
        """History before anybody looks; devices hold cursors somewhere in it, or none."""
        for number in range(self.scenario.history * 3):
            born = -10_000.0 + number
            if number % 3 == self.scenario.seed % 3:
                self.append(born)
            else:
                self.operate("append", self.leader.last + 1, None, born=born)
        self.projected = Cursor("e0", self.leader.last)
        for device in self.devices:
            choice = self.rng.random()
            if choice < 0.7:
                device.cursor = Cursor("e0", self.rng.randint(0, self.leader.last))
        if self.leader.records and self.rng.random() < 0.3:
            # As far as the first cursors, around them and beyond.
            self.trim(self.rng.randint(1, self.leader.last + 1))
        self.ask_watch()

    def append(self, born: float | None = None) -> Record:
        leader = self.leader
        record = Record(leader.epoch, leader.last + 1, leader.head(), self.now if born is None else born)
        self.history[leader.epoch].append(record)
        self.operate("append", record.seq, record, born=born)
        return record

    def trim(self, first: int) -> None:
        young = next((r.seq for r in self.leader.records if r.born > self.now - YOUNG_SECONDS), self.leader.last + 1)
        first = min(first, young, self.leader.last + 1)
        if first <= self.leader.first:
            return
        for record in self.leader.records:
            if record.seq < first:
                record.gone = "trimmed"
        self.operate("trim", first)

    def replica(self) -> View:
        """Whoever answers a Direct Get: one of the replicas, or the leader."""
        chosen = self.rng.randrange(3)
        if chosen == 2:
            return self.leader
        replica = self.replicas[chosen]
        operations, until = self.operations, self.now - replica.lag
        while replica.applied < len(operations) and operations[replica.applied][0] <= until:
            replica.apply(operations[replica.applied])
            replica.applied += 1
        return replica

    def all_at_once(self) -> None:
        """No server shows the log of before any more."""
        for replica in self.replicas:
            for operation in self.operations[replica.applied :]:
                replica.apply(operation)
            replica.applied = len(self.operations)

    def leader_state(self) -> LogState:
        state = self.leader.state()
        if self.now < self.applying_until:
            return state._replace(last_seq=max(state.last_seq - 3, state.first_seq - 1))
        return state

    def went_back_since(self, moment: float) -> bool:
        return self.back_at >= moment - 20.0

    def no_hole(self, held: Cursor, up_to: int, what: str) -> None:
        """Every record in (held, up_to] has gone on purpose."""
        records = self.history[held.epoch]
        start = bisect_right(records, held.seq, key=_seq)
        for record in records[start:]:
            if record.seq > up_to:
                break
            if record.gone in {"", "trimmed"}:
                raise Broken(f"{what}: {record} was left out after {held}")

    def checkpoint(self) -> Cursor:
        """Where the projections stand: behind, and after an incident at a place the log does not know."""
        if self.now >= self.rebuild_at:
            until = self.now - self.scenario.projection_lag_seconds
            seq = self.projected.seq if self.projected.epoch == self.leader.epoch else 0
            seq = min(seq, self.leader.last)
            for operation in reversed(self.operations):
                if operation[1] in {"recreate", "back"}:
                    break
                if operation[1] == "append" and operation[0] <= until:
                    seq = max(seq, operation[2])
                    break
            self.projected = Cursor(self.leader.epoch, seq)
        return self.projected

    # the watch

    def ask_watch(self) -> None:
        def served() -> None:
            if self.now < self.leaderless_until:
                self.after(0.5, self.ask_watch)
                return
            state, asked = self.leader_state(), self.now
            self.after(self.latency(), lambda: answered(state, asked))

        def answered(state: LogState, asked: float) -> None:
            self.watched, self.watched_at = state, asked
            for device in self.devices:
                if device.session is not None:
                    device.session.feed.watch(state)
            if self.quiet_watches:
                self.quiet_watches -= 1
                if not self.quiet_watches:
                    self.expect_told()
            self.after(WATCH_SECONDS, self.ask_watch)

        self.after(self.latency(), served)

    def expect_told(self) -> None:
        """The log went back a while ago: no session that was there still holds what is beyond its end."""
        for device in self.devices:
            session = device.session
            if session is not None and session.born < self.back_at and session.sent is not None:
                beyond = session.sent.epoch == self.leader.epoch and session.sent.seq > self.leader.last
                if beyond and session.feed.state is not State.RESET:
                    raise Broken(f"device {device.name} at {session.sent} was not told that the log went back")

    # steps

    def step(self, step: Step) -> None:
        getattr(self, f"do_{step.kind}")(self.devices[step.a % len(self.devices)], step.a, step.b)

    def do_publish(self, device: Device, a: int, b: int) -> None:
        if self.quiet_watches:
            return
        for _ in range(1 + b % 4):
            record = self.append()
            for other in self.devices:
                if other.session is not None:
                    other.session.hears(record)
                    if self.lossless:
                        self.expect(other.session, record)

    def expect(self, session: Session, record: Record) -> None:
        def look() -> None:
            sent = session.sent
            owed = session.open and record.gone in {"", "trimmed"}
            if owed and sent is not None and sent.epoch == record.epoch and sent.seq < record.seq:
                raise Broken(f"{record} not shown after {seconds} s to a session at {sent}")

        seconds = PROMPT_SECONDS if self.prompt else LOSSLESS_SECONDS
        self.after(seconds, look)

    def do_others(self, device: Device, a: int, b: int) -> None:
        if not self.quiet_watches:
            for _ in range(1 + b % 8):
                self.operate("append", self.leader.last + 1, None)

    def do_connect(self, device: Device, a: int, b: int) -> None:
        if device.session is not None:
            return
        hello: Cursor | Literal["start"] | None = device.cursor
        if hello is None:
            hello = "start" if b % 2 else None
        device.session = Session(self, device, hello)

    def do_disconnect(self, device: Device, a: int, b: int) -> None:
        if device.session is not None:
            device.session.close()
            device.session = None

    def do_rejoin(self, device: Device, a: int, b: int) -> None:
        """A quick reconnect while the user is being written to."""
        self.do_disconnect(device, a, b)
        if a % 3:
            self.do_publish(device, a, b)
        self.do_connect(device, a, b)
        for delay in (0.005, 0.02, 0.08, 0.3)[b % 3 :]:
            if self.rng.random() < 0.7:
                self.after(delay, lambda: self.do_publish(device, a, self.rng.randrange(4)))

    def do_wait(self, device: Device, a: int, b: int) -> None:
        """A socket that does not move for longer than records are young, while others are written to."""
        if device.session is not None:
            device.session.stalled_until = self.now + 80.0
        self.do_publish(device, a, b)
        self.run_until(self.now + 70.0)
        if not self.quiet_watches:
            self.operate("append", self.leader.last + 1 + 2 * a, None)
            self.run_until(self.now + 6.0)
            self.do_trim(device, 64 if b % 2 else a, b)

    def do_forget(self, device: Device, a: int, b: int) -> None:
        self.do_disconnect(device, a, b)
        device.cursor = None
        device.deceived = False

    def do_cut(self, device: Device, a: int, b: int) -> None:
        session = device.session
        if session is not None:
            session.cut_until = self.now + (0.05, 1.0, 8.0)[b % 3]
            self.at(session.cut_until, session.feed.check)

    def do_erase(self, device: Device, a: int, b: int) -> None:
        if self.leader.records:
            # Mostly one of the newest: it may be under way.
            newest = self.leader.records[-4:] if b % 2 else self.leader.records
            record = newest[a % len(newest)]
            record.gone = "erased"
            self.operate("erase", record)

    def do_trim(self, device: Device, a: int, b: int) -> None:
        if self.watched is not None and self.trimmed_at < self.watched_at:
            middle = (self.watched.first_seq + self.watched.last_seq) // 2
            self.trimmed_at = self.now
            self.trim(min(self.leader.first + 1 + (a % 12 if a < 64 else middle), middle))

    def do_recreate(self, device: Device, a: int, b: int) -> None:
        for record in self.history[self.leader.epoch]:
            record.gone = record.gone or "lost"
        epoch = f"e{int(self.leader.epoch[1:]) + 1}"
        self.checkpoint()
        self.history[epoch] = []
        self.operate("recreate", epoch)
        self.all_at_once()
        self.rebuild_at = self.now + 0.2 * (b % 16)

    def do_back(self, device: Device, a: int, b: int) -> None:
        last = max(self.leader.last - 1 - b % 6, self.leader.first - 1)
        if last >= self.leader.last:
            return
        self.checkpoint()
        for record in self.leader.records:
            if record.seq > last:
                record.gone = "lost"
        # A sequence is used again: the books keep only what counts.
        self.history[self.leader.epoch] = [r for r in self.history[self.leader.epoch] if r.seq <= last]
        for other in self.devices:
            if other.cursor is not None and other.cursor.epoch == self.leader.epoch and other.cursor.seq > last:
                other.deceived = True
            session = other.session
            if session is not None and session.sent is not None and session.sent.seq > last:
                other.deceived = True
        self.operate("back", last)
        self.all_at_once()
        self.back_at = self.now
        self.quiet_watches = 6
        self.leaderless_until = self.applying_until = 0.0
        self.rebuild_at = self.now + 0.2 * (b % 16)

    def do_stall(self, device: Device, a: int, b: int) -> None:
        if device.session is not None:
            device.session.stalled_until = self.now + (0.1, 1.0, 5.0, 20.0)[b % 4]

    def do_lag(self, device: Device, a: int, b: int) -> None:
        self.replicas[a % 2].lag = (0.0, 0.05, 0.5, 3.0)[b % 4]

    def do_leaderless(self, device: Device, a: int, b: int) -> None:
        self.leaderless_until = self.now + (0.3, 2.0, 6.0)[b % 3]

    def do_apply(self, device: Device, a: int, b: int) -> None:
        """A leader just elected has not applied everything yet."""
        if not self.quiet_watches:
            self.applying_until = self.now + 0.2

    def do_pong(self, device: Device, a: int, b: int) -> None:
        session = device.session
        if session is not None:
            cursor = session.feed.advance()
            if cursor is not None:
                session.write("pong", cursor)

    # the end

    def heal(self) -> None:
        """The network works, sockets are quick, nothing is published; everybody is there and stays."""
        self.knobs.heal()
        self.leaderless_until = self.applying_until = 0.0
        for replica in self.replicas:
            replica.lag = 0.0
        for device in self.devices:
            if device.session is None:
                self.do_connect(device, 0, 0)
            elif device.session.stalled_until > self.now:
                device.session.stalled_until = self.now
        self.run_until(self.now + HEAL_SECONDS)
        for device in self.devices:
            self.expect_at_head(device)

    def expect_at_head(self, device: Device) -> None:
        session, cursor, leader = device.session, device.cursor, self.leader
        where = f"device {device.name} at {cursor}, log {leader.state()} head {leader.head()}"
        if session is None or session.feed.state is not State.LIVE:
            raise Broken(f"not live after all: {where}: {session and session.feed.state}")
        if cursor is None or cursor.epoch != leader.epoch:
            raise Broken(f"in another incarnation after all: {where}")
        if cursor.seq < leader.head():
            raise Broken(f"not at the head after all: {where}")
        if not device.deceived:
            self.no_hole(cursor, leader.last, f"device {device.name} in the end")
        if cursor.seq > leader.last:
            raise Broken(f"beyond the end after all: {where}")


@dataclass
class _Knobs:
    """The knobs as they stand now."""

    loss: float
    duplicate: float
    disorder: float
    failure: float
    slow_answers: float
    no_snapshot: float
    latency_seconds: float
    page: int
    room: int
    drain_seconds: float

    @classmethod
    def of(cls, scenario: Scenario) -> _Knobs:
        return cls(**{name: getattr(scenario, name) for name in cls.__dataclass_fields__})

    def heal(self) -> None:
        self.loss = self.duplicate = self.disorder = self.failure = self.slow_answers = self.no_snapshot = 0.0
        self.latency_seconds, self.page, self.room, self.drain_seconds = 0.01, 256, 256, 0.001


def run(scenario: Scenario, rules: Rules | None = None) -> FeedCounters:
    """Play `scenario` to its end.

    Raises:
        Broken: a promise was not kept.
    """
    world = World(scenario, rules or Rules())
    world.run_until(1.0)
    for step in scenario.steps:
        world.run_until(world.now + step.gap)
        world.step(step)
    world.run_until(world.now + 1.0)
    world.heal()
    return world.counters
