"""Devices and their sessions in the simulated world of `joinsim`: a session is the port of a feed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gateway.join.feed import Ask, Feed, LogState, ResetReason, Snapshot
from seamark.protocol.cursor import Cursor
from tests.support.joinlog import Broken, Record, incarnation

if TYPE_CHECKING:
    from tests.support.joinsim import World

CHECK_SECONDS = 30.0
"""Between two checks that a session's owner asks for."""


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
        if record is not None and incarnation(record.epoch) < incarnation(cursor.epoch):
            raise Broken(f"{record} of a log that is no more was shown as {cursor}")
        if (record is not None and (record.gone == "lost" or record.epoch != cursor.epoch)) or (
            cursor.epoch == self.world.leader.epoch and cursor.seq > self.world.leader.last
        ):
            self.deceived = True
        if not self.deceived:
            self.world.no_hole(held, cursor.seq - (record is not None), f"device {self.name}: {kind}")


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
        self.reason = ResetReason.NEW if device.cursor is None else ResetReason.SNAPSHOT
        self.queue: deque[tuple[Any, ...]] = deque()
        self.blocked = False
        self.draining = False
        self.stalled_until = 0.0
        self.fifo_at = 0.0
        self.cut_until = 0.0
        self.open = True
        self.sent: Cursor | None = None
        self.copy: Record | None = None
        self.restarts = 0
        self.feed = world.rules.feed(self, world.counters, parked_limit=world.scenario.parked_limit)
        self.subscribed_at: float | None = None
        if not world.rules.subscribe_late:
            self.subscribe()
        self.born = world.now
        if isinstance(hello, Cursor):
            self.sent = hello
        self.watched_at_hello = world.watched
        world.after(world.latency(), lambda: self.feed.hello(hello, self.reason))
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
        if record.gone != "lost" or record.epoch != self.world.leader.epoch:
            self.copy = record
            self.feed.live(record.seq, record.prev, record, record.epoch)
            self.copy = None

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
        if message is self.copy and message.epoch != self.feed.epoch:
            raise Broken(f"{message} taken for one of another log: {self.feed.epoch}")
        self.write("record", Cursor(self.feed.epoch, seq), message)
        return True

    def resumed(self, cursor: Cursor) -> None:
        if self.hello is None or (isinstance(self.hello, Cursor) and cursor != self.hello):
            raise Broken(f"resumed at {cursor} after a hello with {self.hello}")
        leader = self.world.leader
        if self.hello == "start" and cursor.epoch == leader.epoch and cursor.seq >= leader.first:
            raise Broken(f"start at {cursor} leaves out what begins at {leader.first}")
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
        leader = self.world.leader
        checkpoint = snapshot.checkpoint
        if checkpoint is not None and checkpoint.epoch != cursor.epoch:
            raise Broken(f"a snapshot at {checkpoint} with the cursor {cursor}")
        if cursor.epoch == leader.epoch:
            covered = checkpoint or Cursor(cursor.epoch, 0)
            if cursor.seq < covered.seq:
                raise Broken(f"reset to {cursor}, before its snapshot at {checkpoint}")
            if any(covered.seq < record.seq <= cursor.seq for record in leader.records):
                raise Broken(f"reset to {cursor} leaves out what its snapshot at {checkpoint} does not show")
        self.restarts += 1
        self.device.deceived = False
        self.write("reset", cursor)

    def justify(self, reason: ResetReason) -> None:
        leader, held, deceived = self.world.leader, self.sent, self.device.deceived
        if reason in (ResetReason.NEW, ResetReason.SNAPSHOT):
            just = self.hello is None and held is None and reason is self.reason
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

        def by_leader(state: LogState) -> Callable[[], Callable[[], None]]:
            def serve() -> Callable[[], None]:
                head = world.leader.head()
                return lambda: feed.head(generation, ask, head, state.last_seq, state)

            return serve

        def by_replica(state: LogState) -> Callable[[], Callable[[], None]]:
            def serve() -> Callable[[], None]:
                view = world.replica()
                head = view.head()
                # The server says how far it got only after the head of some user, be it another one asked with this.
                up_to = view.last if head or world.rng.random() < 0.5 else 0
                return lambda: feed.head(generation, ask, head, up_to, state)

            return serve

        def state_first() -> Callable[[], None]:
            state = world.leader_state()
            if ask is Ask.LEADER:
                return lambda: self.ask(ask, by_leader(state), generation, leader=True)
            return lambda: self.ask(ask, by_replica(state), generation, leader=False)

        if ask is not Ask.OPENING:
            self.ask(ask, state_first, generation, leader=True)
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
