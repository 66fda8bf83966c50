"""What the handling of jobs asks of others: what is to be done with a job, and who stores what follows.

`handling` says in which order, and what may happen in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from engine.channels.channel import Job, Members, Outcome
from engine.jobs.claims import Done, End
from seamark.protocol.errors import SeamarkError
from seamark.protocol.receipts import Receipt


class Send(NamedTuple):
    """It is to be sent: `rendered`, to `target`, whatever they are to the channel. `members`: what a digest was made of."""

    rendered: object
    target: object
    members: Members | None = None


class Hold(NamedTuple):
    """Not before `due`: a control, quiet hours, a cap. `stage`: what decides then; "": the same as now."""

    due: datetime
    why: str
    stage: str = ""


class Over(NamedTuple):
    """It is never sent. `outcome`: of rendering, where that has failed. `members`: as `Send` has them."""

    end: End
    why: str
    outcome: Outcome | None = None
    members: Members | None = None


class Split(NamedTuple):
    """It goes to several targets, by their ids, each a job of its own. `members`: as `Send` has them."""

    targets: tuple[str, ...]
    members: Members | None = None


class Delivery(Protocol):
    """A job as it was handed out."""

    @property
    def job(self) -> Job: ...

    @property
    def deliveries(self) -> int:
        """How often, this time included."""

    @property
    def held_seconds(self) -> float:
        """How long ago it was handed out, at most: a worker that stood still finds it late."""

    async def ack(self, confirmed: bool, /) -> None:
        """Acknowledge. `confirmed`: return when the broker has said that it knows; without it the acknowledgement may be lost."""


class Queue(Protocol):
    """What is written into JOBS. Written twice it is there once or twice, and either is harmless."""

    async def schedule(self, job: Job, due: datetime) -> None:
        """Have the job handed out at `due`."""

    async def add(self, jobs: Sequence[Job]) -> None:
        """Have the jobs handed out: all of them or none."""


class NotNow(SeamarkError):
    """What is to follow cannot be done for `seconds`, and no other job may have to wait for it: the job is put back."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


class Journal(Protocol):
    """Where facts are stored, and what else an end leads to. Each may be done twice."""

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        """Store receipts of the job."""

    async def conclude(self, job: Job, done: Done) -> None:
        """The dead letter of an end without success, the token that is retired, the address that is suppressed.

        Raises:
            NotNow: not all of it can be done now; it is to be asked for again.
        """

    async def set_aside(self, job: Job, done: Done, payload: bytes) -> None:
        """The dead letter of a message that cannot be read.

        Args:
            job: what can be said of it.
            payload: the message, as it stands.

        Raises:
            NotNow: it cannot be stored now; it is to be asked for again.
        """

    async def ended(self, job: Job) -> Done | None:
        """How the job has ended as far as `deliveries` knows; an end as `ambiguous` is none.

        Raises:
            StoreUnavailable: it does not answer, or does not know yet what was stored ten minutes ago.
        """


class Desk(Protocol):
    """What knows of users, controls and providers."""

    repeatable: bool
    """Whether the provider recognises what it is sent twice."""

    def slower(self, outcome: Outcome) -> float:
        """How much longer than usual a retry after this outcome waits: the budget of its provider is spent."""

    async def decide(self, job: Job) -> Send | Hold | Over | Split:
        """What is to be done with a job by what holds now: controls, expiry, cancels, preferences, suppressions."""

    async def turn(self, job: Job, send: Send) -> float:
        """Take a token; else in how many seconds to ask again, because the breaker is open or the bucket empty."""

    def unused(self, send: Send) -> None:
        """The turn that was taken for this comes to no try."""

    async def send(self, job: Job, send: Send, *, deadline_seconds: float) -> Outcome:
        """Try it."""


class Clock(Protocol):
    """The worker's clock: it may be wrong."""

    def now(self) -> datetime: ...
