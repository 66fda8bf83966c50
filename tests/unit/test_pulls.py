"""Pulls: what is on order is counted, never more than two batches, and the end of a pull is told from trouble."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Unavailable
from engine.limits import BUFFERED_PULLS_MAX, PULL_BATCH, PULL_BYTES
from engine.partition.pulls import Pulls
from engine.partition.reader import Delivered, PartitionReader, Phase, Source


class Recorder:
    """A broker that writes down what is ordered."""

    def __init__(self) -> None:
        self.connected = True
        self.refuses = False
        self.orders: list[dict[str, Any]] = []

    def publish(self, subject: str, payload: bytes, *, reply: str) -> None:
        if self.refuses:
            raise Unavailable
        assert (subject, reply) == ("$JS.API.CONSUMER.MSG.NEXT.EV.reader", "_INBOX.x.1")
        self.orders.append(json.loads(payload))


def make() -> tuple[Pulls, Recorder]:
    broker = Recorder()
    return Pulls(broker, "EV", "reader", "_INBOX.x", 2.5), broker  # type: ignore[arg-type]


def status(line: str, pending: int | None = None) -> bytes:
    lines = f"Nats-Pending-Messages: {pending}\r\nNats-Pending-Bytes: 0\r\n" if pending is not None else ""
    return f"NATS/1.0 {line}\r\n{lines}\r\n".encode()


def test_with_the_pin_a_batch_is_ordered_without_it_one_message() -> None:
    pulls, broker = make()
    pulls.order(b"pin", 0, 0)
    other, waiting = make()
    other.order(None, 0, 0)
    assert broker.orders == [
        {"batch": PULL_BATCH, "max_bytes": PULL_BYTES, "group": "owner", "expires": 2_500_000_000, "id": "pin"}
    ]
    assert waiting.orders == [{"batch": 1, "max_bytes": PULL_BYTES, "group": "owner", "expires": 2_500_000_000}]
    other.order(None, 0, 0)
    assert len(waiting.orders) == 1


@given(st.lists(st.sampled_from(["order", "arrived", "handled", "408", "lost", "give up"]), max_size=60))
def test_what_is_on_order_and_buffered_never_exceeds_two_batches(steps: list[str]) -> None:
    pulls, _broker = make()
    buffered = 0
    for step in steps:
        if step == "order":
            pulls.order(b"pin", buffered, 0)
        elif step == "arrived" and pulls.outstanding:
            buffered += 100
            for _ in range(100):
                pulls.arrived()
        elif step == "handled":
            buffered = 0
        elif step == "408":
            pulls.ended(status("408 Request Timeout", 70))
        elif step == "give up":
            pulls.give_up()
            buffered = 0
        assert pulls.outstanding >= 0
        assert pulls.outstanding + buffered <= PULL_BATCH * BUFFERED_PULLS_MAX + 100


def test_large_messages_count_by_their_bytes() -> None:
    pulls, broker = make()
    pulls.order(b"pin", 3, PULL_BYTES + 1)
    assert broker.orders == []


def test_what_cannot_be_sent_is_not_on_order() -> None:
    pulls, broker = make()
    broker.refuses = True
    pulls.order(b"pin", 0, 0)
    broker.refuses, broker.connected = False, False
    pulls.order(b"pin", 0, 0)
    assert (pulls.outstanding, broker.orders) == (0, [])


def test_messages_of_a_pull_that_was_given_up_are_not_owed_to_the_next() -> None:
    pulls, broker = make()
    pulls.order(b"pin", 0, 0)
    pulls.give_up()
    pulls.arrived()
    pulls.order(None, 0, 0)
    assert pulls.outstanding == 1
    assert len(broker.orders) == 2


@pytest.mark.parametrize(
    ("headers", "expected", "left"),
    [
        (status("408 Request Timeout", 400), True, 100),
        (status("409 Batch Completed", 0), True, 500),
        (status("409 Message Size Exceeds MaxBytes", 300), True, 200),
        (status("408 Request Timeout", 900), True, 0),
        (status("409 Consumer Deleted"), False, 0),
        (status("409 Leadership Change", 500), False, 0),
        (status("409 Exceeded MaxWaiting"), False, 0),
        (status("423 Nats-Pin-Id mismatch"), False, 0),
        (status("423 Nats-Wrong-Pin-Id", 500), False, 0),
        (status("503"), False, 0),
        (status("400 Bad Request - Invalid Priority Group"), False, 0),
    ],
)
def test_a_pull_that_ends_by_itself_is_told_from_one_that_was_refused(
    headers: bytes, expected: bool, left: int
) -> None:
    pulls, _ = make()
    pulls.order(b"pin", 0, 0)
    assert pulls.ended(headers) is expected
    assert pulls.outstanding == left


async def test_what_comes_next_is_on_order_while_a_full_buffer_is_handled() -> None:
    on_order = list[int]()

    async def handle(batch: list[Delivered]) -> None:
        on_order.append(reader._pulls.outstanding)

    settings = SimpleNamespace(inbox_prefix="_INBOX")
    broker = SimpleNamespace(settings=settings, connected=True, publish=lambda *_, **__: None)
    reader = PartitionReader(broker, Source("EV", "reader", "ev.0.>"), SimpleNamespace(handle=handle))  # type: ignore[arg-type]
    reader.phase, reader._pin = Phase.READING, b"pin"
    reader._buffer = [Delivered(b"ev.0.a", seq, 0, b"", b"") for seq in range(1, 2 * PULL_BATCH + 1)]
    await reader._handle()
    assert on_order == [PULL_BATCH]
