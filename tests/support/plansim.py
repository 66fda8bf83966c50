"""Planners of one log over a simulated broker that loses, delays and doubles what it is asked, while the tenant's rules change.

A planner that is given the log begins with the mark and reads what is there; from then on only it is handed new records, while
those before it go on with what they hold: zombies. Everything that is random comes from one seed, and there are no sleeps.
"""

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

from engine.broker.answers import EPOCH_KEY
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, Outgoing, PubAck, Stored, StreamState
from engine.errors import ApiError, Unanswered, Unavailable
from engine.log.marks import Mark, decode_mark, encode_mark
from engine.partition.reader import Delivered
from engine.plan.rules import ChannelRule, TypeRule
from engine.planner.witness import Witness
from engine.planner.worker import PlanWorker
from projections.folds.deliveries import Receipts, fold
from seamark.protocol.errors import SeamarkError
from seamark.protocol.receipts import decode_receipt
from tests.support.planning import FixedProfiles, FixedRules

EPOCHS = {"LOG-0": "llllllll", "JOBS": "jjjjjjjj"}
START = 1_800_000_000
CALM_ATTEMPTS_MAX = 50
NEVER_CHANGED = "order.shipped"
"""Type of the records that always go by mail. The rule of the others comes and goes."""


class SimJobs:
    """JOBS: all marks there ever were; a rollup leaves the newest."""

    def __init__(self) -> None:
        self.marks = [(1, Mark(EPOCHS["LOG-0"], 0, 100, "topology", EPOCHS["JOBS"]))]
        self.seq = 1

    def commit(self, batch: Sequence[Outgoing]) -> int:
        """The last sequence; ValueError when the expectation of the mark does not hold."""
        (mark,) = batch
        assert b"Nats-Rollup:sub" in mark.headers
        expected = int(mark.headers.split(b"Nats-Expected-Last-Subject-Sequence:")[1].split(b"\r\n")[0])
        if self.marks[-1][0] != expected:
            raise ValueError
        self.seq += 1
        self.marks.append((self.seq, decode_mark(mark.payload)))
        return self.seq

    def planner_of(self, seq: int) -> int | None:
        """The term of whoever moved the mark over a record; None: nobody has."""
        return next((mark.term for _, mark in self.marks if mark.seq >= seq), None)


class SimReceipts:
    """RECEIPTS."""

    def __init__(self) -> None:
        self.stored: list[Delivered] = []

    def commit(self, batch: Sequence[Outgoing]) -> int:
        for message in batch:
            at = (START + len(self.stored)) * 1_000_000_000
            self.stored.append(Delivered(message.subject.encode(), len(self.stored) + 1, at, b"", message.payload))
        return len(self.stored)


class SimBroker:
    """What a planner asks of a broker. One for all processes; faults are drawn for each request."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.records: list[Delivered] = []
        self.jobs, self.receipts = SimJobs(), SimReceipts()
        self.late: list[tuple[SimJobs | SimReceipts, Sequence[Outgoing]]] = []
        self.calm = False

    async def _pass_time(self) -> None:
        # Now and then a process is not given the processor for long: time for others to take over.
        for _ in range(self.rng.choice([0, 1, 1, 2, 3, 8, 0 if self.calm else 120])):
            await asyncio.sleep(0)
        if self.late and self.rng.random() < 0.3:
            stream, batch = self.late.pop(self.rng.randrange(len(self.late)))
            try:
                stream.commit(batch)
            except ValueError:
                return  # refused, and nobody hears of it

    def _fault(self, chance: float) -> bool:
        return not self.calm and self.rng.random() < chance

    async def stream(self, name: str, **_: Any) -> StreamState:
        await self._pass_time()
        if self._fault(0.02):
            raise Unavailable
        last = self.records[-1].seq if name == "LOG-0" else self.jobs.seq
        return StreamState(name, EPOCHS[name], 1, 1, last, 1, {"metadata": {EPOCH_KEY: EPOCHS[name]}})

    async def leader_last(self, stream: str, subject: str, **_: Any) -> Stored | None:
        await self._pass_time()
        if self._fault(0.03):
            raise Unanswered
        # A deposed leader may show the past.
        back = self.rng.randint(0, 3) if self._fault(0.1) else 0
        seq, mark = self.jobs.marks[max(0, len(self.jobs.marks) - 1 - back)]
        return Stored(subject, seq, "", b"", encode_mark(mark))

    async def leader_next(self, *_: Any, **__: Any) -> None:
        """Nobody can tell how old the mark is."""
        return

    async def commit(self, batch: Sequence[Outgoing], **_: Any) -> PubAck:
        await self._pass_time()
        stream = self.jobs if batch[-1].subject.startswith("jmark.") else self.receipts
        if self._fault(0.05):
            raise Unavailable  # not stored
        if self._fault(0.05):
            raise Unanswered  # not stored, but who knows
        if self._fault(0.08):
            self.late.append((stream, batch))
            raise Unanswered  # still on its way
        try:
            seq = stream.commit(batch)
        except ValueError:
            await self._pass_time()
            raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence") from None
        await self._pass_time()
        if self._fault(0.08):
            raise Unanswered  # stored, the answer was lost
        return PubAck("", seq)


class SimWitnesses:
    """A witness that is never away, and never ahead of the mark."""

    def __init__(self) -> None:
        self.seen: Witness | None = None

    async def of(self, _: int) -> Witness | None:
        await asyncio.sleep(0)
        return self.seen

    async def begin(self, _: int, now: Witness, seen: Witness | None) -> None:
        await asyncio.sleep(0)
        if self.seen == seen:
            self.seen = now


class World:
    """One log, rules that change, and planners that fight over it."""

    def __init__(self, seed: int, *, records: int = 60) -> None:
        self.rng = random.Random(seed)
        self.broker = SimBroker(self.rng)
        self.rules = FixedRules()
        self.witnesses = SimWitnesses()
        self.count = records
        self.chosen: object = None
        self.refused = 0
        self.turn_rules()
        self.write(5)

    def turn_rules(self) -> None:
        """The rule of some types comes, goes, or names other channels."""
        mail = TypeRule(pattern=NEVER_CHANGED, channels={"email": ChannelRule()})
        channels = self.rng.choice([{}, {"push": ChannelRule()}, {"push": ChannelRule(), "email": ChannelRule()}])
        self.rules.rules = [mail, TypeRule(pattern="demo.hello", channels=channels)]

    def write(self, count: int) -> None:
        """Records that come; other messages lie between them."""
        for _ in range(min(count, self.count - len(self.broker.records))):
            number = len(self.broker.records) + 1
            kind = NEVER_CHANGED if self.rng.random() < 0.3 else "demo.hello"
            body = {"id": f"e{number}", "kind": "notification", "type": kind}
            body |= {"plan": {"inapp": {"when": "now", "why": "default"}}}
            payload = json.dumps(body).encode()
            self.broker.records.append(
                Delivered(b"log.0.default.alice", number * 2, (START + number) * 10**9, b"", payload)
            )

    def worker(self) -> PlanWorker:
        sources = (self.rules, FixedProfiles(), lambda tenant, user: (), self.witnesses)
        return PlanWorker(self.broker, 0, *sources)  # type: ignore[arg-type]

    async def process(self, worker: PlanWorker) -> None:
        """What a reader does, over and over: get the log, take over, read from the mark, hand on in batches."""
        for attempt in itertools.count():
            if self.broker.calm and attempt > CALM_ATTEMPTS_MAX:
                return  # what is missing then tells
            self.chosen = worker
            try:
                position = await worker.acquire()
                held = [record for record in self.broker.records if record.seq >= position]
                while held or self.chosen is worker:
                    if self.rng.random() < 0.5:
                        worker._marked_at = -1e9  # a second has passed
                    size = self.rng.randint(1, 10)
                    batch, held = held[:size], held[size:]
                    if batch:
                        await worker.handle(batch)
                        position = batch[-1].seq + 1
                    elif self.broker.calm and len(self.broker.records) == self.count:
                        await worker.pass_over(position - 1)
                        return
                    await asyncio.sleep(0)
                    if not held and self.chosen is worker:  # only the one that was chosen last is handed more
                        held = [record for record in self.broker.records if record.seq >= position]
            except SeamarkError:
                self.refused += 1
                # It woke up, was refused, and wants to work again: sooner or later.
                for _ in range(self.rng.randint(0, 50)):
                    await asyncio.sleep(0)

    async def run(self) -> None:
        """Planners come, go and die at any await, while records come and rules change; in the end one is left in peace."""
        tasks: list[asyncio.Task[None]] = []
        for _ in range(self.rng.randint(3, 8)):
            if tasks and self.rng.random() < 0.6:
                tasks.pop(self.rng.randrange(len(tasks))).cancel()
            tasks.append(asyncio.create_task(self.process(self.worker()), name="process"))
            for _ in range(self.rng.randint(5, 300)):
                await asyncio.sleep(0)
                if self.rng.random() < 0.03:
                    self.turn_rules()
                if self.rng.random() < 0.05:
                    self.write(self.rng.randint(1, 8))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.write(self.count)
        self.broker.calm = True
        await self.process(self.worker())

    def shown(self) -> Receipts:
        """The fold of all receipts, in any order: here in the reverse one."""
        return fold(reversed(self.broker.receipts.stored))

    def faults(self) -> list[str]:
        """What is wrong with the plans that are shown."""
        found, said = [], {}
        for stored in self.broker.receipts.stored:
            receipt = decode_receipt(stored.payload)
            said[receipt.id, receipt.term] = receipt.plan
        shown = self.shown().plans
        for record in self.broker.records:
            id, kind = (json.loads(record.payload)[name] for name in ("id", "type"))
            term = self.broker.jobs.planner_of(record.seq)
            plan = shown.get(("default", "alice", id))
            if term is None:
                found.append(f"{id} was never planned")
            elif plan is not None and plan.term != term:
                found.append(f"{id}: shown is the plan of term {plan.term}, and {term} has committed")
            elif plan is None and kind == NEVER_CHANGED:
                found.append(f"{id}: no plan is shown")
            elif plan is not None and set(said[id, term] or {}) != set(plan.channels):
                found.append(f"{id}: a plan of {set(plan.channels)} is shown")
        return found
