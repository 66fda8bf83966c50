"""A world in virtual time for `gateway.join.feed`: one log with a leader and two replicas, sessions, sockets and devices.

A `Scenario` is data: knobs of the network and a list of steps. `run` plays it against a `Rules` (which feed class and
which driver to use, so that deliberate mistakes can be put in) and raises `Broken` when a promise is not kept. Every
decision of the network comes from the scenario's own seed, so a run can be repeated.

What the world grants (see the module docstring of `gateway.join.feed`): the front of the log is trimmed only beyond records
a minute old; a stream made anew, or gone back, is so on all servers at once. No live copy of before a stream went back comes
after; those of before it was made anew do.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable
from random import Random
from typing import Any, Literal

from gateway.join.feed import FeedCounters, LogState, State
from seamark.protocol.cursor import Cursor
from tests.support.joinlog import Broken, Projections, Record, Replica, View, incarnation, seq_of
from tests.support.joinscenarios import LOSSLESS_KINDS, Knobs, Scenario, Step
from tests.support.joinsession import Device, Rules, Session

WATCH_SECONDS = 5.0
YOUNG_SECONDS = 60.0
"""Nothing younger is trimmed."""
HEAL_SECONDS = 45.0
"""A check every 30 s, and what it takes to act on it."""
LOSSLESS_SECONDS = 5.0
"""The longest a record may take when no live copy is lost but in the race of a join, and replicas lag."""
PROMPT_SECONDS = 0.9
"""The same without such a race, replicas nearly in step: sooner than the check that follows a join."""


class World:
    """Time, the log, and everybody who looks at it."""

    def __init__(self, scenario: Scenario, rules: Rules) -> None:
        self.scenario = scenario
        self.rules = rules
        self.rng = Random(scenario.seed ^ 0x5EA)
        self.knobs = Knobs.of(scenario)
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
        self.projections = Projections(scenario.projection_lag_seconds)
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
        self.checkpoint()
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
        start = bisect_right(records, held.seq, key=seq_of)
        for record in records[start:]:
            if record.seq > up_to:
                break
            if record.gone in {"", "trimmed"}:
                raise Broken(f"{what}: {record} was left out after {held}")

    def checkpoint(self) -> Cursor:
        return self.projections.checkpoint(self.now, self.leader, self.operations)

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
                    sent = other.session.sent
                    if self.lossless and (sent is None or sent.epoch == record.epoch):
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
        elif b % 16 == 15:
            hello = None  # what it showed is lost, the cursor is not
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
        epoch = f"e{incarnation(self.leader.epoch) + 1}"
        self.checkpoint()
        self.history[epoch] = []
        self.operate("recreate", epoch)
        self.all_at_once()
        self.projections.rebuild_at = self.now + 0.2 * (b % 16)

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
        self.projections.rebuild_at = self.now + 0.2 * (b % 16)

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
