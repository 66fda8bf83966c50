"""Dispatch workers of EVENTS and of LATER over a simulated broker that fires schedules when it likes, late, and more than once.

Some events have a `send_at`. Now and then, with the dispatchers stopped, LATER is put back to a backup, and `topology restore`
said. In half of the worlds Redis forgets claims instead, and nobody publishes twice. No time passes: the broker says what is due.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from engine.broker.jetstream import Outgoing, Page, Stored
from engine.dispatch.due import DueWorker
from engine.dispatch.source import LATER
from engine.errors import Unanswered
from engine.log.writer import decode_mark
from engine.partition.worker import Delivered
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.events import encode
from tests.support.marksim import PARTITIONS, Log, SimBroker, SimClaims, World

NOW = int(time.time() * 1e9)
SOON = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=2)
AHEAD = (0.05, 0.35, 0.7, 1.2)
"""Seconds behind `SOON`: two tenths of a slot, and two slots more."""


class LaterLog(Log):
    """LATER: messages with their headers, and the schedules that are still to fire."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: list[bytes] = []
        self.pending: dict[str, bytes] = {}
        self.fired = 0

    def commit(self, batch: Sequence[Outgoing]) -> int:
        last = super().commit(batch)
        self.headers += [message.headers for message in batch]
        self._note(batch)
        return last

    def _note(self, batch: Sequence[Outgoing]) -> None:
        schedules = [message for message in batch if message.subject.startswith("later.")]
        assert len({message.subject for message in schedules}) == len(schedules), "a batch replaces its own schedule"
        self.pending.update({message.subject: message.headers for message in schedules})

    def fire(self, subject: str, *, keep: bool = False) -> None:
        """Store the wake-up; `keep`: the server dies before the schedule is gone."""
        headers = self.pending[subject] if keep else self.pending.pop(subject)
        target = headers.split(b"Nats-Schedule-Target:")[1].split(b"\r\n")[0].decode()
        self.messages.append((target, b""))
        self.headers.append(b"")
        self.ends.append(len(self.messages))
        self.fired += 1

    def put_back(self, end: int) -> None:
        super().put_back(end)
        del self.headers[end:]
        self.pending = {}
        for (subject, _), headers in zip(self.messages, self.headers, strict=True):
            if subject.startswith("later."):
                self.pending[subject] = headers
            elif subject.startswith("due."):
                self.pending.pop(subject.replace("due.", "later."), None)

    def of(self, subject: str, seq: int, upto: int) -> list[Stored]:
        """The messages of a subject from `seq` on."""
        own = subject.removesuffix("*")
        return [
            Stored(name, number, "1970-01-01T00:00:00Z", b"NATS/1.0\r\n" + self.headers[number - 1] + b"\r\n", payload)
            for number, (name, payload) in enumerate(self.messages[:upto], 1)
            if number >= seq and (name == subject or (own != subject and name.startswith(own)))
        ]


class LaterBroker(SimBroker):
    """The broker of `marksim` with LATER beside the logs."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.later = LaterLog()
        self.logs["LATER"] = self.later

    async def _pass_time(self) -> None:
        await super()._pass_time()
        if self.later.pending and self.rng.random() < 0.2:
            self.later.fire(self.rng.choice(sorted(self.later.pending)), keep=self.rng.random() < 0.3)

    async def leader_next(self, stream: str, subject: str, seq: int, **_: Any) -> Stored | None:  # type: ignore[override]
        if stream != LATER.stream or subject == ">":
            return None
        await self._pass_time()
        if self._fault(0.03):
            raise Unanswered
        return next(iter(self.later.of(subject, seq, len(self.later.messages))), None)

    async def next_by_subject(self, stream: str, subject: str, seq: int, **_: Any) -> Page:
        """By a replica that may lag."""
        await self._pass_time()
        upto = len(self.later.messages) - (self.rng.randint(0, 30) if self._fault(0.2) else 0)
        found = self.later.of(subject, seq, max(0, upto))
        return Page(found[: self.rng.randint(1, 3)], more=len(found) > 3)


class LaterClaims(SimClaims):
    """Claims that pass from an event as it was to the wake-up by which it is due."""

    async def take(self, claims: Sequence[Any]) -> list[bool]:
        for claim in claims:
            if claim.instead_of and self.holders.get(claim.event_id) in claim.instead_of:
                self.holders[claim.event_id] = claim.position
        return await super().take(claims)


class LaterWorld(World):
    """Partition 0 of EVENTS and of LATER, and processes that fight over both."""

    def __init__(self, seed: int, *, events: int = 24) -> None:
        self.forgetful = seed % 2 == 1
        self.later: set[str] = set()
        super().__init__(seed, events=events)
        self.broker: LaterBroker = LaterBroker(self.rng)
        self.claims: LaterClaims = LaterClaims()

    def publish(self) -> None:
        for number in range(len(self.events) + 1, self.count + 1):
            again = len(self.due) > 2 and not self.forgetful and self.rng.random() < 0.1
            name = self.rng.choice(sorted(self.due)) if again else f"e{number}"
            to = [self.home] if self.rng.random() < 0.4 else self.rng.sample(self.users, self.rng.randint(1, 9))
            later = self.rng.random() < 0.5 if not again else name in self.later
            send_at = SOON + timedelta(seconds=self.rng.choice(AHEAD)) if later else None
            encoded = encode(to=to, type="sim.n", id=name, key=self.home, data={}, send_at=send_at)
            subject = encoded.subject.replace("events.", "ev.0.", 1).encode()
            self.events.append(Delivered(subject, number * 2, NOW, b"", encoded.payload))
            self.due.setdefault(name, frozenset(to))
            if later:
                self.later.add(name)

    def restore(self) -> None:
        """LATER comes back from a backup. What it has lost is not sent any more, if it was not yet."""
        self.restores += 1
        self.broker.late.clear()
        log = self.broker.later
        before = {json.loads(payload)["id"] for subject, payload in log.messages if subject.startswith("wait.")}
        log.put_back(self.rng.choice(log.ends))
        kept = {json.loads(payload)["id"] for subject, payload in log.messages if subject.startswith("wait.")}
        self.lost |= before - kept
        # Who was woken by what is lost counts as sent: a round that was under way may lack some of its records.
        end = len(log.messages)
        woken = {id: parse_cursor(at) for id, at in self.claims.holders.items() if not at.startswith("eeee")}
        self.lost |= {id for id, at in woken.items() if at.seq > end}
        self._rotate("LATER", len(log.messages))

    async def torment(self, processes: int) -> None:
        """Processes of both kinds come, go and die; in a forgetful world Redis loses all claims, too."""
        if self.forgetful:
            self.claims.holders.clear()
        await asyncio.gather(super().torment(processes), self._torment_due(processes))

    async def _torment_due(self, processes: int) -> None:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(processes):
            if tasks and self.rng.random() < 0.7:
                tasks.pop(self.rng.randrange(len(tasks))).cancel()
            tasks.append(asyncio.create_task(self.process_due(), name="process of LATER"))
            for _ in range(self.rng.randint(5, 300)):
                await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def process_due(self) -> None:
        """As `process`, over wake-ups."""
        await self.reading(DueWorker(self.broker, self.claims, 0, PARTITIONS, LATER), self.wake_ups)  # type: ignore[arg-type]

    def wake_ups(self) -> list[Delivered]:
        """What the consumer of the partition would bring."""
        messages = enumerate(self.broker.later.messages, 1)
        return [
            Delivered(name.encode(), seq, 0, b"", body) for seq, (name, body) in messages if name.startswith("due.0.")
        ]

    async def run(self) -> None:
        restores = 0 if self.forgetful else self.rng.choice([0, 1, 2])
        for _ in range(restores):
            await self.torment(self.rng.randint(1, 3))
            self.restore()
        for _ in range(3 if self.forgetful else 1):
            await self.torment(self.rng.randint(1, 3))
        self.broker.calm = True
        await self.process(self.worker())
        while self.broker.later.pending:
            self.broker.later.fire(self.rng.choice(sorted(self.broker.later.pending)))
        await self.process_due()

    def faults(self) -> list[str]:
        """Who has not had an event exactly once; whether what was not put off came in another order; what the mark hides."""
        seen: dict[str, list[str]] = {user: [] for user in self.users}
        for name, log in self.broker.logs.items():
            for subject, payload in log.messages:
                if subject.startswith("log.") and name != "LATER":
                    record = json.loads(payload)
                    seen[record["user"]].append(record["id"])
        found = []
        marks = [body for subject, body in self.broker.logs["LOG-0"].messages if subject == "mark.0.l0"]
        if (wake_ups := self.wake_ups()) and not (marks and decode_mark(marks[-1]).next_seq > wake_ups[-1].seq):
            found.append("the mark says that not all wake-ups are done")
        for user, ids in seen.items():
            at_once = [name for name, to in self.due.items() if user in to and name not in self.later]
            if [name for name in ids if name not in self.later] != at_once:
                found.append(f"{user} has {ids}, not {at_once} in this order")
            later = {name for name, to in self.due.items() if user in to and name in self.later}
            if missing := later - set(ids) - self.lost:
                found.append(f"{user} never got {sorted(missing)}")
            if len(ids) != len(set(ids)):
                found.append(f"{user} has a record twice: {ids}")
        return found
