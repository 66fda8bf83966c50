"""Cancels and recalls over a simulated broker, in virtual time: publishing, dispatching, folding and cancelling at once.

What runs are the dispatcher's worker, its view of what is cancelled and the gateway's handler. Dispatchers are killed and frozen,
logs take nothing for a while, answers are lost, batches come late, replicas lag.
"""

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgspec

from engine.broker.jetstream import Outgoing, PubAck, Stored, StreamState
from engine.cancels import CANCELS_STREAM, Cancels
from engine.dispatch.worker import DispatchWorker
from engine.errors import Unanswered, Unavailable
from engine.limits import CANCEL_SETTLE_SECONDS, CANCELS_FRESH_SECONDS
from engine.partition.reader import Delivered
from engine.tasks import end
from gateway.access.principals import Service
from gateway.api import transactions as api
from gateway.http.endpoint import Call
from gateway.http.problems import Problem
from projections.inbox.transactions import Fates
from projections.store import Checkpoint
from seamark.protocol.errors import SeamarkError
from seamark.protocol.events import encode
from seamark.protocol.subjects import encode_token, partition_of
from tests.support.marksim import EPOCHS, PARTITIONS, Log, SimBroker, SimClaims

TRANSACTIONS = ["t0", "t1", "t2", "t3", "t4"]
MOMENT = 1e-6
CANCELS_EPOCH = "cccccccc"


@functools.cache
def decoded(payload: bytes) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(payload)
    return found


def now() -> float:
    return asyncio.get_running_loop().time()


class Handed(list[Outgoing]):
    """A batch that knows when it was handed to the broker."""

    at = 0.0


class TimedLog(Log):
    """A log that knows of each message when it was handed to the broker, and when it was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, float]] = []

    def commit(self, batch: Sequence[Outgoing]) -> int:
        end = super().commit(batch)
        self.times += [(batch.at if isinstance(batch, Handed) else now(), now())] * len(batch)
        return end

    def add(self, subject: str, payload: bytes) -> int:
        """One message without a mark."""
        self.messages.append((subject, payload))
        self.times.append((now(), now()))
        return len(self.messages)


class CancelBroker(SimBroker):
    """The broker of `marksim` with a clock, a bucket of cancels, and logs that take nothing for a while."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.timed = {name: TimedLog() for name in self.logs}
        self.logs = dict(self.timed)
        self.bucket: list[tuple[str, float]] = []
        """Transactions, and when they were stored."""
        self.closed_until: dict[str, float] = {}
        self.hearing: list[Callable[..., None]] = []
        self.on_reconnect: list[Callable[[], None]] = []

    async def _pass_time(self) -> None:
        await asyncio.sleep(self.rng.choice([0.0, 0.001, 0.005, 0.02]))
        await super()._pass_time()

    def state(self, name: str) -> StreamState:
        if name == CANCELS_STREAM:
            return StreamState(name, CANCELS_EPOCH, None, 1, len(self.bucket), len(self.bucket), {})
        return super().state(name)

    async def commit(self, batch: Sequence[Outgoing], **options: Any) -> PubAck:
        stream = f"LOG-{batch[-1].subject.split('.')[1]}"
        if now() < self.closed_until.get(stream, 0.0):
            await self._pass_time()
            raise Unavailable
        return await super().commit(batch, **options)

    async def leader_last(self, stream: str, subject: str, **options: Any) -> Stored | None:
        if not subject.endswith(">"):
            return await super().leader_last(stream, subject, **options)
        await self._pass_time()
        messages = self.logs[stream].messages
        seq = next((n for n in range(len(messages), 0, -1) if messages[n - 1][0].startswith(subject[:-1])), 0)
        return Stored(subject, seq, "", b"", messages[seq - 1][1]) if seq else None

    async def next_by_subject(self, stream: str, subject: str, seq: int, *, batch: int) -> Any:
        """Of a replica, which may lag."""
        await self._pass_time()
        reached = self.rng.randint(0, len(self.bucket)) if self._fault(0.5) else len(self.bucket)
        return SimpleNamespace(records=[self._cancel(n) for n in range(seq, reached + 1)][:batch])

    async def leader_next(self, stream: str, subject: str, seq: int, **_: Any) -> Any:
        await self._pass_time()
        return self._cancel(seq) if stream == CANCELS_STREAM and seq <= len(self.bucket) else None

    def _cancel(self, seq: int) -> Stored:
        return Stored(f"$KV.cancels.default.{self.bucket[seq - 1][0]}", seq, datetime.now(UTC).isoformat(), b"", b"{}")

    async def append(self, subject: str, body: bytes, *_: Any, **__: Any) -> PubAck:
        """A cancel, or a recall."""
        await self._pass_time()
        if self._fault(0.1):
            raise Unanswered  # not stored
        if subject.startswith("$KV."):
            self.bucket.append((subject.rpartition(".")[2], now()))
            seq = len(self.bucket)
            for hear in self.hearing if self.rng.random() < 0.3 else ():
                hear()
        else:
            seq = self.timed[f"LOG-{subject.split('.')[1]}"].add(subject, body)
        await self._pass_time()
        if self._fault(0.1):
            raise Unanswered  # stored, and the answer was lost
        return PubAck("", seq)

    def subscribe(self, subject: str, hear: Callable[..., None]) -> Any:
        self.hearing.append(hear)
        return SimpleNamespace(unsubscribe=lambda: self.hearing.remove(hear))


class Connection:
    """What one process has of the broker; while it is frozen, nothing is asked and no answer is read."""

    def __init__(self, broker: CancelBroker) -> None:
        self._broker = broker
        self.running = asyncio.Event()
        self.running.set()
        self.on_reconnect: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._broker, name)
        if not asyncio.iscoroutinefunction(asked):
            return asked

        async def ask(*args: Any, **options: Any) -> Any:
            if name == "commit":
                batch, args = Handed(args[0]), ()
                batch.at = now()
                args = (batch,)
            await self.running.wait()
            try:
                return await asked(*args, **options)
            finally:
                await self.running.wait()

        return ask


class Inbox:
    """The inbox, folded behind the logs; it answers as `projections.inbox.transactions` does."""

    def __init__(self, broker: CancelBroker) -> None:
        self._broker = broker
        self.reached = dict.fromkeys(range(PARTITIONS), 0)
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._broker.rng.choice([0.02, 0.1, 0.6]))
            for partition in self.reached:
                self.fold(partition, self._broker.rng.randint(1, 20))

    def fold(self, partition: int, most: int) -> None:
        messages = self._broker.logs[f"LOG-{partition}"].messages
        for seq in range(self.reached[partition] + 1, min(len(messages), self.reached[partition] + most) + 1):
            subject, payload = messages[seq - 1]
            if not subject.startswith("log."):
                continue
            self.reached[partition] = seq
            record = decoded(payload)
            if record["kind"] == "recall":
                for id in record["ids"]:
                    self.rows[record["user"], id].setdefault("recalled", seq)
            else:
                withheld = record["plan"]["inapp"]["why"] == "cancelled"
                row = {"transaction": record.get("transaction_id"), "withheld": withheld}
                self.rows[record["user"], record["id"]] = row

    def _of(self, transaction: str) -> dict[tuple[str, str], dict[str, Any]]:
        return {key: row for key, row in self.rows.items() if row["transaction"] == transaction}

    async def fates(self, tenant: str, transaction: str) -> Fates:
        await asyncio.sleep(0.002)
        rows = self._of(transaction).values()
        withheld = sum(row["withheld"] for row in rows)
        recalled = sum("recalled" in row for row in rows)
        return Fates(withheld, recalled, 0, len(rows) - withheld - recalled)

    async def recallable(
        self, tenant: str, transaction: str, after: tuple[str, str], limit: int
    ) -> list[tuple[str, str]]:
        await asyncio.sleep(0.002)
        rows = self._of(transaction).items()
        return sorted(key for key, row in rows if not row["withheld"] and "recalled" not in row and key > after)[:limit]

    async def has_passed(self, heads: Mapping[int, Checkpoint]) -> bool:
        await asyncio.sleep(0.002)
        return all(self.reached[partition] >= head.seq for partition, head in heads.items())


class CancelWorld:
    """Events of some transactions, dispatchers that work on them, and clients that cancel the transactions meanwhile."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.broker = CancelBroker(self.rng)
        self.claims, self.inbox = SimClaims(), Inbox(self.broker)
        self.users = [f"user{number}" for number in range(12)]
        self.home = next(user for user in self.users if partition_of("default", encode_token(user), PARTITIONS) == 0)
        self.events: list[Delivered] = []
        self.due: dict[str, tuple[str | None, list[str]]] = {}
        self.found: list[str] = []
        self.answered: list[tuple[str, float]] = []
        """Recalls that were answered, and what they speak of: all that was stored by then."""
        self.connections: dict[asyncio.Task[None], Connection] = {}
        self.context: Any = SimpleNamespace(
            broker=self.broker,
            cancels=None,
            cancel_rate=SimpleNamespace(take=lambda tenant: True),
            tables=SimpleNamespace(transactions=self.inbox),
            partitions=[self._partition(number) for number in range(PARTITIONS)],
            partition=lambda tenant, user: self.context.partitions[
                partition_of(encode_token(tenant), encode_token(user), PARTITIONS)
            ],
        )

    def _partition(self, number: int) -> Any:
        state = SimpleNamespace(epoch=EPOCHS[f"LOG-{number}"], last_seq=1 << 40)

        async def ask() -> Any:
            return state

        return SimpleNamespace(number=number, stream=f"LOG-{number}", watch=SimpleNamespace(state=ask, last=state))

    # --- what happens ---------------------------------------------------------------------------------------------------

    async def publish(self, count: int) -> None:
        for number in range(1, count + 1):
            transaction = self.rng.choice([None, *TRANSACTIONS])
            to = [self.home] if self.rng.random() < 0.3 else self.rng.sample(self.users, self.rng.randint(1, 7))
            unknown: dict[str, Any] = {} if transaction is None else {"transaction_id": transaction}
            event = encode(to=to, type="sim.n", id=f"e{number}", key=self.home, data={}, unknown=unknown)
            subject = event.subject.replace("events.", "ev.0.", 1).encode()
            self.events.append(Delivered(subject, number, 0, b"", event.payload))
            self.due[f"e{number}"] = transaction, to
            await asyncio.sleep(self.rng.choice([0.0, 0.01, 0.1, 0.2]))

    def start(self) -> None:
        """One more dispatcher."""
        connection = Connection(self.broker)
        task = asyncio.create_task(self._dispatch(connection), name="dispatcher")
        self.connections[task] = connection

    async def _dispatch(self, connection: Any) -> None:
        cancels = Cancels(connection)
        watch = asyncio.create_task(cancels.tail.run(), name="cancels")
        worker = DispatchWorker(connection, self.claims, 0, PARTITIONS, cancels=cancels)  # type: ignore[arg-type]
        try:
            while True:
                try:
                    await self._read_on(worker)
                except SeamarkError:
                    await asyncio.sleep(self.rng.choice([0.05, 0.3, 1.0]))
        finally:
            await end(watch)

    async def _read_on(self, worker: DispatchWorker) -> None:
        position = await worker.acquire()
        while True:
            batch = [event for event in self.events if event.seq >= position][: self.rng.randint(1, 8)]
            if batch:
                await worker.handle(batch)
                position = batch[-1].seq + 1
            else:
                await asyncio.sleep(0.05)

    async def torment(self) -> None:
        """Processes die, freeze and start, and logs take nothing for a while."""
        while True:
            await asyncio.sleep(self.rng.uniform(0.2, 1.5))
            task = self.rng.choice(list(self.connections))
            match self.rng.choice(["kill", "freeze", "close", "close"]):
                case "kill":
                    del self.connections[task]
                    task.cancel()
                    self.start()
                case "freeze":
                    running = self.connections[task].running
                    running.clear()
                    asyncio.get_running_loop().call_later(self.rng.uniform(0.1, 3.0), running.set)
                case "close":
                    until = now() + self.rng.uniform(1.0, 4.0)
                    self.broker.closed_until[f"LOG-{self.rng.randrange(PARTITIONS)}"] = until

    async def cancel(self, transaction: str, *, recall: bool) -> api.Cancelled:
        """As a client does, until it is answered."""
        while True:
            stored = len(self.broker.bucket)
            query = api.CancelQuery(transaction, recall)
            call: Any = Call(None, self.context, Service("default", frozenset()), query, None)  # type: ignore[arg-type]
            try:
                answer: api.Cancelled = await api.cancel_transaction.handler(call)
            except Problem:
                await asyncio.sleep(self.rng.choice([0.1, 1.0]))
                continue
            if recall and not answer.more:
                at = next(at for name, at in self.broker.bucket[stored:] if name == transaction)
                self.answered.append((transaction, at + CANCEL_SETTLE_SECONDS))
            return answer

    async def run(self) -> list[str]:
        """All of it; returns what is wrong."""
        folding = asyncio.create_task(self.inbox.run(), name="inbox")
        tormenting = asyncio.create_task(self.torment(), name="torment")
        for _ in range(self.rng.choice([1, 1, 2])):  # two fight without end, as there is no pin here
            self.start()

        async def client(transaction: str) -> None:
            await asyncio.sleep(self.rng.uniform(0.0, 6.0))
            if self.rng.random() < 0.7:  # the worst moment for a log to take nothing: its batches were decided before
                for name in self.broker.logs:
                    self.broker.closed_until[name] = now() + self.rng.uniform(0.5, 3.0)
                await asyncio.sleep(self.rng.uniform(0.0, 0.3))
            await self.cancel(transaction, recall=self.rng.random() < 0.8)

        cancelled = TRANSACTIONS[: self.rng.randint(3, len(TRANSACTIONS))]
        works: list[Awaitable[None]] = [self.publish(60), *map(client, cancelled)]
        await asyncio.gather(*works)
        self.broker.calm = True
        await end(tormenting)
        wanted = sum(len(to) for _, to in self.due.values())
        async with asyncio.timeout(300):
            while len(self.records()) < wanted or self.broker.late:
                await asyncio.sleep(0.5)
        self._check_recalled()
        for transaction in cancelled:
            self._check_sum(transaction, await self.cancel(transaction, recall=True))
        await end(folding, *self.connections)
        self._check_records(set(cancelled))
        return self.found

    # --- what must be so ------------------------------------------------------------------------------------------------

    def records(self) -> list[tuple[dict[str, Any], float, float]]:
        """All notifications, with the moments at which they were handed over and stored."""
        return [
            (decoded(payload), *log.times[index])
            for log in self.broker.timed.values()
            for index, (subject, payload) in enumerate(log.messages)
            if subject.startswith("log.") and b'"recall"' not in payload
        ]

    def _recalled(self) -> set[tuple[str, str]]:
        payloads = [
            payload for log in self.broker.timed.values() for _, payload in log.messages if b'"recall"' in payload
        ]
        return {(one["user"], id) for one in map(decoded, payloads) for id in one["ids"]}

    def _check_recalled(self) -> None:
        """What was stored when a cancel had settled has been taken off by the recall."""
        recalled = self._recalled()
        for transaction, settled in self.answered:
            for record, _, stored_at in self.records():
                whose = record["user"], record["id"]
                if self._shown(record, transaction) and stored_at <= settled and whose not in recalled:
                    self.found.append(f"{whose} of {transaction} is not recalled")

    def _check_sum(self, transaction: str, answer: api.Cancelled) -> None:
        wanted = sum(len(to) for of, to in self.due.values() if of == transaction)
        if (answer.cancelled or 0) + (answer.recalled or 0) + (answer.too_late or 0) != wanted:
            self.found.append(f"{answer} does not add up to {wanted}")

    def _check_records(self, cancelled: set[str]) -> None:
        first: dict[str, float] = {}
        for name, at in self.broker.bucket:
            first.setdefault(name, at)
        seen = sorted((record["user"], record["id"]) for record, *_ in self.records())
        if seen != sorted((user, id) for id, (_, to) in self.due.items() for user in to):
            self.found.append("not each notification has one record")
        for record, handed_at, _ in self.records():
            transaction = record.get("transaction_id")
            shown, at = record["plan"]["inapp"]["why"] != "cancelled", first.get(transaction or "")
            if at is None or transaction not in cancelled:
                if not shown:
                    self.found.append(f"{record['id']} is withheld, and was never cancelled")
            elif shown and handed_at > at + CANCELS_FRESH_SECONDS + MOMENT:
                self.found.append(f"{record['id']} was written {handed_at - at:.3f} s after its cancel")
            elif not shown and handed_at < at:
                self.found.append(f"{record['id']} was withheld before its cancel")

    def _shown(self, record: dict[str, Any], transaction: str) -> bool:
        return record.get("transaction_id") == transaction and record["plan"]["inapp"]["why"] != "cancelled"
