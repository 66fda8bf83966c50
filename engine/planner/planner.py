"""The planner role: every log, each planned by one process while the others stand by."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

import structlog

from engine import metrics
from engine.broker.jetstream import Broker
from engine.cancels import Cancels
from engine.errors import StoreUnavailable
from engine.limits import PLAN_WITNESS_SECONDS
from engine.log.writer import read_mark
from engine.partition.reader import PartitionReader, Phase
from engine.planner import position
from engine.planner.deciding import Drops, Profiles, Rules
from engine.planner.shares import Shares
from engine.planner.witness import Witness, Witnesses
from engine.planner.worker import PlanWorker
from engine.postgres import Pool
from engine.tasks import end_if_cancelled
from seamark.protocol.errors import SeamarkError

_log = structlog.get_logger("seamark.planner")

LAG_SECONDS = 5.0
"""How often the lag of each log is measured: two questions to the broker."""


class Planner:
    """Plans all logs, as far as this process is the one chosen for them.

    Args:
        pool: where the witness of the marks is.
        cancels: which transactions are cancelled; None: none is.
        pin_timeout_seconds: as the consumers are configured.
    """

    def __init__(
        self,
        broker: Broker,
        pool: Pool,
        rules: Rules,
        profiles: Profiles,
        drops: Drops,
        partitions: int,
        *,
        cancels: Cancels | None = None,
        pin_timeout_seconds: float,
    ) -> None:
        self._broker = broker
        self._witnesses, shares = Witnesses(pool), Shares(broker)
        self._workers = [
            PlanWorker(broker, p, rules, profiles, drops, self._witnesses, cancels, shares) for p in range(partitions)
        ]
        self.readers = [
            PartitionReader(broker, position.source(p), worker, pin_timeout_seconds=pin_timeout_seconds)
            for p, worker in enumerate(self._workers)
        ]

    async def run(self) -> None:
        """Plan until cancelled; the first partition to fail in a way nobody foresaw ends all."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._note(), name="plan-witness")
            for p, (worker, reader) in enumerate(zip(self._workers, self.readers, strict=True)):
                tasks.create_task(reader.run(), name=f"plan-{p}")
                tasks.create_task(worker.tend(reader), name=f"plan-mark-{p}")
                tasks.create_task(self._watch_lag(p), name=f"plan-lag-{p}")

    async def _note(self) -> None:
        """Have the witness follow the marks. It lags, so it may be late, but never ahead."""
        noted: dict[int, Witness] = {}
        while True:
            await asyncio.sleep(PLAN_WITNESS_SECONDS)
            end_if_cancelled()
            reached = {
                p: witness
                for p, (worker, reader) in enumerate(zip(self._workers, self.readers, strict=True))
                if reader.phase is Phase.READING and (witness := worker.reached) is not None and noted.get(p) != witness
            }
            try:
                await self._witnesses.note(reached)
                noted |= reached
            except StoreUnavailable as error:
                _log.warning("witness_not_noted", why=str(error)[:200])
            except Exception:
                # Without this task the witness would fall behind for ever, so an unforeseen error must not end it.
                _log.exception("witness_not_noted")

    async def _watch_lag(self, p: int) -> None:
        """Measure how long the oldest record has waited, whoever plans this log: one that nobody plans must be noticed."""
        source, gauge, due_at = position.source(p), metrics.planner_lag.labels(position.source(p).stream), None
        while True:
            end_if_cancelled()
            await asyncio.sleep(LAG_SECONDS)
            try:
                mark, log = (
                    (await read_mark(self._broker, position.marked(p))).mark,
                    await self._broker.stream(source.stream),
                )
                start = mark.next_seq if mark is not None and mark.epoch == log.epoch else 1
                due = await self._broker.leader_next(source.stream, source.subject, start)
                due_at = datetime.fromisoformat(due.time).timestamp() if due is not None else None
            except (SeamarkError, OSError, TimeoutError) as error:
                _log.debug("lag_not_measured", error=type(error).__name__)
            except Exception:
                _log.exception("lag_measuring_failed")
            gauge.set(0.0 if due_at is None else max(0.0, time.time() - due_at))
