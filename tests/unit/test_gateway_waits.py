"""Whoever waits in a gateway for an answer that others wait for too gets one, whatever goes wrong on the way."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import Raw

from engine.errors import Unavailable
from gateway.access.allowances import Allowances, user_allowance
from gateway.join.port import LogState
from gateway.log.heads import Head, Heads
from gateway.log.live import Live
from gateway.log.partition import Partition
from gateway.log.reader import Reader
from gateway.log.watch import Watch
from gateway.session.state_records import StateRecords
from gateway.stores.counts import Counts
from gateway.stores.snapshots import newest


class Faulty:
    """A broker that meets a fault the first time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def fail_once(self) -> None:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("the transport is closed")

    async def confirmed(self) -> None:
        self.fail_once()

    def subscribe(self, subject: str, callback: Any) -> Any:
        return SimpleNamespace(confirmed=self.confirmed, unsubscribe=lambda: None)

    async def last_by_subjects(self, stream: str, subjects: list[str], timeout_seconds: float) -> Any:
        self.fail_once()
        return SimpleNamespace(seqs={}, up_to=0)

    async def unread_of(self, partition: int, users: list[str]) -> Any:
        self.fail_once()
        return []

    async def stream(self, name: str, timeout_seconds: float) -> Any:
        self.fail_once()
        return SimpleNamespace(epoch="e", first_seq=1, last_seq=1)

    async def next_by_subject(self, *_: Any, **__: Any) -> Any:
        self.fail_once()

    async def leader_next(self, *_: Any, **__: Any) -> Any:
        self.fail_once()

    async def leader_last(self, *_: Any, **__: Any) -> Any:
        self.fail_once()


async def test_a_subscription_that_meets_a_fault_while_it_is_confirmed_is_confirmed_after_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.log.live.CONFIRM_PAUSE_SECONDS", 0.01)
    broker: Any = Faulty()
    live = Live(broker)
    joined = asyncio.Event()
    Partition(broker, 0, live).join(cast("Any", SimpleNamespace(joined=joined.set)), "default", "alice")
    async with asyncio.timeout(20):
        await joined.wait()
    await live.close()


async def test_heads_that_meet_a_fault_are_answered_and_so_are_those_that_waited_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.log.heads.USERS_MAX", 1)
    heads = Heads(Faulty(), "LOG-0", SimpleNamespace(last=LogState("e", 1, 1)), "mark")  # type: ignore[arg-type]
    answers: list[Head | None] = []
    both = asyncio.Event()

    def answer(head: Head | None) -> None:
        answers.append(head)
        if len(answers) == 2:
            both.set()

    heads.opening("a", answer)
    heads.opening("b", answer)
    async with asyncio.timeout(20):
        await both.wait()
    assert answers == [None, Head(0, 0, LogState("e", 1, 1))]
    await heads.close()


async def test_sessions_whose_count_meets_a_fault_go_on_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.stores.counts.USERS_MAX", 1)
    counts = Counts(Faulty(), 0, lambda: None)  # type: ignore[arg-type]
    answers: list[Any] = []
    both = asyncio.Event()

    def answer(count: dict[str, Any] | None) -> None:
        answers.append(count)
        if len(answers) == 2:
            both.set()

    counts.ask("default.alice", answer)
    counts.ask("default.bob", answer)
    async with asyncio.timeout(20):
        await both.wait()
    assert answers == [None, None]
    await counts.close()


async def test_a_leader_whose_answer_meets_a_fault_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[LogState] = []
    monkeypatch.setattr("gateway.log.watch.WATCH_SECONDS", 0.01)

    async def tell(state: LogState) -> None:
        told.append(state)

    watch = Watch(Faulty(), "LOG-0", tell)  # type: ignore[arg-type]
    watch.start()
    async with asyncio.timeout(20):
        while not told:
            await asyncio.sleep(0.005)
    await watch.close()


async def test_a_read_that_meets_a_fault_is_answered_so_that_it_is_tried_again() -> None:
    answers: list[Any] = []
    for ask in (
        lambda reader: reader.page("s", 1, answers.append),
        lambda reader: reader.next("s", 1, answers.append),
        lambda reader: reader.last("s", answers.append),
    ):
        reader = Reader(Faulty(), "LOG-0")  # type: ignore[arg-type]
        ask(reader)
        await asyncio.gather(*reader._tasks, return_exceptions=True)
    assert answers == [None, None, None]


@pytest.mark.parametrize(("sizes", "kept"), [([], 0), ([9], 1), ([4, 4, 4], 2), ([4, 4], 2), ([9, 1], 1), ([1, 9], 1)])
def test_a_snapshot_has_as_many_rows_as_its_bytes_allow_and_one_at_least(sizes: list[int], kept: int) -> None:
    rows = [Raw(b"x" * size) for size in sizes]
    assert newest(rows, 8) == rows[:kept]


async def test_a_read_that_comes_as_the_gateway_ends_is_told_so_and_does_not_wait_for_ever() -> None:
    records = StateRecords(cast("Any", None), Allowances(None, user_allowance(), [user_allowance()]))
    read = records.append("read", tenant="acme", user="alice", device="phone", partition=0, epoch="e", up_to=1)
    asked = asyncio.create_task(read)
    await asyncio.sleep(0)  # who writes it has not had a turn yet
    await records.close()
    async with asyncio.timeout(20):
        with pytest.raises(Unavailable):
            await asked
