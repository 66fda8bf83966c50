"""The sweep: once an hour, deliveries that nothing in JOBS stands for any more end as `failed`, because they are lost.

It never takes for lost what is only late. A plan is believed once its planner has moved its mark past it, because plans are
written down before their jobs. Then JOBS is asked. Then a row is believed once all is folded that was stored until now: a job
that was acknowledged has its end among that, as the receipt of an end comes before the acknowledgement.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import msgspec
import structlog

from engine.broker.jetstream import Broker
from engine.channels.channel import Job
from engine.errors import BrokerError, PartitionStopped, StoreUnavailable, TopologyError
from engine.jobs.messages import decode_job
from engine.letters.writing import store_job_letter
from engine.log.incarnations import epoch_of, stream_of
from engine.log.writer import read_mark
from engine.plan.gathering import TenantRules
from engine.planner import position
from engine.postgres import Pool, asking
from engine.traces.lines import about_followed
from projections import metrics
from projections.deliveries.lost import GRACE, LOST, Open, end_of, job_of, lost_among, record_of, waited_until
from projections.postgres.versions import live, read_place
from projections.projection import DELIVERIES
from seamark.protocol.receipts import Receipt
from seamark.protocol.subjects import (
    JOBS_STREAM,
    RECEIPTS_STREAM,
    encode_token,
    log_stream,
    partition_of,
    receipt_subject,
)

_log = structlog.get_logger("seamark.sweep")

EVERY_SECONDS: Final = 3600.0
AGAIN_SECONDS: Final = 300.0
"""After a sweep that could not be finished."""

LOOK_SECONDS: Final = 60.0
"""How often a worker looks whether a sweep is due: one of all begins it."""

PAGE: Final = 500
JOBS_OF_ONE_MAX: Final = 200
"""Of one user by one channel. Who has more waiting is left for the next hour: nothing of his is lost for certain."""

LOOKS: Final = 2
"""How often JOBS is looked through. Between a job and its schedule a look may miss it; twice in a row it does not."""

PAUSE_SECONDS: Final = 2.0
FOLDED_SECONDS: Final = 60.0
"""How long a sweep waits for the projection."""

_DUE: Final = """
INSERT INTO sweeps AS s (name, begun_at) VALUES ('jobs', now())
ON CONFLICT (name) DO UPDATE SET begun_at = now() WHERE s.begun_at <= now() - $1 * interval '1 second' RETURNING true
"""
_SOONER: Final = "UPDATE sweeps SET begun_at = begun_at - $1 * interval '1 second' WHERE name = 'jobs'"

_COLUMNS: Final = f"""
SELECT d.tenant, d.user_id, d.id, d.channel, d.device, d.state, d.rank, d.at, d.plan_at, d.plan_when, i.record
FROM deliveries d LEFT JOIN inbox i ON i.version = {live("inbox")}
    AND i.tenant = d.tenant AND i.user_id = d.user_id AND i.id = d.id
WHERE d.version = {live("deliveries")} AND d.state IN ('planned', 'queued') AND d.channel <> 'inapp'
"""
_OPEN: Final = f"""
{_COLUMNS} AND d.at < $1 AND (d.at, d.tenant, d.user_id, d.id, d.channel, d.device) > ($2, $3, $4, $5, $6, $7)
ORDER BY d.at, d.tenant, d.user_id, d.id, d.channel, d.device LIMIT {PAGE}
"""
_STILL: Final = f"{_COLUMNS} AND d.tenant = $1 AND d.user_id = $2 AND d.id = $3 AND d.channel = $4 AND d.device = $5"

_encode = msgspec.json.Encoder().encode


class Late(Exception):
    """Something that has to be known first is not known in time."""


class Rules(Protocol):
    """The rules of tenants."""

    async def of(self, tenant: str, /) -> TenantRules:
        """Those of one tenant. Raises StoreUnavailable."""


class Sweep:
    """Looks for what is lost. Any number of processes may run it: one of them does the work of an hour."""

    def __init__(self, pool: Pool, broker: Broker, partitions: int, rules: Rules) -> None:
        self._pool, self._broker, self._partitions = pool, broker, partitions
        self._rules = rules

    async def run(self) -> None:
        """Sweep for ever; ends by cancellation. What fails is said, and tried again."""
        while True:
            try:
                if await self._is_due():
                    await self._swept()
            except (BrokerError, TopologyError, StoreUnavailable) as error:
                _log.warning("jobs_not_swept", why=str(error)[:200])
            except Exception:
                # Without this task what is lost stays open for ever; what we did not foresee must not end it.
                _log.exception("jobs_not_swept")
            await asyncio.sleep(LOOK_SECONDS)

    async def _is_due(self) -> bool:
        async with asking(self._pool) as connection:
            return bool(await connection.fetchval(_DUE, EVERY_SECONDS))

    async def _swept(self) -> None:
        try:
            await self.sweep()
        except (Late, BrokerError, TopologyError, StoreUnavailable) as error:
            _log.warning("jobs_not_swept", why=str(error)[:200])
            async with asking(self._pool) as connection:
                await connection.execute(_SOONER, EVERY_SECONDS - AGAIN_SECONDS)

    async def sweep(self, now: datetime | None = None) -> int:
        """Look at all that is open and past its time; how many were lost.

        Args:
            now: the time by which that is judged.

        Raises:
            Late: the projection or a planner is behind. BrokerError, TopologyError, StoreUnavailable: ask again.
        """
        before, lost = (now or datetime.now(UTC)) - GRACE, 0
        after: tuple[Any, ...] = (datetime.min.replace(tzinfo=UTC), "", "", "", "", "")
        while True:
            async with asking(self._pool, FOLDED_SECONDS) as connection:
                rows = [Open(*row) for row in await connection.fetch(_OPEN, before, *after)]
            if not rows:
                return lost
            last = rows[-1]
            after = (last.at, last.tenant, last.user, last.id, last.channel, last.device)
            by_partition: dict[int, list[Open]] = {}
            for one in rows:
                if waited_until(one) < before:
                    partition = partition_of(encode_token(one.tenant), encode_token(one.user), self._partitions)
                    by_partition.setdefault(partition, []).append(one)
            for partition, group in sorted(by_partition.items()):
                # Before JOBS is asked: what a plan leads to is there once the mark is.
                await self._planned(partition, before)
                suspects = await self._without_job(group)
                if suspects:
                    lost += await self._end(suspects, partition)

    async def _without_job(self, rows: list[Open]) -> list[Open]:
        """Those that nothing in JOBS stands for."""
        for look in range(LOOKS):
            if look and rows:
                await asyncio.sleep(PAUSE_SECONDS)
            places = itertools.groupby(sorted(rows, key=_place), key=_place)
            found = [(place, list(group)) for place, group in places]
            rows = []
            for place, group in found:
                jobs = await self._jobs_of(*place)
                rows += [] if jobs is None else lost_among(group, jobs)
        return rows

    async def _jobs_of(self, tenant: str, user: str, channel: str) -> list[Job] | None:
        """What waits for a user by a channel; None: more than is looked at, or what cannot be read, which may be anything."""
        name = f"{encode_token(tenant)}.{encode_token(user)}"
        found: list[Job] = []
        waiting, scheduled = f"job.{channel}.*.{name}", f"jobsched.{channel}.{name}.*"
        for subject in (waiting, scheduled, waiting):  # it may go from the one to the other meanwhile
            seq = 0
            while (stored := await self._broker.leader_next(JOBS_STREAM, subject, seq)) is not None:
                if len(found) >= JOBS_OF_ONE_MAX:
                    return None
                try:
                    found.append(decode_job(stored.payload))
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    return None  # workers leave it there; all that is lost of others must not stay open because of it
                seq = stored.seq + 1
        return found

    async def _end(self, suspects: Sequence[Open], partition: int) -> int:
        """End those that are still open once everything is folded that was stored until now."""
        receipts = await stream_of(self._broker, RECEIPTS_STREAM)
        await self._folded(partition, epoch_of(receipts), receipts.last_seq)
        async with asking(self._pool) as connection:
            asked = [await connection.fetchrow(_STILL, *one[:5]) for one in suspects]
        still = {Open(*row) for row in asked if row is not None}
        lost = [one for one in suspects if one in still]
        for one in lost:
            await self._lose(one, partition)
        return len(lost)

    async def _folded(self, partition: int, epoch: str, last: int) -> None:
        """Wait until all receipts of a partition up to `last` are folded. Raises Late."""
        subject = DELIVERIES.subject(partition)
        for _ in range(round(FOLDED_SECONDS / PAUSE_SECONDS)):
            async with asking(self._pool) as connection:
                place = await read_place(connection, DELIVERIES.name, RECEIPTS_STREAM, partition)
            if place is not None and place.checkpoint.epoch != epoch:
                raise Late("deliveries are folded from another incarnation of RECEIPTS")
            after = 1 if place is None else place.checkpoint.seq + 1
            waiting = await self._broker.leader_next(RECEIPTS_STREAM, subject, after)
            if waiting is None or waiting.seq > last:
                return
            await asyncio.sleep(PAUSE_SECONDS)
        raise Late(f"deliveries of partition {partition} are not folded up to {last}: is a projector running?")

    async def _planned(self, partition: int, before: datetime) -> None:
        """Pass if the planner has done with all records from before. Raises Late."""
        log, jobs = (
            await stream_of(self._broker, log_stream(partition)),
            await stream_of(self._broker, JOBS_STREAM),
        )
        try:
            mark = position.meant(await read_mark(self._broker, position.marked(partition)), log, jobs)
        except PartitionStopped as error:
            raise Late(str(error)) from error
        waiting = await self._broker.leader_next(log.name, f"log.{partition}.>", mark.next_seq)
        if waiting is not None and datetime.fromisoformat(waiting.time) < before:
            raise Late(f"the planner of {log.name} is more than an hour behind")

    async def _lose(self, one: Open, partition: int) -> None:
        """End a delivery: its letter first, where there is something to replay, then its receipt. Done twice it is the same."""
        record = record_of(one)
        rule = None if record is None else (await self._rules.of(one.tenant)).rule_of(record.type or "")
        job = None if record is None else job_of(one, record, rule)
        done = end_of(one, job)
        if job is not None:
            await store_job_letter(self._broker, job, done)
        receipt = Receipt(
            user=one.user,
            channel=one.channel,
            state=done.end,
            at=datetime.now(UTC),
            device=one.device,
            id=one.id,
            reason=LOST,
            attempt=one.number,
        )
        await self._broker.append(receipt_subject(partition, one.tenant, one.user), _encode(receipt))
        metrics.jobs_lost.labels(one.channel).inc()
        with about_followed(None if job is None else job.trace):
            _log.error("job_lost", channel=one.channel, state=one.state, replayable=job is not None)


def _place(one: Open) -> tuple[str, str, str]:
    return one.tenant, one.user, one.channel
