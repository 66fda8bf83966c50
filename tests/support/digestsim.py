"""Digests in the simulated world of jobs: records that are planned in time or late, read or not, and what becomes of each."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import pytest

from engine.channels.channel import Job, Members, Outcome
from engine.jobs.claims import Done
from engine.jobs.desk import Hold, Over, Send, Split
from engine.jobs.digests import STAGE, digest_id
from engine.patience import patiently
from seamark.protocol.receipts import Receipt
from tests.support import jobsim
from tests.support.jobsim import SimDesk, World
from tests.support.jobstores import BEGAN, DOUBTS, FINAL, SimJobs, SimJournal, now, rank_of

DIGESTS = 2
TARGETS = {"email": ("",), "push": ("a", "b")}


class DigestDesk(SimDesk):
    """As the tables and the desk of a worker answer together."""

    world: "DigestWorld"

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        world = self.world
        await world.ask_store()
        if world.held:
            return Hold(self.clock.now() + timedelta(seconds=world.rng.uniform(1, 20)), "killed:all")
        members = job.members
        if members is None:
            found, at = world.open_of(job), self.clock.now()
            read = [id for id in found if id in world.read]
            await world.pass_time()
            tries = {id: world.tries_of(job, id) for id in found}
            ends = [
                Receipt(job.user, job.channel, "suppressed", at, id=id, reason="all_read", attempt=max(1, tries[id]))
                for id in read
            ]
            if ends:
                await patiently(world.journal.store, job, ends, seconds=math.inf)
            ids = tuple(id for id in found if id not in read)
            members = Members(ids, at, tried=max(0, *(tries[id] - 1 for id in ids)) if ids else 0)
        if set(members.ids) <= world.read:
            return Over("suppressed", "all_read")
        if job.channel == "push" and not job.target:
            return Split(TARGETS["push"], members)
        return Send(None, None, members)

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        world = self.world
        assert send.members is not None
        await world.pass_time()
        outcome = world.answer()
        if outcome.kind == "ok" or (outcome.kind == "ambiguous" and world.rng.random() < 0.5):
            world.taken.append((job.target, send.members))
        await world.pass_time()
        return outcome


class DigestJournal(SimJournal):
    async def ended(self, job: Job) -> Done | None:
        """There is no row of a digest itself."""
        await self.world.ask_store()
        return None


class DigestJobs(SimJobs):
    def acknowledge(self, number: int) -> None:
        """Whether a digest has ended is told of its members only, and judged there."""
        self.messages.pop(number, None)


class DigestWorld(World):
    """A world with a few digests, the records of each planned one after the other."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, jobs=DIGESTS * 6)
        self.jobs, self.journal = DigestJobs(self), DigestJournal(self)
        self.planned: dict[str, list[str]] = {}
        self.channels: dict[str, str] = {}
        self.ends: dict[str, datetime] = {}
        self.read: set[str] = set()
        self.taken: list[tuple[str, Members]] = []
        self.swept = 0

    def new_job(self) -> None:
        """One more record for a digest, and the message that its planner leaves: the window is over for each after the first."""
        if not self.left:
            return
        self.left -= 1
        key = f"c/{self.left % DIGESTS}"
        channel = self.channels.setdefault(key, self.rng.choice(("email", "push")))
        self.planned.setdefault(key, []).append(f"r{self.left}")
        unread = [id for ids in self.planned.values() for id in ids if id not in self.read]
        if unread and self.rng.random() < 0.3:
            self.read.add(self.rng.choice(unread))
        first_at = self.ends.setdefault(key, BEGAN + timedelta(seconds=now() + self.rng.uniform(-1, 1)))
        self.jobs.put(
            Job(
                id=digest_id(key),
                tenant="t",
                user="u",
                type="digest",
                channel=channel,  # type: ignore[arg-type]
                stage=STAGE,
                first_at=first_at,
                digest=key,
            )
        )

    def open_of(self, job: Job) -> list[str]:
        """The records of a digest that have not ended, as `NoticedTables.planned` tells them."""
        found = []
        for id in self.planned[job.digest]:
            last = max(self.journal.of(f"t/{id}/u/{job.channel}/"), key=rank_of, default=None)
            if last is None or last.state == "queued" or (last.state, last.reason) == ("ambiguous", "forgotten"):
                found.append(id)
        return found

    def tries_of(self, job: Job, id: str) -> int:
        """The highest number of a try of a record that is told."""
        return max((one.attempt for one in self.journal.of(f"t/{id}/u/{job.channel}/")), default=0)

    def faults(self) -> list[str]:
        if not self.jobs.empty:
            self.found.append(f"{len(self.jobs.messages)} messages and {len(self.jobs.schedules)} schedules are left")
        for key, ids in self.planned.items():
            for id in ids:
                for target in TARGETS[self.channels[key]]:
                    self.found += [f"{id} {target}: {fault}" for fault in self._faults_of_record(id, key, target)]
        return self.found

    def _faults_of_record(self, id: str, key: str, target: str) -> Iterator[str]:
        channel = self.channels[key]
        whole = max(self.journal.of(f"t/{id}/u/{channel}/"), key=rank_of, default=None)
        receipts = self.journal.of(f"t/{id}/u/{channel}/{target}")
        if channel == "push" and whole is not None and whole.state != "split":
            receipts = self.journal.of(f"t/{id}/u/{channel}/")  # it was never split
        last = max(receipts, key=rank_of, default=None)
        messages = [members for to, members in self.taken if to == target and id in members.ids]
        doubts = {(one.reason, one.attempt, one.at) for one in receipts if one.reason in DOUBTS}
        doubts |= {(one.reason, one.attempt, None) for one in receipts if one.reason == one.state == "ambiguous"}
        if target and last is not None and last.state == "queued" and "claims" in self.troubles and not messages:
            # Its worker had said that the parts wait, died before it made them, and Redis forgot which they were. To make them
            # first would send some twice in silence. The hourly sweep, which is not in this world, ends such rows as lost.
            self.swept += 1
            return
        if last is None or last.state not in FINAL:
            yield f"it ended as {last}"
            return
        if len(messages) > 1 + len(doubts):
            yield f"it was accepted {len(messages)} times, and doubted {len(doubts)} times"
        if len({members.ids for members in messages}) > 1 and "claims" not in self.troubles:
            yield f"it is in messages with different members: {messages}"
        if last.state == "sent" and not messages:
            yield "it is said to be sent, and was not accepted"
        # Where Redis has forgotten that it was begun, what has been read since ends as read.
        forgotten = last.reason == "all_read" and "claims" in self.troubles
        if messages and last.state not in {"sent", "ambiguous"} and not doubts and not forgotten:
            yield f"it was accepted, and is said to be {last.state}"
        if last.reason == "all_read" and id not in self.read:
            yield "it is said to be read, and was not"


@contextmanager
def with_digests(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers have a desk that knows digests."""
    patch.setattr(jobsim, "SimDesk", DigestDesk)
    yield
