"""What tests of the log need: a topology with short time-outs, a dispatcher in the background, a reader of whole streams."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis

from chaos.load import whole_stream
from engine.broker.answers import WATERMARK_KEY
from engine.broker.jetstream import Broker, NatsSettings, PubAck, Stored, connect
from engine.cancels import watching
from engine.dispatch.claims import Claims
from engine.dispatch.dispatcher import Dispatcher
from engine.dispatch.room import Shares
from engine.dispatch.source import SOURCES, EventSource
from engine.log.incarnations import read_partitions
from seamark.protocol import events
from seamark.protocol.subjects import log_stream
from tests.support.topology import Overrides
from tests.support.waiting import ended

PIN_TIMEOUT_SECONDS = 1.0
FAST = Overrides(replicas=1, pin_timeout_seconds=PIN_TIMEOUT_SECONDS)
PIN_KEPT_SECONDS = 60.0
PATIENT = Overrides(replicas=1, pin_timeout_seconds=PIN_KEPT_SECONDS)
"""Where nobody takes over: who stands still for a moment must not lose what it owns."""

BROKER_IS_SLOW: Final = frozenset({
    "controls_not_read", "copies_not_read", "gateways_silent", "log_not_read", "nats_disconnected", "nats_reconnected",
    "question_not_answered", "receipts_wait", "rules_not_compared", "subscriptions_not_confirmed",
})  # fmt: skip
"""What tasks of a gateway that serve no client log when the broker does not answer in time, as on a busy machine."""


def of_clients(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The log lines above debug level, without those that only tell of a slow broker."""
    return [line for line in lines if line["log_level"] != "debug" and line["event"] not in BROKER_IS_SLOW]


async def eventually(check: Callable[[], Any], *, seconds: float = 60.0, every_seconds: float = 0.02) -> Any:
    """Poll `check` (plain or coroutine function) until it is true; its value. Fails with its last value."""
    deadline = time.monotonic() + seconds
    while not (value := await _value_of(check)):
        assert time.monotonic() < deadline, (
            f"not within {seconds} s: {getattr(check, '__name__', check)} gave {value!r}"
        )
        await asyncio.sleep(every_seconds)
    return value


async def within(check: Callable[[], Any], seconds: float, *, every_seconds: float = 0.02) -> Any:
    """As `eventually`, where time is the promise: by a clock that stands still while this process does."""
    for _ in range(round(seconds / every_seconds)):
        if value := await _value_of(check):
            return value
        await asyncio.sleep(every_seconds)
    raise AssertionError(f"not within {seconds} s")


async def _value_of(check: Callable[[], Any]) -> Any:
    value = check()
    return await value if asyncio.iscoroutine(value) else value


@contextlib.asynccontextmanager
async def connected(url: str, **settings: Any) -> AsyncIterator[Broker]:
    """A broker connection that is closed at the end."""
    broker = await connect(NatsSettings(url, **settings))
    try:
        yield broker
    finally:
        await broker.close()


def redis_at(url: str) -> Redis:
    """A client as the roles have it: with a time-out of its own redis-py loses a cancellation that comes as it sends."""
    return Redis.from_url(url, socket_connect_timeout=10, socket_timeout=None)


@contextlib.asynccontextmanager
async def at_work(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Goes on beside the body and must outlast it. Its own fault is what fails the test, not what followed from that."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
        assert not task.done(), f"{name} ended by itself"
    finally:
        if task.done():
            task.result()
        await ended(task)


@contextlib.asynccontextmanager
async def dispatching(
    url: str,
    redis_url: str,
    sources: Sequence[EventSource] = SOURCES,
    *,
    pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS,
) -> AsyncIterator[Dispatcher]:
    """A dispatcher at work on a connection of its own."""
    async with connected(url) as broker, redis_at(redis_url) as redis, watching(broker) as cancels:
        dispatcher = Dispatcher(
            broker,
            Claims(redis),
            await read_partitions(broker),
            sources=sources,
            cancels=cancels,
            shares=Shares(redis),
            pin_timeout_seconds=pin_timeout_seconds,
        )
        async with at_work(dispatcher.run(), "dispatcher"):
            yield dispatcher


async def publish(broker: Broker, *, deduplicated: bool = True, **event: Any) -> PubAck:
    """Publish one event as a service would."""
    encoded = events.encode(**event)
    return await broker.append(encoded.subject, encoded.payload, msg_id=encoded.msg_id if deduplicated else None)


async def mark_water(broker: Broker, most_bytes: int) -> None:
    """Say how much LATER may hold."""
    config = (await broker.stream("LATER")).config
    metadata = {**config["metadata"], WATERMARK_KEY: str(most_bytes)}
    await broker.api("STREAM.UPDATE.LATER", {**config, "metadata": metadata})


class Entry(NamedTuple):
    """A record as found in a log."""

    user: str
    seq: int
    id: str
    record: dict[str, Any]
    stored: Stored


async def all_records(broker: Broker, partitions: int) -> list[Entry]:
    """Every record of every log, by partition and sequence."""
    entries = []
    for p in range(partitions):
        for stored in await whole_stream(broker, log_stream(p), f"log.{p}.>"):
            record = json.loads(stored.payload)
            entries.append(Entry(record["user"], stored.seq, record["id"], record, stored))
    return entries
