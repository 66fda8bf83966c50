"""The worker's journal: receipts of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from engine.broker.jetstream import Broker, Outgoing
from engine.channels.channel import Job
from engine.directory.changing import Directory
from engine.directory.push_tokens import retire_token
from engine.jobs.claims import Done
from engine.worker.targets import digest_of
from seamark.protocol.receipts import Receipt
from seamark.protocol.subjects import encode_token, encode_user, partition_of

_encode = msgspec.json.Encoder().encode


class Ends(Protocol):
    async def ended(self, job: Job, /) -> Done | None: ...


class WorkerJournal:
    """A `handling.Journal`."""

    def __init__(self, broker: Broker, partitions: int, directory: Directory, ends: Ends) -> None:
        self._broker, self._partitions, self._directory, self._ends = broker, partitions, directory, ends

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        """Store receipts of the job."""
        tenant, user = encode_token(job.tenant), encode_user(job.user)
        subject = f"rcpt.{partition_of(tenant, user, self._partitions)}.{tenant}.{user}"
        await self._broker.commit([Outgoing(subject, _encode(one)) for one in receipts])

    async def conclude(self, job: Job, done: Done) -> None:
        """Retire a token that is none."""
        if job.channel != "push" or done.outcome is None or done.outcome.kind != "target_invalid":
            return
        async with self._directory.changing(job.tenant, [job.user]) as change:
            query = "SELECT token_hash FROM push_tokens WHERE tenant = $1 AND user_id = $2 AND token_id = $3"
            hash = await change.connection.fetchval(query, job.tenant, job.user, job.target)
            if hash is not None and digest_of(hash) == done.outcome.target_digest:
                await retire_token(change, job.user, hash, done.outcome.code, done.outcome.target_invalid_at)

    async def ended(self, job: Job) -> Done | None:
        """How the job has ended."""
        return await self._ends.ended(job)
