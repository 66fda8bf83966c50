"""Brings dead letters back to life, at a rate, and drops them.

A letter is removed once its job or event is stored anew, so whoever dies in between leaves it, and it is replayed again. That
does nothing twice: the second message of a job is the same life (`engine.jobs.replays`), whose claim says what became of the
first; and an event is recognised by its id. Before a job is replayed, `deliveries` is asked: it may have been sent after all, or
been replayed long ago.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from datetime import UTC, datetime
from typing import Final, Literal, Protocol, TypeVar

import msgspec
from msgspec.structs import replace

from engine.broker import wire
from engine.broker.jetstream import Broker
from engine.broker.refusals import is_final
from engine.channels.channel import Job
from engine.errors import ApiError, Forbidden, StoreUnavailable
from engine.jobs.claims import Claims, ClaimsUnavailable
from engine.jobs.messages import NO_JOB, decode_job, message_of
from engine.jobs.replays import replayed
from engine.letters.letter import SUPPRESSED, THROTTLED, Letter, id_in
from engine.letters.reading import Found
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import DEAD_LETTERS_STREAM, parse_stored_event

One = TypeVar("One")

PER_SECOND: Final = 50.0
"""How many are replayed a second by default: what has failed by the thousand comes back as a trickle, not as a flood."""

PER_SECOND_MAX: Final = 1000.0

_NOT_FOUND: Final = frozenset({10037, 10043, 10057})
"""What the server says of a sequence that holds no message (any more)."""

Fate = Literal["replayed", "dropped", "sent", "before", "in_doubt", "gone", "unreadable", "refused"]
"""What became of a letter.

- `replayed`, `dropped`: as it was asked.
- `sent`: its job was sent after the letter was written. `before`: its job has already been tried, replayed or ended otherwise
  since. The letter is removed.
- `in_doubt`: its job may have been sent, so it stays until somebody says that it is to be replayed all the same.
- `gone`: somebody else has removed it. `unreadable`: nobody can tell where it belongs, or read its job; it stays.
- `refused`: the broker never takes it, as it is too large; it stays, and the others are gone on with.
"""

NO_ADDRESS: Final = "no_address"
"""Why a job ends whose endpoint is disabled."""

REMOVED: Final[frozenset[Fate]] = frozenset({"replayed", "sent", "before", "dropped"})


class Known(msgspec.Struct, frozen=True):
    """What `deliveries` knows of a job. `tries`: the number of the try that `state` is about; 0: of what was planned."""

    state: str
    reason: str
    tries: int


class Knows(Protocol):
    """What is asked of `deliveries`."""

    async def known(self, job: Job, /) -> Known | None:
        """What it knows; None: nothing.

        Raises:
            StoreUnavailable: it does not answer, or does not know yet what was stored ten minutes ago.
        """


Release = Callable[[str, str, str], Awaitable[None]]
"""`release(tenant, id, position)`: take the claim of an event id off an event at this position, which was not dispatched."""


class Replays:
    """Replays letters.

    Args:
        knows: what `deliveries` knows of jobs.
        claims: of jobs.
        release: takes the claims of events off.
    """

    def __init__(self, broker: Broker, knows: Knows, claims: Claims, release: Release) -> None:
        self._broker, self._knows, self._claims, self._release = broker, knows, claims, release

    async def replay(self, found: Found, *, in_doubt: bool) -> Fate:
        """Replay one letter.

        Args:
            in_doubt: also where it may have been sent: people may get it twice then.

        Raises:
            BrokerError, StoreUnavailable: the letter is still there; it may have been replayed, and may be replayed again.
        """
        try:
            fate = await (self._job(found, in_doubt) if found.letter.kind == "job" else self._event(found))
        except ApiError as error:
            if not is_final(error) or isinstance(error, Forbidden):
                raise
            return "refused"
        if fate in REMOVED and not await remove(self._broker, found.letter.seq) and fate != "replayed":
            return "gone"
        return fate

    async def _job(self, found: Found, in_doubt: bool) -> Fate:
        letter = found.letter
        if letter.in_doubt and not in_doubt:
            return "in_doubt"
        try:
            job = decode_job(found.stored.payload)
        except NO_JOB:
            return "unreadable"  # it is for another version
        job = replayed(job, letter.tries, datetime.now(UTC))
        known = await self._knows.known(job)
        if known is not None and known.state in _ARRIVED:
            return "sent"
        if known is not None and known.tries > job.tries_before:
            return "before"
        if letter.cls == SUPPRESSED and (known is None or known.reason != THROTTLED):
            # A planner that was overtaken wrote this letter down, and the one that followed has sent the job.
            return "before"
        return await self._made(job)

    async def missed(self, job: Job) -> Fate:
        """Make a job to a webhook endpoint that there never was, or that found the endpoint disabled.

        It has the claim of the job that there would have been: made twice, or beside that one, it is sent once.

        Raises:
            BrokerError, StoreUnavailable: it may have been made, and may be made again.
        """
        known, now = await self._knows.known(job), datetime.now(UTC)
        if known is None:
            return await self._made(replace(job, stage="retry", attempt=0, again=True, first_at=now))
        if (known.state, known.reason) == (SUPPRESSED, NO_ADDRESS):
            return await self._made(replayed(job, known.tries, now))
        return "sent" if known.state in _ARRIVED else "before"

    async def _made(self, job: Job) -> Fate:
        """Store the message of a job that nobody has begun."""
        try:
            look = await self._claims.look(job.claim_key)
        except ClaimsUnavailable as error:
            raise StoreUnavailable("Redis does not answer, which knows what is being sent") from error
        if look.claim is not None:
            return "before"
        message = message_of(replace(job, untried_at=datetime.fromtimestamp(look.now, UTC)))
        await self._broker.append(message.subject, message.payload, msg_id=f"replay/{job.claim_key}")
        return "replayed"

    async def _event(self, found: Found) -> Fate:
        place = _place(found.letter)
        if place is None:
            return "unreadable"
        subject, tenant = place
        if id := id_in(found.stored.payload):
            # One that died after it was claimed (LATER was full) would pass for a second publication of itself.
            await self._release(tenant, id, found.letter.original)
        headers = {}
        for name in (b"traceparent", b"tracestate"):
            if value := wire.header(found.stored.headers, name):
                headers[name.decode()] = value.decode("ascii", "replace")
        # Nobody may foresee it: who could, could have the broker take it for a repetition of something else.
        await self._broker.append(subject, found.stored.payload, headers, msg_id=secrets.token_urlsafe(16))
        return "replayed"


_ARRIVED: Final = frozenset({"sent", "delivered", "acknowledged", "seen", "read"})


def _place(letter: Letter) -> tuple[str, str] | None:
    """Where an event is published again, and its tenant; None: its subject is none."""
    try:
        at = parse_stored_event(letter.subject)
    except InvalidToken:
        return None
    # As it stands: earlier versions let keys pass that have no token any more.
    stream = "bulk" if letter.subject.startswith("bk.") else "events"
    return f"{stream}.{letter.subject.split('.', 2)[2]}", at.tenant


async def remove(broker: Broker, seq: int) -> bool:
    """Remove a letter; whether it was there.

    Raises:
        BrokerError: it may be there or not.
    """
    try:
        await broker.api(f"STREAM.MSG.DELETE.{DEAD_LETTERS_STREAM}", {"seq": seq})
    except ApiError as error:
        if error.err_code in _NOT_FOUND:
            return False
        raise
    return True


async def dropped(broker: Broker, seq: int) -> Fate:
    """Remove a letter for good.

    Raises:
        BrokerError: it may be there or not.
    """
    return "dropped" if await remove(broker, seq) else "gone"


async def paced(found: AsyncIterable[One], per_second: float) -> AsyncGenerator[One]:
    """What is found, no faster than so many a second."""
    began, count = time.monotonic(), 0
    async for one in found:
        pause = began + count / per_second - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        count += 1
        yield one
