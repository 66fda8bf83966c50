"""Planners as a pager sees them: how far they have come, by their marks in JOBS."""

from __future__ import annotations

from typing import Final

from engine.broker.jetstream import Broker
from engine.campaigns.states import Dispatched, Position, dispatched
from engine.log.incarnations import stream_of
from engine.log.writer import read_mark
from engine.planner.position import marked
from engine.planner.shares import most
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.subjects import JOBS_STREAM, log_stream

JOBS_SHARE: Final = 0.25
"""Of what JOBS may hold: above it pagers begin no page. Events that are for single users still get their jobs, and no campaign
brings its tenant above its share."""


class JobsPlanners:
    """The planners of all logs."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def has_room(self) -> bool:
        """Whether few enough jobs wait for more to be begun."""
        jobs = await stream_of(self._broker, JOBS_STREAM)
        return jobs.bytes < JOBS_SHARE * most(jobs).bytes

    async def passed(self, heads: dict[str, str]) -> bool:
        """Whether every planner has passed these. What a log has lost in a restore is waited for by nobody."""
        for partition, head in heads.items():
            log = await stream_of(self._broker, log_stream(int(partition)))
            mark = (await read_mark(self._broker, marked(int(partition)))).mark
            if dispatched(Position(*parse_cursor(head)), mark, log) is Dispatched.NOT_YET:
                return False
        return True
