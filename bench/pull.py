"""The yardstick of whatever reads a stream: raw pulls of the same stream into one inbox, messages counted and dropped."""

import asyncio
import time

from engine.broker.jetstream import Broker
from engine.limits import PULL_BATCH
from seamark.protocol.subjects import log_stream

PULL_SECONDS_MAX = 300.0
_BODY = b'{"batch":%d,"expires":10000000000}' % PULL_BATCH


class _Pull:
    """One consumer of one stream, at the pace of the broker: one to two batches are always on order."""

    def __init__(self, broker: Broker, stream: str, subject: str, wanted: int, name: str) -> None:
        self._broker, self._stream, self._subject, self._wanted, self._name = broker, stream, subject, wanted, name
        self._seen = self._ordered = 0
        self._inbox = broker.nc.new_inbox()
        self._done = asyncio.Event()

    async def run(self) -> None:
        config = {"name": self._name, "ack_policy": "none", "filter_subject": self._subject, "max_waiting": 64}
        body = {"stream_name": self._stream, "config": {**config, "inactive_threshold": 60_000_000_000}}
        await self._broker.api(f"CONSUMER.CREATE.{self._stream}.{self._name}.{self._subject}", body)
        subscription = self._broker.subscribe(self._inbox, self._on_message)
        self._order()
        self._order()
        async with asyncio.timeout(PULL_SECONDS_MAX):
            await self._done.wait()
        subscription.unsubscribe()
        await self._broker.api(f"CONSUMER.DELETE.{self._stream}.{self._name}")

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        if not reply:
            return
        self._seen += 1
        if self._seen >= self._wanted:
            self._done.set()
        elif self._ordered - self._seen <= PULL_BATCH:
            self._order()

    def _order(self) -> None:
        self._ordered += PULL_BATCH
        self._broker.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}", _BODY, reply=self._inbox)


async def bare_pull(broker: Broker, records: dict[int, int]) -> float:
    """Seconds to pull so many records of each log, all logs at once."""
    started = time.perf_counter()
    pulls = [_Pull(broker, log_stream(p), f"log.{p}.>", count, "yardstick") for p, count in records.items() if count]
    await asyncio.gather(*(pull.run() for pull in pulls))
    return time.perf_counter() - started
