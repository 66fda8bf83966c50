"""A gateway in the test's own process that waits for its stores.

In production a store that does not answer within a second or two is left alone, and a session goes on without its inbox or its
count. A busy machine may hold a store up for as long: what a test says of the inbox then depends on the machine.
"""

from typing import Final

import pytest

from projections.inbox.queries import InboxQueries

SECONDS: Final = 25.0

DEADLINES: Final = (
    "gateway.access.api_keys.API_KEY_QUERY_SECONDS",
    "gateway.http.idempotency.REDIS_SECONDS",
    "gateway.server.COUNT_SECONDS",
    "gateway.stores.counts.COUNT_SECONDS",
    "gateway.stores.tables.CONNECT_SECONDS",
    "projections.inbox.queries.DEVICE_SECONDS",
    "projections.inbox.queries.QUERY_SECONDS",
    "projections.inbox.queries.SNAPSHOT_SECONDS",
)


def wait_for_stores(patch: pytest.MonkeyPatch) -> None:
    """Give PostgreSQL and Redis much time. One that refuses connections is away at once all the same."""
    for deadline in DEADLINES:
        patch.setattr(deadline, SECONDS)
    patch.setitem(InboxQueries.page.__kwdefaults__, "seconds", SECONDS)
