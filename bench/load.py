"""Events of a benchmark, and the broker's own limit measured with the very records they become."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine.broker.jetstream import Broker, Outgoing
from engine.limits import BATCH_MESSAGES_MAX
from seamark.protocol.subjects import encode_token, partition_of

PARTITIONS = 4
TENANT = "default"
TYPE = "order.shipped"
TRACE = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00\r\n"
TEXT = "x" * 120
COUNT_SECONDS_MAX = 120.0


def user_name(number: int) -> str:
    """The user of a benchmark's device."""
    return f"user-{number}"


def event(number: int, user: int, due: float, *, critical: bool = False, followed: bool = False) -> Outgoing:
    """A personal event, due at a moment of the wall clock that its record carries to the device; `followed` by traces or not."""
    name, more = user_name(user), b'"priority":"critical",' if critical else b""
    data = b'{"due":%.6f,"text":"%b"}' % (due, TEXT.encode())
    body = b'{"id":"e%d","to":["%b"],%b"data":%b}' % (number, name.encode(), more, data)
    trace = b"traceparent: 00-%032x-b7ad6b7169203331-01\r\n" % (number + 1) if followed else TRACE
    lines = b"Nats-Msg-Id: %b:e%d\r\n%b" % (TENANT.encode(), number, trace)
    return Outgoing(f"events.{TENANT}.{name}.{TYPE}", body, lines)


def fan_out_event(id: str, users: int, due: float) -> tuple[str, bytes]:
    """One event for many users: subject and body."""
    body = {"id": id, "to": [user_name(user) for user in range(users)], "data": {"due": due, "text": TEXT}}
    return f"events.{TENANT}.{id}.{TYPE}", msgspec.json.encode(body)


BY_THE_APP = b'{"inapp":{"when":"now","why":"default"}}'
"""The plan of a record whose event names no channels."""


def bare_records(
    count: int, users: int, tenant: str, *, first: int = 0, plan: bytes = BY_THE_APP
) -> dict[int, list[Outgoing]]:
    """Records of the size the dispatcher writes, by partition, for users in turn from `first` on."""
    records: dict[int, list[Outgoing]] = {}
    for number in range(first, first + count):
        name = user_name(number % users)
        partition = partition_of(tenant, encode_token(name), PARTITIONS)
        body = (
            b'{"id":"e%d","kind":"notification","tenant":"%b","user":"%b","type":"%b","category":null,"priority":"normal",'
            b'"at":"2026-01-01T00:00:00.000000Z","event":{"epoch":"abcdefgh","seq":%d},'
            b'"data":{"due":1767225600.000000,"text":"%b"},"plan":%b,'
            b'"trace":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}'
        ) % (number, tenant.encode(), name.encode(), TYPE.encode(), number, TEXT.encode(), plan)
        records.setdefault(partition, []).append(Outgoing(f"log.{partition}.{tenant}.{name}", body, TRACE))
    return records


class Copies:
    """Counts what the broker republishes under a subject."""

    def __init__(self, broker: Broker, subject: str = "live.>") -> None:
        self.seen = 0
        self._wanted = 0
        self._reached = asyncio.Event()
        self._subscription = broker.subscribe(subject, self._on_copy)

    def _on_copy(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        self.seen += 1
        if self.seen >= self._wanted > 0:
            self._reached.set()

    async def until(self, wanted: int, seconds: float = COUNT_SECONDS_MAX) -> None:
        """Returns once so many have been seen; TimeoutError otherwise."""
        self._wanted = wanted
        self._reached.clear()
        if self.seen < wanted:
            async with asyncio.timeout(seconds):
                await self._reached.wait()

    async def ready(self) -> None:
        await self._subscription.confirmed()

    def close(self) -> None:
        self._subscription.unsubscribe()


async def commit_all(broker: Broker, messages: Sequence[Outgoing]) -> None:
    """Store messages by the largest atomic batches, one after the other."""
    for start in range(0, len(messages), BATCH_MESSAGES_MAX):
        await broker.commit(messages[start : start + BATCH_MESSAGES_MAX], timeout_seconds=60)


@dataclass
class Limit:
    """The broker's own limit: append by atomic batches, one in flight per partition, and republish to one subscriber."""

    records: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.records / self.seconds


async def broker_limit(broker: Broker, count: int, users: int, *, tenant: str = "yardstick") -> Limit:
    """Measure it on this broker, now."""
    records = bare_records(count, users, tenant)
    copies = Copies(broker, f"live.*.{tenant}.>")
    await copies.ready()
    started = time.perf_counter()
    await asyncio.gather(*(commit_all(broker, messages) for messages in records.values()))
    await copies.until(count)
    seconds = time.perf_counter() - started
    copies.close()
    return Limit(count, seconds)
