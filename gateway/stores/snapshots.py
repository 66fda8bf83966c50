"""The projections of one user at one moment, for a device that cannot have the history: the count, then the inbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Raw

from gateway.join.port import Snapshot
from gateway.limits import SNAPSHOT_BYTES
from gateway.stores.counts import Counts
from gateway.stores.tables import NotRead, Tables
from projections.inbox.queries import Page
from seamark.protocol.cursor import Cursor
from seamark.protocol.frames import Unread
from seamark.protocol.subjects import encode_token


def read_snapshot(
    counts: Counts, tables: Tables | None, tenant: str, user: str, answer: Callable[[Snapshot | None], None]
) -> None:
    """`answer` is called once, never inside this call; with None where too many are asking."""

    def counted(unread: Unread | None) -> None:
        if tables is None:
            together(unread, NotRead.AWAY)
        else:
            tables.snapshot(tenant, user, lambda page: together(unread, page))

    def together(unread: Unread | None, page: Page | NotRead) -> None:
        if page is NotRead.TOO_MANY:
            answer(None)
        elif isinstance(page, Page) and page.checkpoint is not None:
            answer(Snapshot(Cursor(*page.checkpoint), newest(page.rows, SNAPSHOT_BYTES), unread))
        else:
            answer(Snapshot(None, unread=unread))

    counts.ask(f"{encode_token(tenant)}.{encode_token(user)}", counted)


def newest(rows: Sequence[Raw], most_bytes: int) -> Sequence[Raw]:
    """As many of the first `rows` as fit into `most_bytes`, but at least one."""
    left = most_bytes
    for index, row in enumerate(rows):
        left -= memoryview(row).nbytes
        if left < 0:
            return rows[: max(1, index)]
    return rows
