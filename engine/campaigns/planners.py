"""Planners as a pager sees them: how far they have come, by their marks in JOBS."""

from __future__ import annotations

from typing import Final

from engine.broker.jetstream import Broker
from engine.campaigns.states import Dispatched, Position, dispatched
from engine.log.incarnations import stream_of
from engine.log.writer import read_mark
from engine.planner.position import marked
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.subjects import JOBS_STREAM, log_stream

JOBS_BYTES_MAX: Final = 1 << 30
"""Jobs that wait, above which pagers begin no page: some million. Events that are for single users still get theirs stored."""


class JobsPlanners:
    """The planners of all logs."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def has_room(self) -> bool:
        """Whether few enough jobs wait for more to be begun."""
        return (await stream_of(self._broker, JOBS_STREAM)).bytes < JOBS_BYTES_MAX

    async def passed(self, heads: dict[str, str]) -> bool:
        """Whether every planner has passed these. What a log has lost in a restore is waited for by nobody."""
        for partition, head in heads.items():
            log = await stream_of(self._broker, log_stream(int(partition)))
            mark = (await read_mark(self._broker, marked(int(partition)))).mark
            if dispatched(Position(*parse_cursor(head)), mark, log) is Dispatched.NOT_YET:
                return False
        return True
