"""Load with a ledger: publishers that wait for each answer, personal and many-recipient events mixed, and the final look."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from chaos.ledger import Ledger
from engine.broker.jetstream import Broker, Stored, StreamState
from engine.errors import ApiError, Unanswered, Unavailable
from engine.log.marks import decode_mark
from seamark.protocol import events
from seamark.protocol.subjects import EVENTS_STREAM, log_stream, mark_subject

PUBLISHERS = 8
PAGE_BYTES = 8 << 20


class Load:
    """Publishes random events; events of one key come one after the other, each once the one before has its answer.

    Args:
        rng: decides everything that is random here.
        users: personal events go to one of them, others to up to `audience_max`.
        shared: the share of events for several users; their key is one of a few rooms.
        rate: events per second over all publishers, 0: as fast as answers come; may be changed while it runs.
        prefix: of event ids and rooms, when several loads write one ledger.
        fields, headers: what every event carries besides.
        fill: bytes added to every event's data.
    """

    def __init__(
        self,
        broker: Broker,
        ledger: Ledger,
        rng: random.Random,
        users: Sequence[str],
        *,
        shared: float = 0.2,
        audience_max: int = 12,
        rate: float = 0.0,
        prefix: str = "e",
        budget_seconds: float = 30.0,
        fields: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        fill: int = 0,
    ) -> None:
        self._broker = broker
        self._ledger = ledger
        self._rng = rng
        self._users = users
        self._shared = shared
        self._audience_max = min(audience_max, len(users))
        self.rate = rate
        self._prefix = prefix
        self._budget_seconds = budget_seconds
        self._fields = fields or {}
        self._headers = headers
        self._fill = "x" * fill
        self._left = 0
        self._stop = False
        self._started = 0.0
        self.sent = 0
        self.acknowledged = 0

    def stop(self) -> None:
        """Publish nothing more; `run` returns when the answers are there."""
        self._stop = True

    async def run(self, count: int = 1 << 60) -> None:
        """Publish `count` events, or until `stop`."""
        self._left, self._stop, self._started, self.sent = count, False, time.monotonic(), 0
        async with asyncio.TaskGroup() as tasks:
            for number in range(PUBLISHERS):
                tasks.create_task(self._publisher(number), name=f"publisher-{number}")

    async def _publisher(self, number: int) -> None:
        own = self._users[number::PUBLISHERS]
        while self._left > 0 and not self._stop:
            self._left -= 1
            self.sent += 1
            if self.rate:
                await asyncio.sleep(max(0.0, self._started + self.sent / self.rate - time.monotonic()))
            if not own or self._rng.random() < self._shared:
                room = f"{self._prefix}-room-{number}"
                await self.publish(room, self._rng.sample(self._users, self._rng.randint(2, self._audience_max)))
            else:
                user = self._rng.choice(own)
                await self.publish(user, [user])

    async def publish(self, key: str, to: list[str]) -> str:
        """One event; its outcome goes into the ledger. Returns its id."""
        process, number = f"publisher-{self._prefix}", self._ledger.next_number(key)
        event = f"{self._prefix}:{key}:{number}"
        encoded = events.encode(
            to=to, type="chaos.n", id=event, key=key, data={"key": key, "fill": self._fill}, **self._fields
        )
        call = self._ledger.invoke(process, "publish", event=event, to=to, key=key, number=number)
        try:
            ack = await self._broker.append(
                encoded.subject,
                encoded.payload,
                self._headers,
                msg_id=encoded.msg_id,
                budget_seconds=self._budget_seconds,
            )
        except Unavailable as error:
            self._ledger.end(call, process, "publish", "fail", event=event, why=str(error))
        except (Unanswered, ApiError) as error:
            self._ledger.end(call, process, "publish", "info", event=event, why=str(error))
        else:
            self.acknowledged += 1
            self._ledger.end(call, process, "publish", "ok", event=event, seq=ack.seq)
        return event


async def look(
    broker: Broker,
    ledger: Ledger,
    partitions: int,
    *,
    replica: str = "any",
    states: Mapping[str, StreamState] | None = None,
) -> int:
    """Write what the LOGs hold into the ledger; the number of records.

    Args:
        replica: whose view this is, when all the others are frozen.
        states: what the leaders said, when there are none to ask.
    """
    count = 0
    for partition in range(partitions):
        stream = log_stream(partition)
        state = await look_at_head(broker, ledger, partition, replica=replica, states=states)
        place = {"replica": replica, "stream": stream, "epoch": state.epoch}
        read = _from_the_only_one_awake if states else whole_stream
        for stored in await read(broker, stream, f"log.{partition}.>"):
            count += 1
            ledger.note("look", "record", **place, **_facts(stored))
    return count


async def look_at_head(
    broker: Broker,
    ledger: Ledger,
    partition: int,
    *,
    replica: str = "any",
    states: Mapping[str, StreamState] | None = None,
) -> StreamState:
    """Write into the ledger how far a LOG goes, and nothing of what it holds; arguments as for `look`."""
    stream = log_stream(partition)
    state = states[stream] if states else await broker.stream(stream)
    ledger.note("look", "stream", name=stream, epoch=state.epoch, first=1, last=state.last_seq, replica=replica)
    return state


def _facts(stored: Stored) -> dict[str, Any]:
    record = json.loads(stored.payload)
    return {
        "seq": stored.seq,
        "user": record["user"],
        "event": record["id"],
        "key": record["data"]["key"],
        "event_epoch": record["event"]["epoch"],
        "event_seq": record["event"]["seq"],
    }


async def whole_stream(broker: Broker, stream: str, subject: str) -> list[Stored]:
    """Every message of `subject` (wildcards allowed) in order."""
    found: list[Stored] = []
    while True:
        page = await broker.next_by_subject(
            stream, subject, found[-1].seq + 1 if found else 1, batch=1000, max_bytes=PAGE_BYTES, timeout_seconds=10.0
        )
        found += page.records
        if not page.more:
            return found


async def _from_the_only_one_awake(broker: Broker, stream: str, subject: str) -> list[Stored]:
    """A read goes to any replica, frozen ones too: asked until the one that is awake gets it, and has the time to answer."""
    seconds = 0.5
    while True:
        try:
            page = await broker.next_by_subject(
                stream, subject, 1, batch=1 << 20, max_bytes=PAGE_BYTES * 8, timeout_seconds=seconds
            )
        except Unanswered:
            seconds = min(5.0, seconds * 1.2)
            continue
        assert not page.more
        return page.records


async def drained(broker: Broker, partitions: int) -> bool:
    """Is every event applied, as the home marks tell?"""
    for q in range(partitions):
        last = await broker.leader_last(EVENTS_STREAM, f"ev.{q}.>")
        if last is None:
            continue
        mark = await broker.leader_last(log_stream(q), mark_subject(q, q))
        if mark is None or decode_mark(mark.payload).next_seq <= last.seq:
            return False
    return True
