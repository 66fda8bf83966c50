"""A simulated world for pagers: PostgreSQL, BULK, dispatchers and planners in memory, on a clock of their own.

Pagers die at any await, sleep for minutes and wake up, and are started again; answers are lost, appends come late, deposed
leaders show the past, the database fails over, BULK trims what is old. All that is random comes from one seed. What must
never happen is noted in `World.faults` the moment it happens.
"""

import asyncio
import itertools
import json
import random
from typing import Any

from engine.broker.answers import EPOCH_KEY
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, After, PubAck, Stored, StreamState
from engine.campaigns.bulk import Bulk
from engine.campaigns.cuts import Cut
from engine.campaigns.pager import Pager
from engine.campaigns.states import (
    UNDER_WAY,
    Campaign,
    Withheld,
)
from engine.dispatch.source import BULK
from engine.errors import ApiError, StoreUnavailable, Unanswered, Unavailable
from engine.log.marks import Mark, encode_mark
from seamark.protocol.cursor import parse_cursor
from tests.support.pagertable import Clock, SimTable, replace

PARTITIONS = 2
EPOCH = "bbbbbbbb"
LATE_SECONDS = 120.0
"""A write of a process that slept: its connection is given up by the server after that."""
KEPT_SECONDS = 3600.0
"""What BULK keeps at least."""


class SimBroker:
    """BULK, and the marks of its dispatchers."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.messages: dict[int, tuple[str, bytes, float]] = {}
        self.first_seq, self.last_seq = 1, 0
        self.late: list[tuple[str, bytes, int | None, float]] = []
        self.marks = [Mark(EPOCH, 0, 1, "d", f"llllll0{q}") for q in range(PARTITIONS)]

    def put(self, subject: str, payload: bytes, expected: int | None) -> int:
        stored = self.world.stored_subject(subject)
        if expected is not None and any(one[0] == stored for one in self.messages.values()):
            raise ApiError(400, WRONG_LAST_SEQUENCE, "wrong last sequence")
        self.last_seq += 1
        self.messages[self.last_seq] = (stored, payload, self.world.clock.seconds)
        return self.last_seq

    async def pass_time(self) -> None:
        await self.world.pass_time()
        if self.late and self.world.rng.random() < 0.3:
            subject, payload, expected, until = self.late.pop(self.world.rng.randrange(len(self.late)))
            if self.world.clock.seconds <= until:
                try:
                    self.put(subject, payload, expected)
                except ApiError:
                    return

    async def append(self, subject: str, payload: bytes, *, after: After | None = None, **_: Any) -> PubAck:
        expected = None if after is None else after.seq
        sent = self.world.clock.seconds
        await self.pass_time()
        if self.world.fault(0.04):
            raise Unavailable("not stored")
        if self.world.fault(0.06):
            self.late.append((subject, payload, expected, self.world.clock.seconds + LATE_SECONDS))
            raise Unanswered("on its way")
        if self.world.clock.seconds - sent > LATE_SECONDS:
            raise Unanswered("the connection was given up")
        seq = self.put(subject, payload, expected)
        await self.pass_time()
        if self.world.fault(0.05):
            raise Unanswered("stored, the answer was lost")
        return PubAck("BULK", seq)

    async def stream(self, name: str, **_: Any) -> StreamState:
        await self.pass_time()
        if self.world.fault(0.02):
            raise Unavailable("no leader")
        metadata = {EPOCH_KEY: EPOCH}
        behind = self.world.rng.randint(0, 2) if self.world.fault(0.1) else 0
        last = max(self.first_seq - 1, self.last_seq - behind)
        return StreamState(name, EPOCH, PARTITIONS, self.first_seq, last, len(self.messages), {"metadata": metadata})

    async def leader_last(self, stream: str, subject: str, **_: Any) -> Stored | None:
        await self.pass_time()
        if self.world.fault(0.02):
            raise Unanswered("no answer")
        if subject.startswith("log."):
            end = self.world.planners.ends[int(stream[4:])]
            return Stored(subject, end, "", b"", b"") if end else None
        if stream.startswith("LOG-"):
            mark = self.marks[int(stream[4:])]
            return Stored(subject, 1, "", b"", encode_mark(mark))
        # A deposed leader may show the past.
        upto = self.last_seq - (self.world.rng.randint(0, 3) if self.world.fault(0.1) else 0)
        seqs = [seq for seq, (stored, _, _) in self.messages.items() if stored == subject and seq <= upto]
        return Stored(subject, max(seqs), "", b"", self.messages[max(seqs)][1]) if seqs else None

    def trim(self, age: float) -> None:
        for seq, (_, _, at) in list(self.messages.items()):
            q = int(self.messages[seq][0].split(".")[1])
            if at + age < self.world.clock.seconds and self.marks[q].seq >= seq:
                del self.messages[seq]
        self.first_seq = min(self.messages, default=self.last_seq + 1)


class SimPlanners:
    """Planners that follow the logs, late."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.ends = [0] * PARTITIONS
        self.planned = [0] * PARTITIONS

    async def has_room(self) -> bool:
        await self.world.pass_time()
        return not self.world.fault(0.1)

    async def passed(self, heads: dict[str, str]) -> bool:
        await self.world.pass_time()
        return all(self.planned[int(p)] >= parse_cursor(end).seq for p, end in heads.items())


class SimFolds:
    """The inbox, which follows the logs, late."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.folded = [0] * PARTITIONS

    async def withheld(self, tenant: str, event: str, heads: dict[str, str]) -> Withheld | None:
        await self.world.pass_time()
        if self.world.fault(0.05):
            raise StoreUnavailable("no answer")
        if any(self.folded[int(p)] < parse_cursor(end).seq for p, end in heads.items()):
            return None
        id, _, number = event.partition(":")
        ends = self.world.withheld[id].get(int(number), [])
        return Withheld(sum(self.folded[p] >= end for p, end in ends), 0)


class World:
    """Campaigns, their audiences, and pagers that come and go."""

    def __init__(self, seed: int, *, window: int = 6) -> None:
        self.rng = random.Random(seed)
        self.window = window
        self.clock = Clock()
        self.calm = False
        self.faults: list[str] = []
        self.kills = self.splits = 0
        self.table, self.broker, self.planners = SimTable(self), SimBroker(self), SimPlanners(self)
        self.folds = SimFolds(self)
        self.with_planners = self.rng.random() < 0.7
        self.outage = self.rng.random() < 0.2
        self.members: dict[str, set[str]] = {}
        self.always: dict[str, set[str]] = {}
        self.excluded: dict[str, set[str]] = {}
        self.got: dict[str, list[tuple[int, str]]] = {}
        self.placed: dict[str, dict[int, list[tuple[int, int]]]] = {}
        self.withheld: dict[str, dict[int, list[tuple[int, int]]]] = {}
        self.cancelling: list[str] = []
        self.cancelled: set[str] = set()
        for number in range(self.rng.randint(1, 3)):
            self._create(f"c{number}")

    def _create(self, id: str) -> None:
        users = {f"u{n:03}" for n in self.rng.sample(range(200), self.rng.randint(0, 30))}
        self.members[id], self.always[id] = set(users), set(users)
        self.excluded[id] = {user for user in sorted(users) if self.rng.random() < 0.15}
        self.got[id], self.placed[id], self.withheld[id] = [], {}, {}
        rate = self.rng.choice([None, None, 1, 3])
        self.table.create(
            self.rng.choice(["t1", "t2"]),
            id,
            rate=rate,
            start_at=self.rng.choice([0.0, 0.0, 5.0]),
            not_after=self.rng.choice([None, None, None, 30.0]),
        )

    def stored_subject(self, subject: str) -> str:
        return Bulk(self.broker, PARTITIONS)._stored(subject)  # type: ignore[arg-type]

    async def pass_time(self) -> None:
        for _ in range(self.rng.choice([0, 1, 1, 2, 3])):
            await asyncio.sleep(0)
        if not self.calm and self.rng.random() < 0.004:
            await self.clock.sleep(self.rng.choice([1.0, 10.0, 60.0, LATE_SECONDS * 2]))  # suspended

    def fault(self, chance: float) -> bool:
        return not self.calm and self.rng.random() < chance

    # --- what is seen to happen --------------------------------------------------------------------------------------

    def claimed(self, campaign: Campaign, piece: Cut) -> None:
        if not piece.recipients and piece.members > piece.excluded:
            self.faults.append(f"{campaign.id}: a page was skipped although it has recipients")

    def page_changed(self, id: str, page: dict[str, Any]) -> None:
        if page["state"] == "ambiguous" and not self.outage:
            self.faults.append(f"{id}:{page['number']} is ambiguous although BULK has forgotten nothing")
        if page["state"] == "done":
            ends = self.placed[id].get(page["number"])
            if ends is None:
                self.faults.append(f"{id}:{page['number']} is done before it was dispatched")
            elif self.with_planners and any(self.planners.planned[p] < end for p, end in ends):
                self.faults.append(f"{id}:{page['number']} is done before it was planned")

    def dispatch(self, q: int) -> None:
        """Dispatch the next page of a partition."""
        mark = self.broker.marks[q]
        due = [
            seq
            for seq, (subject, _, _) in self.broker.messages.items()
            if seq > mark.seq and subject.startswith(f"{BULK.prefix}.{q}.")
        ]
        if not due:
            return
        event = json.loads(self.broker.messages[min(due)][1])
        id, number = event["campaign"]["id"], event["campaign"]["page"]
        # Dispatchers hear of a cancelled campaign in the midst of a page, too.
        shown = (
            self.rng.choice([0, self.rng.randint(0, len(event["to"]))]) if id in self.cancelled else len(event["to"])
        )
        ends = []
        for user in event["to"]:
            p = int(user[1:]) % PARTITIONS
            self.planners.ends[p] += 1
            ends.append((p, self.planners.ends[p]))
        self.got[id] += [(number, user) for user in event["to"][:shown]]
        self.placed[id][number], self.withheld[id][number] = ends, ends[shown:]
        self.broker.marks[q] = replace(mark, seq=min(due))

    # --- what happens ------------------------------------------------------------------------------------------------

    def happen(self) -> None:
        """One thing that happens by itself."""
        if self.cancelling and self.rng.random() < 0.3:
            self.cancelled.add(self.cancelling.pop())
        roll = self.rng.random()
        if roll < 0.45:
            self.dispatch(self.rng.randrange(PARTITIONS))
        elif roll < 0.75:
            p = self.rng.randrange(PARTITIONS)
            for reached in (self.planners.planned, self.folds.folded):
                reached[p] = min(self.planners.ends[p], reached[p] + self.rng.randint(1, 8))
        elif roll < 0.9:
            self._join_or_leave()
        elif roll < 0.93 and not self.calm:
            self.table.away_until = self.clock.seconds + self.rng.choice([0.5, 5.0])
        elif not self.calm and roll < 0.96:
            self._command()

    def _join_or_leave(self) -> None:
        if self.calm:
            return
        id = self.rng.choice(sorted(self.members))
        user = f"u{self.rng.randrange(200):03}"
        if user in self.members[id]:
            self.members[id].discard(user)
            self.always[id].discard(user)
        else:
            self.members[id].add(user)

    def _command(self) -> None:
        tenant, id = self.rng.choice(sorted(self.table.campaigns))
        state = self.table.campaigns[tenant, id]["state"]
        what = self.rng.choice(["pause", "resume", "resume", "rate", "cancel"])
        if what == "rate":
            self.table.command(tenant, id, rate=self.rng.choice([None, 1, 5]))
        elif what == "cancel" and self.rng.random() < 0.3:
            self.table.command(tenant, id, state="cancelled")
            if self.table.campaigns[tenant, id]["state"] == "cancelled":
                self.cancelling.append(id)
        elif what == "pause" and state == "running":
            self.table.command(tenant, id, state="paused")
        elif what == "resume" and state == "paused":
            self.table.command(tenant, id, state="running")

    def pager(self) -> Pager:
        return Pager(
            self.table,  # type: ignore[arg-type]
            Bulk(self.broker, PARTITIONS),  # type: ignore[arg-type]
            planners=self.planners if self.with_planners else None,
            folds=self.folds,
            sleep=self.clock.sleep,
        )

    async def run(self) -> None:
        """Pagers fight and die; then one is left in peace, and has to bring everything to its end."""
        await self._torment(self.rng.randint(3, 6))
        if self.outage:
            self.broker.late.clear()
            for _ in range(60):
                self.dispatch(self.rng.randrange(PARTITIONS))
            self.clock.seconds += KEPT_SECONDS + LATE_SECONDS
            self.broker.trim(KEPT_SECONDS)
            await self._torment(self.rng.randint(1, 2))
        self.calm = True
        for tenant, id in self.table.campaigns:
            if self.table.campaigns[tenant, id]["state"] == "paused" and self.rng.random() < 0.5:
                self.table.command(tenant, id, state="running")
        task = asyncio.create_task(self.pager().run(), name="pager")
        for _ in range(4000):
            await self._turn()
            if task.done() or all(self._settled(key) for key in self.table.campaigns):
                break
        task.cancel()
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(ended, asyncio.CancelledError):
            self.faults.append(f"the pager ended: {ended!r}")
        self._judge()

    def _settled(self, key: tuple[str, str]) -> bool:
        row = self.table.campaigns[key]
        if row["state"] == "paused" and row["not_after"] is None:
            return not any(page["state"] in UNDER_WAY for page in self.table.pages[key].values())
        return bool(row["finished"])

    async def _torment(self, pagers: int) -> None:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(pagers):
            if len(tasks) > 1 or (tasks and self.rng.random() < 0.7):
                self.kills += 1
                tasks.pop(self.rng.randrange(len(tasks))).cancel()
            tasks.append(asyncio.create_task(self.pager().run(), name="pager"))
            for _ in range(self.rng.randint(5, 80)):
                await self._turn()
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                self.faults.append(f"a pager ended: {ended!r}")

    async def _turn(self) -> None:
        for _ in range(self.rng.randint(1, 6)):
            await asyncio.sleep(0)
        self.happen()
        self.clock.advance()

    def _judge(self) -> None:
        for key, row in self.table.campaigns.items():
            id, pages = key[1], sorted(self.table.pages[key].values(), key=lambda page: page["after"])
            if not self._settled(key):
                self.faults.append(f"{id} is {row['state']} and never ends: {[page['state'] for page in pages]}")
            if [page["after"] for page in pages] != ["", *(page["up_to"] for page in pages)][: len(pages)]:
                self._check_gaps(id, pages)
            for page in pages:
                withheld = len(self.withheld[id].get(page["number"], ()))
                if page["state"] == "done" and page["cancelled"] != withheld:
                    self.faults.append(f"{id}:{page['number']}: {withheld} are withheld, not {page['cancelled']}")
            users = [user for _, user in self.got[id]]
            if len(users) != len(set(users)):
                self.faults.append(f"{id}: {[user for user in set(users) if users.count(user) > 1]} got it twice")
            if wrong := self.excluded[id] & set(users):
                self.faults.append(f"{id}: {wrong} are excluded and got it")
            if row["state"] == "done":
                unsure = [page for page in pages if page["state"] == "ambiguous"]
                due = self.always[id] - self.excluded[id] - set(users)
                if left := {u for u in due if not any(p["after"] < u <= p["up_to"] for p in unsure)}:
                    self.faults.append(f"{id}: {sorted(left)} were left out")

    def _check_gaps(self, id: str, pages: list[dict[str, Any]]) -> None:
        """Between pages nobody may stand who was there all the time; where nobody stood when it was cut, a gap is none."""
        for before, page in itertools.pairwise(pages):
            if page["after"] < before["up_to"]:
                self.faults.append(f"{id}: pages {before['number']} and {page['number']} share users")
