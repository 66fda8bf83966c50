"""Rows of a log that was made anew: what the log that followed says of them does not depend on how it is cut into batches."""

import json
from typing import Any

import asyncpg
import pytest

from engine.partition.reader import Delivered
from projections.inbox.table import InboxStore
from projections.store import Checkpoint
from tests.support.tables import stored_inbox


def record(seq: int, body: dict[str, Any]) -> Delivered:
    return Delivered(b"log.0.default.alice", seq, (1_800_000_000 + seq) * 1_000_000_000, b"", json.dumps(body).encode())


MARKS = [
    {"id": "1", "kind": "read", "ids": ["a"]},
    {"id": "2", "kind": "read", "up_to": 2},
    {"id": "3", "kind": "read", "ids": ["a", "b"]},
    {"id": "4", "kind": "archive", "up_to": 1},
    {"id": "5", "kind": "archive", "ids": ["b"]},
    {"id": "6", "kind": "recall", "ids": ["b"]},
]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
async def test_the_first_mark_stays_whatever_the_batches(pool: asyncpg.Pool, size: int) -> None:
    former = [record(seq, {"id": id, "kind": "notification"}) for seq, id in enumerate("ab", 1)]
    assert await InboxStore(pool, 0).apply(former, None, Checkpoint("former", 2))
    # As a rebuild leaves it after the log was made anew.
    await pool.execute("UPDATE projection_checkpoints SET epoch = 'present', era = 2, seq = 0")
    log = [record(seq, body) for seq, body in enumerate(MARKS, 1)]
    at = Checkpoint("present", 0)
    for start in range(0, len(log), size):
        to = Checkpoint("present", log[start : start + size][-1].seq)
        assert await InboxStore(pool, 0).apply(log[start : start + size], at, to)
        at = to
    rows = {row["id"]: (row["read_seq"], row["archived_seq"], row["recalled_seq"]) for row in await stored_inbox(pool)}
    assert rows == {"a": (1, 4, None), "b": (2, 4, 6)}
