"""What a handler does with single jobs, where a simulated world would say it less plainly."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from engine.channels.channel import Job, Lane
from engine.jobs.claims import Claim, ClaimsUnavailable, Done, Look
from engine.jobs.desk import Hold, Over, Split
from engine.jobs.handling import Handler
from engine.jobs.life import AskDeliveries, Go, judge
from engine.jobs.retry import POLICIES
from seamark.protocol.receipts import Receipt
from tests.support.sending import a_job


class Away:
    """Claims while Redis is away."""

    async def look(self, key: str) -> Look:
        raise ClaimsUnavailable

    def unbegun(self, key: str) -> Look | None:
        return None

    async def put(self, *args: Any, **kept: Any) -> Look:
        raise ClaimsUnavailable


class Told:
    """Queue, journal, clock and message: what is written into each, in order."""

    deliveries, held_seconds = 1, 0.0

    def __init__(self, job: Job) -> None:
        self.job = job
        self.steps: list[str] = []

    async def schedule(self, job: Job, due: datetime) -> None:
        self.steps.append("put back")

    async def add(self, jobs: Sequence[Job]) -> None:
        self.steps.append("add " + " ".join(job.target for job in jobs))

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        self.steps += [f"{one.state} {one.device}".strip() for one in receipts]

    async def conclude(self, job: Job, done: Done) -> None: ...

    async def ended(self, job: Job) -> Done | None:
        return None

    async def ack(self, confirmed: bool) -> None:
        self.steps.append("ack, confirmed" if confirmed else "ack")

    def now(self) -> datetime:
        return datetime.now(UTC)


class Splitting:
    repeatable = True

    async def decide(self, job: Job) -> Split:
        return Split(("phone", "tablet"))


async def test_a_job_that_is_split_while_redis_is_away_is_split_once() -> None:
    told = Told(a_job("push", "n1"))
    await Handler(Away(), told, told, Splitting(), POLICIES["push"], told).handle(told)  # type: ignore[arg-type]
    assert told.steps == ["split", "queued phone", "queued tablet", "add phone tablet", "ack"]


class Kept:
    """Claims as they are stored."""

    def __init__(self) -> None:
        self.claim: Claim | None = None

    async def look(self, key: str) -> Look:
        now = datetime.now(UTC).timestamp()
        return Look(self.claim, b"", 0.0, now, now, 0.0)

    def unbegun(self, key: str) -> Look | None:
        return None

    async def put(self, key: str, expected: Look, claim: Claim, **kept: Any) -> Look:
        self.claim = claim
        return await self.look(key)


class Holding:
    """A desk that lets nobody through for now."""

    repeatable = True

    async def decide(self, job: Job) -> Hold:
        return Hold(datetime.now(UTC), "paused")


class Unseen(Kept):
    """The same, of which the worker has heard a moment ago that nobody had begun anything."""

    def unbegun(self, key: str) -> Look | None:
        now = datetime.now(UTC).timestamp()
        return Look(None, b"", 0.0, 0.0, now, 0.0, assumed=True)


async def test_a_job_that_is_put_back_is_looked_at_first_and_ends_if_another_message_of_it_has_ended_it() -> None:
    """That nobody had begun it would else be said of a job that was sent, and be believed once its claim is let go of."""
    claims = Unseen()
    for claim, steps in ((None, ["put back", "ack"]), (Done(0, "sent", "ok"), ["sent", "ack"])):
        claims.claim, told = claim, Told(a_job("sms", "n1"))
        await Handler(claims, told, told, Holding(), POLICIES["sms"], told).handle(told)  # type: ignore[arg-type]
        assert told.steps == steps


async def test_parts_of_a_job_that_nobody_can_have_begun_are_not_doubted_where_a_store_is_young() -> None:
    """Each tenant is new to it for a minute, and all are after it has lost its data."""
    now = datetime.now(UTC)
    told, added = Told(a_job("push", "n1", first_at=now, stored_at=now)), list[Job]()

    class Young(Unseen):
        def unbegun(self, key: str) -> Look | None:
            return Look(None, b"", 0.0, 0.0, now.timestamp(), now.timestamp() - 14.0, assumed=True)

    async def add(jobs: Sequence[Job]) -> None:
        added.extend(jobs)

    told.add = add  # type: ignore[method-assign]
    await Handler(Young(), told, told, Splitting(), POLICIES["push"], told).handle(told)  # type: ignore[arg-type]
    assert [one.target for one in added] == ["phone", "tablet"]
    later = now.timestamp() + 1.0
    for part in added:
        young, anew = (Look(None, b"", 0.0, 0.0, later, born) for born in (now.timestamp() - 14.0, later - 0.5))
        assert judge(part, 1, young, "me", held_seconds=0.0) == Go()
        assert judge(part, 1, anew, "me", held_seconds=0.0) == AskDeliveries(), (
            "that store may have lost what was begun"
        )


class Forgetful(Unseen):
    """A store that has begun anew since the worker heard of it."""

    async def look(self, key: str) -> Look:
        return (await super().look(key))._replace(born=datetime.now(UTC).timestamp())


async def test_of_a_job_that_was_held_for_long_nobody_says_that_it_is_untried_because_its_claim_is_lost() -> None:
    """Another worker may be sending it: whoever finds it put back must ask `deliveries`, or doubt."""
    told, scheduled = Told(a_job("sms", "n1")), list[Job]()

    class Slow(Holding):
        async def decide(self, job: Job) -> Hold:
            told.held_seconds = 60.0
            return await super().decide(job)

    async def schedule(job: Job, due: datetime) -> None:
        scheduled.append(job)

    told.schedule = schedule  # type: ignore[method-assign]
    await Handler(Forgetful(), told, told, Slow(), POLICIES["sms"], told).handle(told)  # type: ignore[arg-type]
    assert [(one.again, one.untried_at) for one in scheduled] == [(True, None)]


class Refusing:
    """A desk by which nothing is sent: the channel was switched off a moment ago."""

    repeatable = True

    async def decide(self, job: Job) -> Over:
        return Over("suppressed", "user_off")


class Dying(Told):
    """A queue of a worker that dies before its parts are written."""

    async def add(self, jobs: Sequence[Job]) -> None:
        raise asyncio.CancelledError


async def test_the_parts_of_a_job_whose_worker_died_before_they_were_made_are_made_whatever_is_decided_by_then() -> (
    None
):
    """Each then ends with the reason of its own decision. They would else wait for ever, and be called lost."""
    claims, dying = Kept(), Dying(a_job("push", "n1"))
    with pytest.raises(asyncio.CancelledError):
        await Handler(claims, dying, dying, Splitting(), POLICIES["push"], dying).handle(dying)  # type: ignore[arg-type]
    assert "queued phone" in dying.steps
    told = Told(dying.job)
    await Handler(claims, told, told, Refusing(), POLICIES["push"], told).handle(told)  # type: ignore[arg-type]
    assert told.steps[-2:] == ["add phone tablet", "ack"]


@pytest.mark.parametrize(("lane", "said"), [("normal", "ack"), ("bulk", "ack, confirmed")])
async def test_only_where_claims_are_let_go_of_an_acknowledgement_is_waited_for(lane: Lane, said: str) -> None:
    told = Told(replace(a_job("push", "n1"), lane=lane))
    await Handler(Away(), told, told, Splitting(), POLICIES["push"], told).handle(told)  # type: ignore[arg-type]
    assert told.steps[-1] == said
