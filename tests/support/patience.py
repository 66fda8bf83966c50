"""Deadlines that are meant for stores that are away, and would end what a busy machine does slowly.

In production a store that does not answer within a second or two is left alone: a request is refused, and a session goes on
without its inbox or its count. What a test in its own process then sees would depend on the machine.
"""

from __future__ import annotations

from typing import Final

import pytest

from projections.inbox.queries import InboxQueries

PATIENT_SECONDS: Final = 30.0
SHORT_DEADLINES: Final = (
    "engine.dispatch.claims.TAKE_TIMEOUT_SECONDS",
    "engine.profiles.cache.REDIS_SECONDS",
    "gateway.access.api_keys.API_KEY_QUERY_SECONDS",
    "gateway.access.shared_buckets.REDIS_SECONDS",
    "gateway.http.idempotency.REDIS_SECONDS",
    "gateway.server.COUNT_SECONDS",
    "gateway.server.DIRECTORY_CONNECT_SECONDS",
    "gateway.stores.counts.COUNT_SECONDS",
    "gateway.stores.tables.CONNECT_SECONDS",
    "projections.inbox.queries.DEVICE_SECONDS",
    "projections.inbox.queries.QUERY_SECONDS",
    "projections.inbox.queries.SNAPSHOT_SECONDS",
    "projections.unread.store.REDIS_SECONDS",
    *(
        f"gateway.api.{room}.DIRECTORY_SECONDS"
        for room in (
            "configuring",
            "directory",
            "preferences",
            "push_tokens",
            "recipients",
            "suppressions",
            "topics",
            "users",
        )
    ),
)


def wait_for_stores(patch: pytest.MonkeyPatch) -> None:
    """Give PostgreSQL and Redis much time. One that refuses connections is away at once all the same."""
    for deadline in SHORT_DEADLINES:
        patch.setattr(deadline, PATIENT_SECONDS)
    patch.setitem(InboxQueries.page.__kwdefaults__, "seconds", PATIENT_SECONDS)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores may answer late: for tests in which none of them is away, on a machine that stands still for a second or two."""
    wait_for_stores(monkeypatch)
