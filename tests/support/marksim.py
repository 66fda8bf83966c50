"""Dispatch workers over a simulated broker that loses, delays and doubles what it is asked, and lags in what it shows.

Now and then, with the dispatchers stopped, EVENTS or the home log is put back to a backup, and `topology restore` said.
Everything that is random comes from one seed; there are no sleeps, so that thousands of take-overs run in seconds.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from engine.broker.answers import EPOCH_KEY
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, Outgoing, PubAck, Stored, StreamState
from engine.dispatch.worker import DispatchWorker
from engine.errors import ApiError, Unanswered, Unavailable
from engine.log.incarnations import restored_metadata
from engine.partition.reader import Delivered
from seamark.protocol.errors import SeamarkError
from seamark.protocol.events import encode
from seamark.protocol.subjects import encode_token, partition_of

PARTITIONS = 3
CALM_ATTEMPTS_MAX = 50
EPOCHS = {"EVENTS": "eeeeeeee", "LATER": "aaaaaaaa", **{f"LOG-{p}": f"llllll0{p}" for p in range(PARTITIONS)}}


class Log:
    """A LOG stream: messages, and the last sequence of each mark subject."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.ends = [0]

    def last(self, subject: str, upto: int) -> int:
        for seq in range(upto, 0, -1):
            if self.messages[seq - 1][0] == subject:
                return seq
        return 0

    def commit(self, batch: Sequence[Outgoing]) -> int:
        """The last sequence; ValueError when the expectation of the mark does not hold."""
        *_, mark = batch
        expected = int(mark.headers.split(b"Nats-Expected-Last-Subject-Sequence:")[1].split(b"\r\n")[0])
        if self.last(mark.subject, len(self.messages)) != expected:
            raise ValueError
        self.messages += [(message.subject, message.payload) for message in batch]
        self.ends.append(len(self.messages))
        return len(self.messages)

    def put_back(self, end: int) -> None:
        """Be as it was when it ended there."""
        self.ends = [each for each in self.ends if each <= end]
        del self.messages[end:]


class SimBroker:
    """What a dispatcher asks of a broker. One for all processes; faults are drawn for each request."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.logs = {f"LOG-{p}": Log() for p in range(PARTITIONS)} | {"LATER": Log()}
        self.late: list[tuple[Log, Sequence[Outgoing]]] = []
        self.calm = False
        self.metadata = {name: {EPOCH_KEY: epoch} for name, epoch in EPOCHS.items()}

    async def _pass_time(self) -> None:
        for _ in range(self.rng.choice([0, 1, 1, 2, 3, 8])):
            await asyncio.sleep(0)
        if self.late and self.rng.random() < 0.3:
            log, batch = self.late.pop(self.rng.randrange(len(self.late)))
            try:
                log.commit(batch)
            except ValueError:
                return  # refused, and nobody hears of it

    def _fault(self, chance: float) -> bool:
        return not self.calm and self.rng.random() < chance

    async def stream(self, name: str, **_: Any) -> StreamState:
        await self._pass_time()
        if self._fault(0.02):
            raise Unavailable
        return self.state(name)

    def state(self, name: str) -> StreamState:
        metadata = self.metadata[name]
        config = {"metadata": metadata}
        return StreamState(name, metadata[EPOCH_KEY], PARTITIONS, 1, 1 << 40, 1, config, asked_at=time.time())

    async def leader_last(self, stream: str, subject: str, **_: Any) -> Stored | None:
        await self._pass_time()
        if self._fault(0.03):
            raise Unanswered
        if stream == "KV_control":
            return Stored(subject, 1, "", b"", json.dumps(EPOCHS).encode())
        log = self.logs[stream]
        # A deposed leader may show the past.
        upto = len(log.messages) - (self.rng.randint(0, 20) if self._fault(0.1) else 0)
        seq = log.last(subject, max(0, upto))
        now = datetime.now(UTC).isoformat()
        return Stored(subject, seq, now, b"", log.messages[seq - 1][1]) if seq else None

    async def leader_next(self, *_: Any, **__: Any) -> None:
        """EVENTS has trimmed everything: nobody can tell from it how old a mark is."""
        return

    async def commit(self, batch: Sequence[Outgoing], **_: Any) -> PubAck:
        await self._pass_time()
        place = batch[-1].subject.split(".")[1]
        stream = f"LOG-{place}" if place.isdecimal() else "LATER"
        if self._fault(0.05):
            raise Unavailable  # not stored
        if self._fault(0.05):
            raise Unanswered  # not stored, but who knows
        if self._fault(0.08):
            self.late.append((self.logs[stream], batch))
            raise Unanswered  # still on its way
        try:
            seq = self.logs[stream].commit(batch)
        except ValueError:
            await self._pass_time()
            raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence") from None
        await self._pass_time()
        if self._fault(0.08):
            raise Unanswered  # stored, the answer was lost
        return PubAck(stream, seq)


class SimClaims:
    """Claims that are never lost."""

    def __init__(self) -> None:
        self.holders: dict[str, str] = {}

    async def take(self, claims: Sequence[Any]) -> list[bool]:
        await asyncio.sleep(0)
        return [
            self.holders.setdefault(claim.event_id, claim.position) in (claim.position, *claim.former)
            for claim in claims
        ]


class World:
    """One event partition's events, and processes that fight over it."""

    def __init__(self, seed: int, *, events: int = 40) -> None:
        self.rng = random.Random(seed)
        self.broker = SimBroker(self.rng)
        self.claims = SimClaims()
        self.users = [f"user{number}" for number in range(9)]
        self.home = next(user for user in self.users if partition_of("default", encode_token(user), PARTITIONS) == 0)
        self.events: list[Delivered] = []
        self.due: dict[str, frozenset[str]] = {}
        self.lost: set[str] = set()
        self.restores = 0
        self.count = events
        self.publish()
        self.refused = 0

    def publish(self) -> None:
        """Fill EVENTS up, under the numbers that come next."""
        for number in range(len(self.events) + 1, self.count + 1):
            again = len(self.due) > 2 and self.rng.random() < 0.1
            name = self.rng.choice(sorted(self.due)) if again else f"e{self.restores}-{number}"
            to = [self.home] if self.rng.random() < 0.4 else self.rng.sample(self.users, self.rng.randint(1, 9))
            encoded = encode(to=to, type="sim.n", id=name, key=self.home, data={})
            subject = encoded.subject.replace("events.", "ev.0.", 1).encode()
            # Other partitions' events lie in between.
            self.events.append(Delivered(subject, number * 2, 0, b"", encoded.payload))
            self.due.setdefault(name, frozenset(to))

    def restore(self) -> None:
        """EVENTS, the home log or both come back from a backup; what EVENTS has lost is no longer due, but others are."""
        broker, self.restores = self.broker, self.restores + 1
        broker.late.clear()  # nobody dispatches meanwhile
        kind = self.rng.choice(["EVENTS", "LOG-0", "both"])
        if kind != "LOG-0":
            kept = self.rng.randint(0, len(self.events))
            names = [json.loads(event.payload)["id"] for event in self.events]
            for name in set(names) - set(names[:kept]):
                self.lost.add(name)
                del self.due[name]
            self.events = self.events[:kept]
            self._rotate("EVENTS", kept * 2 + self.rng.randint(0, 1))
            self.publish()
        if kind != "EVENTS":
            log = broker.logs["LOG-0"]
            log.put_back(self.rng.choice(log.ends))
            self._rotate("LOG-0", len(log.messages))

    def _rotate(self, name: str, end: int) -> None:
        state = self.broker.state(name)
        self.broker.metadata[name] = restored_metadata(state, f"{state.epoch}{self.restores}", end)

    def worker(self) -> DispatchWorker:
        return DispatchWorker(self.broker, self.claims, 0, PARTITIONS)  # type: ignore[arg-type]

    async def process(self, worker: DispatchWorker) -> None:
        """What a partition's reader does, over and over: take over, read from the position, hand on in batches."""
        await self.reading(worker, lambda: self.events)

    async def reading(self, worker: DispatchWorker, source: Callable[[], list[Delivered]]) -> None:
        """The same over any messages."""
        for attempt in itertools.count():
            if self.broker.calm and attempt > CALM_ATTEMPTS_MAX:
                return  # what is missing then tells
            try:
                position = await worker.acquire()
                left = [message for message in source() if message.seq >= position]
                while left:
                    size = self.rng.randint(1, 8)
                    await worker.handle(left[:size])
                    left = left[size:]
                if self.broker.calm:
                    return
                await asyncio.sleep(0)
            except SeamarkError:
                self.refused += 1
                # It woke up, was refused, and wants to work again: sooner or later.
                for _ in range(self.rng.randint(0, 50)):
                    await asyncio.sleep(0)

    async def run(self) -> None:
        """Processes come, go and die at any await, over streams that are restored in between; in the end one is left in peace."""
        restores = self.rng.choice([0, 0, 1, 2])
        for _ in range(restores):
            await self.torment(self.rng.randint(1, 4))
            self.restore()
        await self.torment(self.rng.randint(1, 4) if restores else self.rng.randint(3, 8))
        self.broker.calm = True
        await self.process(self.worker())

    async def torment(self, processes: int) -> None:
        """Processes come, go and die."""
        tasks: list[asyncio.Task[None]] = []
        for _ in range(processes):
            if tasks and self.rng.random() < 0.7:
                tasks.pop(self.rng.randrange(len(tasks))).cancel()
            tasks.append(asyncio.create_task(self.process(self.worker()), name="process"))
            for _ in range(self.rng.randint(5, 300)):
                await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def faults(self) -> list[str]:
        """What is wrong with the logs."""
        found = []
        seen: dict[str, list[str]] = {user: [] for user in self.users}
        for name, log in self.broker.logs.items():
            for subject, payload in log.messages:
                if subject.startswith("log."):
                    record = json.loads(payload)
                    if name != f"LOG-{partition_of('default', encode_token(record['user']), PARTITIONS)}":
                        found.append(f"{record['user']} in {name}")
                    seen[record["user"]].append(record["id"])
        for user, ids in seen.items():
            due = [name for name, to in self.due.items() if user in to]
            if [name for name in ids if name not in self.lost] != due:
                found.append(f"{user} has {ids}, not {due}")
            if len(ids) != len(set(ids)):
                found.append(f"{user} has a record twice: {ids}")
        return found
