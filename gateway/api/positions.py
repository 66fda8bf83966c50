"""Positions that requests name, held against what the leader says of the log."""

from __future__ import annotations

from typing import Final

from gateway.http.problems import INVALID_BODY, UNAVAILABLE, Kind, Problem
from gateway.join.port import LogState
from gateway.log.partition import Partition
from seamark.protocol.cursor import parse_cursor
from seamark.protocol.errors import InvalidCursor

STALE_CURSOR: Final = Kind(409, "stale_cursor")


async def log_state(partition: Partition) -> LogState:
    """What the leader says now.

    Raises:
        Problem: 503, it does not answer.
    """
    state = await partition.watch.state()
    if state is None:
        raise Problem(UNAVAILABLE, "the log does not answer: try again")
    return state


def seq_of(cursor: str, field: str, state: LogState) -> int:
    """The sequence that the `cursor` in `field` names.

    Raises:
        Problem: 400, it is no cursor; 409, it does not belong to this incarnation of the log.
    """
    try:
        epoch, seq = parse_cursor(cursor)
    except InvalidCursor as error:
        raise Problem(INVALID_BODY, str(error), field=field) from error
    if epoch != state.epoch or seq > state.last_seq:
        raise Problem(STALE_CURSOR, f"`{field}` does not belong to this incarnation of the log", field=field)
    return seq
