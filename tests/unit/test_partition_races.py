"""The partition reader against a simulated consumer: no order of messages, answers, failures and take-overs loses a message.

Two readers with workers share one store. Every answer and every message waits until the machine lets it through, so that
anything may happen between any two awaits; at the end all is let through in order, and everything must be applied.
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.broker.jetstream import Stored, StreamState
from engine.broker.settings import NatsSettings
from engine.errors import ApiError, BrokerError, StepDown, Unanswered, Unavailable
from engine.partition import pulls
from engine.partition import reader as partition
from engine.partition.reader import Delivered, PartitionReader, Phase, Source

pytestmark = pytest.mark.timeout(300)

SOURCE = Source("EV", "reader", "ev.0.>")
PIN_TIMEOUT_SECONDS = 4.0
TRAFFIC_SECONDS = 60.0
"""How long messages may go on while one is missing: some pin time-outs, silences and growing pauses after failures."""


class Pull(NamedTuple):
    """An order that waits at the consumer; `left` messages of it."""

    reader: int
    pin: str
    left: int
    expires: float


class Call(NamedTuple):
    """An answer that is due: `outcome` acts on the server and gives it."""

    kind: str
    outcome: Callable[[], Any]
    answer: "asyncio.Future[Any]"


class Consumer:
    """A pinned pull consumer without acks, as the server runs it: a head, a sequence of its own, pulls in a queue.

    `whole`: it has no filter, and brings what is no message of the partition, too.
    """

    def __init__(self) -> None:
        self.whole = False
        self.messages: list[int] = []
        self.last_seq = 0
        self.head = 1
        self.consumer_seq = 1
        self.pin = ""
        self.pinned_at = 0.0
        self.pulls: list[Pull] = []
        self.pins = itertools.count(1)
        self.sent: list[list[tuple[bytes, bytes]]] = [[], []]

    def publish(self, gap: int) -> None:
        self.last_seq += gap
        self.messages.append(self.last_seq)

    def next(self, seq: int) -> int | None:
        return next((message for message in self.messages if message >= seq), None)

    def reset(self, seq: int) -> None:
        self.head, self.consumer_seq = seq, 1

    def status(self, reader: int, line: str, left: int = 0) -> None:
        self.sent[reader].append((b"", f"NATS/1.0 {line}\r\nNats-Pending-Messages: {left}\r\n\r\n".encode()))

    def order(self, reader: int, body: dict[str, Any], now: float) -> None:
        pin = body.get("id", "")
        if self.pin and pin == self.pin:
            self.pinned_at = now
        elif self.pin and pin:
            self.sent[reader].append((b"", b"NATS/1.0 423 Nats-Pin-Id mismatch\r\n\r\n"))
            return
        self.pulls.append(Pull(reader, pin, body["batch"], now + body["expires"] / 1e9))

    def deliver(self, now: float) -> bool:
        """Send the next message to whom it is due, if anybody."""
        seq = self.next(self.head) if not self.whole else self.head if self.head <= self.last_seq else None
        while seq is not None:
            wanted = [pull for pull in self.pulls if pull.pin in ("", self.pin) or not self.pin]
            stale = next((pull for pull in self.pulls if pull.pin and pull.pin != self.pin), None)
            if stale is not None:
                self.pulls.remove(stale)
                self.status(stale.reader, "423 Nats-Wrong-Pin-Id", stale.left)
                continue
            pull = next((pull for pull in wanted if pull.pin == self.pin), None)
            if pull is None:
                return False
            if not self.pin:
                self.pin, self.pinned_at = f"pin{next(self.pins)}", now
            self.pulls.remove(pull)
            if pull.left > 1:
                self.pulls.insert(0, pull._replace(pin=self.pin, left=pull.left - 1))
            else:
                self.status(pull.reader, "409 Batch Completed")
            reply = f"$JS.ACK.EV.reader.1.{seq}.{self.consumer_seq}.0.0".encode()
            message = (reply, f"NATS/1.0\r\nNats-Pin-Id: {self.pin}\r\n\r\n".encode())
            # The status of a completed batch comes behind its last message.
            queue = self.sent[pull.reader]
            queue.insert(len(queue) - (pull.left <= 1), message)
            self.head, self.consumer_seq = seq + 1, self.consumer_seq + 1
            return True
        return False

    def expire(self, now: float) -> None:
        for pull in [pull for pull in self.pulls if pull.expires <= now]:
            self.pulls.remove(pull)
            self.status(pull.reader, "408 Request Timeout", pull.left)
        if self.pin and now - self.pinned_at >= PIN_TIMEOUT_SECONDS:
            self.pin = ""


class SimBroker:
    """One process's connection to the consumer."""

    def __init__(self, machine: "Machine", number: int) -> None:
        self._machine = machine
        self._number = number
        self.settings = NatsSettings("nats://nowhere")
        self.connected = True
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_leader_change: list[Callable[[str, str], None]] = []
        self.inbox: Callable[[bytes, bytes, bytes, bytes], None] | None = None

    def subscribe(self, subject: str, callback: Any) -> Any:
        if subject.startswith("_INBOX"):
            self.inbox = callback
        return SimpleNamespace(unsubscribe=lambda: None)

    def publish(self, subject: str, payload: bytes, *, reply: str) -> None:
        if not self.connected:
            raise Unavailable
        self._machine.consumer.order(self._number, json.loads(payload), self._machine.now)

    async def ask(self, kind: str, outcome: Callable[[], Any]) -> Any:
        if not self.connected:
            raise Unavailable
        return await self._machine.wait(kind, outcome)

    async def api(self, method: str, body: Any = None, *, timeout_seconds: float = 5.0) -> Any:
        consumer = self._machine.consumer
        if method.startswith("CONSUMER.RESET"):
            return await self.ask("reset", lambda: consumer.reset(body["seq"]))
        assert method.startswith("CONSUMER.INFO")
        return await self.ask("info", lambda: {"priority_groups": [{"pinned_client_id": consumer.pin}]})

    async def stream(self, name: str) -> StreamState:
        return await self.ask("stream", lambda: StreamState(name, "e", 1, 1, self._machine.consumer.last_seq, 0, {}))

    async def leader_next(self, stream: str, subject: str, seq: int) -> Stored | None:
        def outcome() -> Stored | None:
            found = self._machine.consumer.next(seq)
            return None if found is None else Stored(subject, found, "", b"", b"")

        return await self.ask("next", outcome)


class Worker:
    """Applies batches to the shared store, which refuses whoever was not the last to acquire it."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._token: object = None

    async def acquire(self) -> int:
        def outcome() -> int:
            self._token = self._machine.owner = object()
            return self._machine.next_seq

        return await self._machine.wait("acquire", outcome)

    async def position(self) -> int:
        return await self._machine.wait("position", lambda: self._machine.next_seq)

    def check(self, state: StreamState) -> None:
        """Nothing is ever wrong with the stream."""

    async def pass_over(self, seq: int) -> None:
        await self._machine.wait("pass over", lambda: self._machine.pass_over(self._token, seq))

    async def handle(self, batch: list[Delivered]) -> None:
        for message in batch:
            await self._machine.wait("apply", lambda message=message: self._machine.apply(self._token, message.seq))


class Machine(RuleBasedStateMachine):
    """What may happen to two readers of one partition."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.consumer = Consumer()
        self.calls: list[Call] = []
        self.sleeping: list[tuple[float, asyncio.Future[None]]] = []
        self.owner: object = None
        self.next_seq = 1
        self.applied: list[int] = []
        self.brokers = [SimBroker(self, i) for i in range(2)]
        self.tasks: list[asyncio.Task[None]] = []
        self.readers: list[PartitionReader] = []
        clock = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
        simulated = SimpleNamespace(**{name: getattr(asyncio, name) for name in ("Event", "create_task", "gather")})
        simulated.sleep = self.sleep
        self.patches = [
            mock.patch.object(partition, "asyncio", simulated),
            mock.patch.object(partition, "time", clock),
            mock.patch.object(pulls, "time", clock),
            mock.patch.object(partition, "PULL_BATCH", 3),
            mock.patch.object(partition, "KEEP_POSITION_SECONDS", 3.0),
            mock.patch.object(pulls, "PULL_BATCH", 3),
            mock.patch.object(partition, "_log", mock.MagicMock()),
        ]
        for patch in self.patches:
            patch.start()

    # --- the world -----------------------------------------------------------------------------------------------------

    async def wait(self, kind: str, outcome: Callable[[], Any]) -> Any:
        call = Call(kind, outcome, asyncio.get_running_loop().create_future())
        self.calls.append(call)
        return await call.answer

    async def sleep(self, seconds: float) -> None:
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sleeping.append((self.now + seconds, wake))
        await wake

    def apply(self, token: object, seq: int) -> None:
        if token is not self.owner:
            raise StepDown("another owner")
        assert seq == self.consumer.next(self.next_seq), "a message came again, or one was passed over"
        self.applied.append(seq)
        self.next_seq = seq + 1

    def pass_over(self, token: object, seq: int) -> None:
        if token is not self.owner:
            raise StepDown("another owner")
        due = self.consumer.next(self.next_seq)
        assert due is None or due > seq, "a message was passed over"
        self.next_seq = max(self.next_seq, seq + 1)

    def spin(self) -> None:
        """Let everyone run until all wait."""
        for _ in range(12):
            self.loop.run_until_complete(asyncio.sleep(0))

    def settle(self, call: Call, error: BrokerError | None = None, *, done: bool = True) -> None:
        self.calls.remove(call)
        if call.answer.cancelled():
            return
        try:
            value = call.outcome() if done else None
            if error:
                raise error
            call.answer.set_result(value)
        except BrokerError as raised:
            call.answer.set_exception(raised)
        except StepDown as raised:
            call.answer.set_exception(raised)
        self.spin()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.consumer.expire(self.now)
        for due in [due for due in self.sleeping if due[0] <= self.now]:
            self.sleeping.remove(due)
            if not due[1].done():
                due[1].set_result(None)
        self.spin()

    def transmit(self, reader: int) -> None:
        reply, headers = self.consumer.sent[reader].pop(0)
        inbox = self.brokers[reader].inbox
        assert inbox is not None
        if self.brokers[reader].connected:
            ours = not reply or int(reply.split(b".")[5]) in self.consumer.messages
            inbox(b"ev.0.one" if ours else b"ev.1.other", reply, headers, b"x")
        self.spin()

    # --- what may happen -----------------------------------------------------------------------------------------------

    @initialize(whole=st.booleans())
    def start(self, whole: bool = False) -> None:
        self.consumer.whole = whole
        for broker in self.brokers:
            reader = PartitionReader(broker, SOURCE, Worker(self), pin_timeout_seconds=PIN_TIMEOUT_SECONDS)  # type: ignore[arg-type]
            self.readers.append(reader)
            self.tasks.append(self.loop.create_task(reader.run(), name="reader"))
        self.spin()
        for _ in range(8):
            self.consumer.publish(1)
        for _ in range(6):
            self.go_well(deliveries=1)

    @rule(gaps=st.lists(st.integers(1, 3), min_size=1, max_size=5))
    def messages_are_published(self, gaps: list[int]) -> None:
        for gap in gaps:
            self.consumer.publish(gap)

    @rule(count=st.integers(1, 3))
    def messages_of_other_partitions_are_published(self, count: int) -> None:
        self.consumer.last_seq += count

    @rule(count=st.integers(1, 6))
    def the_consumer_sends(self, count: int) -> None:
        for _ in range(count):
            self.consumer.deliver(self.now)

    @rule(reader=st.integers(0, 1), count=st.integers(1, 6))
    def a_reader_receives(self, reader: int, count: int) -> None:
        for _ in range(min(count, len(self.consumer.sent[reader]))):
            self.transmit(reader)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), fate=st.sampled_from(["done"] * 6 + ["lost", "answer lost", "refused"]))
    def a_call_is_answered(self, data: st.DataObject, fate: str) -> None:
        call = self.calls[data.draw(st.integers(0, len(self.calls) - 1))]
        errors: dict[str, BrokerError | None] = {"lost": Unanswered(), "answer lost": Unanswered()}
        errors["refused"] = ApiError(503, 10008, "no leader")
        self.settle(call, errors.get(fate), done=fate in ("done", "answer lost"))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 4.5]))
    def time_passes(self, seconds: float) -> None:
        self.advance(seconds)

    @rule(reader=st.integers(0, 1))
    def a_connection_is_cut(self, reader: int) -> None:
        self.brokers[reader].connected = False
        self.consumer.sent[reader].clear()
        self.spin()

    @rule(reader=st.integers(0, 1), pulls_survive=st.booleans())
    def a_connection_is_back(self, reader: int, pulls_survive: bool) -> None:
        if not self.brokers[reader].connected:
            if not pulls_survive:
                self.consumer.pulls = [pull for pull in self.consumer.pulls if pull.reader != reader]
            self.consumer.sent[reader].clear()
            self.brokers[reader].connected = True
            for callback in self.brokers[reader].on_reconnect:
                callback()
            self.spin()

    @rule()
    def an_operator_takes_the_pin_away(self) -> None:
        self.consumer.pin = ""

    @rule(seq=st.integers(1, 30))
    def a_stranger_resets_the_consumer(self, seq: int) -> None:
        self.consumer.reset(seq)

    @rule()
    def the_leader_changes(self) -> None:
        self.consumer.pin = ""
        self.consumer.pulls.clear()
        for broker in self.brokers:
            for callback in broker.on_leader_change:
                callback("EV", "reader")
        self.spin()

    @rule(reader=st.integers(0, 1))
    def messages_in_flight_are_lost(self, reader: int) -> None:
        self.consumer.sent[reader].clear()

    def go_well(self, deliveries: int) -> None:
        for call in list(self.calls):
            if call in self.calls:
                self.settle(call)
        for _ in range(deliveries):
            self.consumer.deliver(self.now)
        for reader in range(2):
            while self.consumer.sent[reader]:
                self.transmit(reader)

    @rule(turns=st.integers(1, 8), deliveries=st.integers(0, 4), gap=st.integers(0, 2))
    def all_goes_well_for_a_while(self, turns: int, deliveries: int, gap: int) -> None:
        for _ in range(turns):
            if gap:
                self.consumer.publish(gap)
            self.go_well(deliveries)

    @rule(turns=st.integers(1, 8))
    def answers_come_but_no_messages(self, turns: int) -> None:
        for _ in range(turns):
            for call in list(self.calls):
                if call in self.calls:
                    self.settle(call)

    # --- what must hold ------------------------------------------------------------------------------------------------

    @invariant()
    def no_reader_has_failed(self) -> None:
        for task in self.tasks:
            assert not task.done(), task

    @invariant()
    def buffers_are_bounded(self) -> None:
        assert all(len(reader._buffer) <= 6 for reader in self.readers)

    def all_comes_though_more_follows(self) -> None:
        """Silence is no help where there is none: messages that follow must not hide that one is missing."""
        if not self.readers:
            return
        self.consumer.publish(1)
        newest, until = self.consumer.messages[-1], self.now + TRAFFIC_SECONDS
        while self.now < until and self.applied[-1:] < [newest]:
            self.go_well(deliveries=100)
            if not self.calls:
                self.consumer.publish(1)
                self.advance(0.25)
        assert self.applied[-1:] >= [newest], f"stalled under traffic: {[reader.phase for reader in self.readers]}"

    def teardown(self) -> None:
        try:
            for reader in range(2 if self.readers else 0):
                self.a_connection_is_back(reader, pulls_survive=True)
            self.all_comes_though_more_follows()
            for _ in range(400 if self.readers else 0):
                if self.applied == self.consumer.messages:
                    break
                self.go_well(deliveries=100)
                if not self.calls:
                    self.advance(0.25)
            self.no_reader_has_failed()
            assert self.applied == self.consumer.messages, f"not everything came: {[r.phase for r in self.readers]}"
            assert all(reader.phase is not Phase.STOPPED for reader in self.readers)
        finally:
            for broker in self.brokers:
                broker.connected = False
            for task in self.tasks:
                task.cancel()
            with contextlib.suppress(Exception):
                self.loop.run_until_complete(asyncio.gather(*self.tasks, return_exceptions=True))
            self.loop.close()
            for patch in self.patches:
                patch.stop()


TestReaders = Machine.TestCase
TestReaders.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


# --- single interleavings ------------------------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Two readers of which one has applied all there is; at the end everything must come, though more follows."""
    one = Machine()
    try:
        one.start()
        while one.applied != one.consumer.messages:
            one.go_well(deliveries=10)
            one.advance(0.1)
        yield one
    finally:
        one.teardown()


def take_over_idle(machine: Machine) -> None:
    """Have a reader chosen by messages that were applied long ago: behind its position there is nothing."""
    claims = machine.owner
    machine.an_operator_takes_the_pin_away()
    machine.a_stranger_resets_the_consumer(1)
    for _ in range(40):
        machine.consumer.deliver(machine.now)
        machine.go_well(deliveries=0)
        machine.advance(0.1)
        waiting = [r for r in machine.readers if r.phase is Phase.READING and r._next_consumer_seq == 1]
        if machine.owner is not claims and waiting and not waiting[0]._doubt and machine.consumer.head > 8:
            return
    raise AssertionError("nobody took over")


@pytest.mark.parametrize("seq", [1, 3, 8])
def test_a_strangers_reset_while_the_first_message_is_still_to_come_hides_no_message(
    machine: Machine, seq: int
) -> None:
    take_over_idle(machine)
    machine.a_stranger_resets_the_consumer(seq)


def test_a_standby_does_not_put_the_reading_head_back_once_somebody_was_chosen(machine: Machine) -> None:
    machine.an_operator_takes_the_pin_away()
    machine.consumer.pulls.clear()
    machine.consumer.publish(1)
    for reader in machine.readers:
        reader._to_standby()
    machine.consumer.pulls.clear()
    for asked in ("info", "position", "next"):
        for _ in range(60):
            if any(call.kind == asked for call in machine.calls):
                break
            machine.advance(0.1)
        # The other reader's watch asks the same; this one's answers are enough.
        call = next(call for call in machine.calls if call.kind == asked)
        machine.calls = [other for other in machine.calls if other is call]
        machine.settle(call)
    machine.consumer.pin, machine.consumer.pinned_at = "somebody's", machine.now
    for call in [call for call in machine.calls if call.kind == "info"]:
        machine.settle(call)
    assert not any(call.kind == "reset" for call in machine.calls)
    machine.consumer.pin = ""


def test_a_strangers_reset_to_what_is_passed_over_hides_no_message(machine: Machine) -> None:
    machine.consumer.whole = True
    take_over_idle(machine)
    machine.messages_are_published([1])
    machine.messages_of_other_partitions_are_published(1)
    machine.a_stranger_resets_the_consumer(machine.consumer.last_seq)
    for _ in range(80):
        machine.go_well(deliveries=1)
        machine.advance(0.25)
    assert machine.applied == machine.consumer.messages
