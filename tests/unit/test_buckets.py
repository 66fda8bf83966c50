"""Bounds by token buckets, and places that tenants share."""

import asyncio
import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import buckets
from engine.buckets import Buckets
from gateway.access.shares import NoPlace, Queue, Shares

STEPS = st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 12)), max_size=60)


@given(STEPS, st.floats(1, 600), st.floats(1, 20))
def test_no_span_of_time_grants_more_than_the_burst_and_what_came_back(
    steps: list[tuple[float, float]], per_minute: float, burst: float
) -> None:
    now = [0.0]
    bucket = Buckets(per_minute, burst=burst, now=lambda: now[0])
    granted: list[tuple[float, float]] = []
    for pause, cost in steps:
        now[0] += pause
        wait = bucket.wait_seconds("a", cost)
        assert bucket.take("a", cost) is (wait == 0)
        if wait == 0:
            granted.append((now[0], cost))
        elif cost <= burst:  # as long as it says, and no longer
            now[0] += wait
            assert bucket.wait_seconds("a", cost) < 0.001
    for first, (began, _) in enumerate(granted):
        total = 0.0
        for at, cost in granted[first:]:
            total += cost
            assert total <= burst + (at - began) * per_minute / 60 + 0.001


def test_what_is_given_back_can_be_taken_again() -> None:
    bucket = Buckets(2, now=lambda: 0.0)
    assert [bucket.take("a") for _ in range(3)] == [True, True, False]
    bucket.give_back("a")
    assert [bucket.take("a") for _ in range(2)] == [True, False]
    Buckets(0).give_back("a")


def test_the_memory_of_buckets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "REMEMBERED", 10)
    bucket = Buckets(2, now=lambda: 0.0)
    for number in range(50):
        bucket.take(number)
    assert len(bucket._full_at) == 10


def test_a_bucket_that_is_full_again_is_forgotten() -> None:
    now = [0.0]
    bucket = Buckets(60, now=lambda: now[0])
    for number in range(100):
        bucket.take(number)
    assert len(bucket._full_at) == 100
    now[0] = 10.0
    assert bucket.take("spender", 60)
    for _ in range(50):
        now[0] += 1.0
        assert bucket.take("busy")
    assert list(bucket._full_at) == ["spender", "busy"]
    assert not bucket.take("spender", 60), "what is not full again is remembered"


def test_a_tenant_has_a_part_of_all_places_and_leaves_the_others() -> None:
    shares = Shares(4, 3)
    with shares.place("a"), shares.place("a"), shares.place("a"):
        with pytest.raises(NoPlace), shares.place("a"):
            raise AssertionError("a fourth place of one tenant")
        with shares.place("b"), pytest.raises(NoPlace), shares.place("c"):
            raise AssertionError("a fifth place")
    with shares.place("a"):
        pass
    assert not shares._taken


async def test_whoever_waits_for_a_place_never_waits_for_what_one_tenant_wants_beyond_its_part() -> None:
    queue, release = Queue(4, 2), asyncio.Event()
    had: list[str] = []

    async def work(tenant: str) -> None:
        async with queue.place(tenant):
            had.append(tenant)
            await release.wait()

    tasks = [asyncio.create_task(work(tenant), name=tenant) for tenant in "a" * 20 + "bc"]
    async with asyncio.timeout(30):
        while "c" not in had:  # the last one that asks
            await asyncio.sleep(0)
    assert sorted(had) == ["a", "a", "b", "c"]
    tasks[5].cancel()  # one that waits leaves no place taken
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(had) == 21


async def test_a_tenant_that_has_no_place_and_waits_for_none_is_forgotten() -> None:
    queue = Queue(4, 2)
    for number in range(100):
        async with queue.place(f"tenant{number}"):
            assert len(queue._tenants) == 1
    gc.collect()
    assert not queue._tenants
