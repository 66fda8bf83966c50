"""The worker's journal: receipts of jobs, and what else their ends lead to. Everything here may be done twice.

A job's claim holds the whole outcome, and whoever finds it does again what may have been left undone (ADR 0043). So nothing here
asks whether it was done before: a receipt that is stored twice says the same, a letter has a subject of its own, and a token is
retired only if it is still the one that was tried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

import msgspec
import structlog

from engine.broker.jetstream import Broker, Outgoing
from engine.broker.refusals import is_full
from engine.channels.bounces import may_suppress
from engine.channels.channel import Job, Outcome
from engine.channels.suppressing import suppress_for
from engine.directory.changing import Directory
from engine.directory.contacts import Addressed, address_hash
from engine.directory.push_tokens import move_token, retire_token
from engine.errors import BrokerError
from engine.jobs.claims import Done
from engine.jobs.desk import NotNow
from engine.letters.letter import deserves_letter
from engine.letters.writing import store_job_letter
from engine.limits import BATCH_MESSAGES_MAX, JOBS_TURNS
from engine.log.stalls import Stall
from engine.patience import passes
from engine.plan.rules import CHANNELS, Channel
from engine.postgres import asking
from engine.questions import Questions
from engine.traces.contexts import trace_line
from engine.traces.messages import receipts_stored
from engine.traces.spans import active
from engine.worker.attempts import origin_nanoseconds
from engine.worker.targets import fingerprint_of
from seamark.protocol.receipts import Receipt
from seamark.protocol.subjects import DEAD_LETTERS_STREAM, RECEIPTS_STREAM, encode_token, encode_user, partition_of

_log = structlog.get_logger("seamark.worker")

NO_ROOM_SECONDS: Final = 600.0
"""How long a job waits in JOBS for room for its letter: making room takes a person."""

_encode = msgspec.json.Encoder().encode

_ADDRESS: Final = "SELECT email, phone FROM users WHERE tenant = $1 AND user_id = $2"

_TOKEN: Final = "SELECT token_hash FROM push_tokens WHERE tenant = $1 AND user_id = $2 AND token_id = $3"


class Ends(Protocol):
    """What `deliveries` knows of jobs."""

    async def ended(self, job: Job, /) -> Done | None:
        """As `engine.jobs.desk.Journal` says."""


class WorkerJournal:
    """An `engine.jobs.desk.Journal`.

    Args:
        partitions: of the logs.
        directory: where tokens and suppressions are.
        ends: what `deliveries` knows.
    """

    def __init__(self, broker: Broker, partitions: int, directory: Directory, ends: Ends) -> None:
        self._broker, self._partitions = broker, partitions
        self._directory, self._ends = directory, ends
        self._spans = active()
        self._stalls: dict[str, Stall] = {}
        # A question is the receipts of one job, its answer why they were not stored. For each channel, so that one whose batch is
        # not answered makes no other wait.
        self._receipts: dict[Channel, Questions[Sequence[Outgoing], BrokerError | None]] = {
            channel: Questions("receipts", self._store_all, turns=JOBS_TURNS) for channel in CHANNELS
        }

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        """Store receipts of the job.

        Raises:
            BrokerError: they may be stored or not. ConnectionError: the journal was closed meanwhile.
        """
        tenant, user = encode_token(job.tenant), encode_user(job.user)
        subject = f"rcpt.{partition_of(tenant, user, self._partitions)}.{tenant}.{user}"
        since = time.time_ns()
        messages = [Outgoing(subject, _encode(one), trace_line(one.trace) if one.trace else b"") for one in receipts]
        if (failure := await self._receipts[job.channel].answer(messages)) is not None:
            self._stall(RECEIPTS_STREAM, "receipts_wait").report(failure)
            raise failure
        if self._spans is not None:
            receipts_stored(self._spans, messages, since, stored_at=origin_nanoseconds(job))
        self._over(RECEIPTS_STREAM)

    async def _store_all(self, asked: list[Sequence[Outgoing]]) -> list[BrokerError | None]:
        """Store the receipts of jobs; for each job what came of it. Those of one job are in one batch."""
        failures: list[BrokerError | None] = []
        while len(failures) < len(asked):
            jobs, room = list[Sequence[Outgoing]](), BATCH_MESSAGES_MAX
            for messages in asked[len(failures) :]:
                room -= len(messages)
                if jobs and room < 0:
                    break
                jobs.append(messages)
            came = await self._store_together(jobs)
            failures += came
            if came[-1] is not None and passes(came[-1]):  # whoever is behind need not wait for a server that is away
                failures += [came[-1]] * (len(asked) - len(failures))
        return failures

    async def _store_together(self, jobs: Sequence[Sequence[Outgoing]]) -> Sequence[BrokerError | None]:
        try:
            await self._store_batch([message for messages in jobs for message in messages])
        except BrokerError as error:
            if len(jobs) == 1 or passes(error):
                return [error] * len(jobs)
            # One that is refused must not keep the others back.
            alone = await asyncio.gather(*(self._store_together([messages]) for messages in jobs))
            return [failure for [failure] in alone]
        return [None] * len(jobs)

    async def _store_batch(self, messages: Sequence[Outgoing]) -> None:
        if len(messages) > 1:
            await self._broker.commit(messages)
        else:
            [message] = messages
            await self._broker.append(message.subject, message.payload, message.named_headers)

    async def close(self) -> None:
        """Store nothing more."""
        for questions in self._receipts.values():
            await questions.close()

    async def conclude(self, job: Job, done: Done) -> None:
        """Do what follows from an end: the token, the address, the letter.

        Raises:
            NotNow: there is no room for the letter; the job waits in JOBS, and other jobs go on.
            BrokerError, StoreUnavailable: not all of it is done.
        """
        if done.outcome is not None:
            await self._mind_target(job, done.outcome)
        if deserves_letter(done):
            await self._store_letter(job, done)

    async def set_aside(self, job: Job, done: Done, payload: bytes) -> None:
        """Store the letter of a message that cannot be read.

        Raises:
            NotNow: there is no room for it; the message waits in JOBS, and jobs go on.
            BrokerError: it is not stored, or nobody knows.
        """
        await self._store_letter(job, done, payload)

    async def _store_letter(self, job: Job, done: Done, unreadable: bytes | None = None) -> None:
        try:
            await store_job_letter(self._broker, job, done, unreadable)
        except BrokerError as error:
            self._stall(DEAD_LETTERS_STREAM, "letters_wait").report(error)
            if is_full(error):
                raise NotNow(NO_ROOM_SECONDS) from error
            raise
        self._over(DEAD_LETTERS_STREAM)

    async def ended(self, job: Job) -> Done | None:
        """How the job has ended, as `deliveries` knows it."""
        return await self._ends.ended(job)

    async def _mind_target(self, job: Job, outcome: Outcome) -> None:
        """What an outcome says of the target: a token that is none, one of another environment, an address nobody has."""
        if job.channel in ("email", "sms") and may_suppress(outcome):
            await self._mind_address(job, outcome, "email" if job.channel == "email" else "sms")
        moved = outcome.kind == "ok" and outcome.environment
        if job.channel == "push" and (outcome.kind == "target_invalid" or moved):
            await self._mind_token(job, outcome)

    async def _mind_address(self, job: Job, outcome: Outcome, channel: Addressed) -> None:
        """Suppress the address that was tried, if its user still has it: who has another one by now is reached there."""
        async with asking(self._directory.pool) as connection:
            row = await connection.fetchrow(_ADDRESS, job.tenant, job.user)
        address = None if row is None else row["email" if channel == "email" else "phone"]
        if address is None or fingerprint_of(address_hash(channel, address)) != outcome.target_digest:
            return
        try:
            suppressed = await suppress_for(
                self._directory,
                job.tenant,
                channel,
                address,
                outcome,
                category=job.category,
                message=job.key,
                at=datetime.now(UTC),
                report=job.claim_key,
            )
        except ValueError:
            return  # it is none, and nothing is sent to it anyway
        if suppressed:
            _log.info("address_suppressed", channel=channel, provider=outcome.provider, code=outcome.code)

    async def _mind_token(self, job: Job, outcome: Outcome) -> None:
        """Retire the token that was tried, or store its right environment. One that took its place meanwhile is left alone."""
        async with self._directory.changing(job.tenant, [job.user]) as change:
            hash: bytes | None = await change.connection.fetchval(_TOKEN, job.tenant, job.user, job.target)
            if hash is None or fingerprint_of(hash) != outcome.target_digest:
                return
            if outcome.environment:
                await move_token(change, job.user, hash, outcome.environment)
            if outcome.kind == "target_invalid":
                reason = outcome.code or outcome.kind
                if await retire_token(change, job.user, hash, reason, outcome.target_invalid_at):
                    _log.info("push_token_retired", provider=outcome.provider, code=outcome.code)

    def _stall(self, stream: str, event: str) -> Stall:
        if stream not in self._stalls:
            self._stalls[stream] = Stall(stream, event)
        return self._stalls[stream]

    def _over(self, stream: str) -> None:
        stall = self._stalls.pop(stream, None)
        if stall is not None:
            stall.over()
