"""Deadlines that are meant for stores that are away, and would end what a busy machine does slowly."""

from __future__ import annotations

import pytest

PATIENT_SECONDS = 30.0
SHORT_DEADLINES = (
    "engine.dispatch.claims.TAKE_TIMEOUT_SECONDS",
    "engine.profiles.cache.REDIS_SECONDS",
    "gateway.access.api_keys.API_KEY_QUERY_SECONDS",
    "gateway.access.shared_buckets.REDIS_SECONDS",
    "gateway.server.COUNT_SECONDS",
    "gateway.server.DIRECTORY_CONNECT_SECONDS",
    "gateway.stores.counts.COUNT_SECONDS",
    "gateway.stores.tables.CONNECT_SECONDS",
    "projections.inbox.queries.QUERY_SECONDS",
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


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores may answer late: for tests in which none of them is away, on a machine that stands still for a second or two."""
    for deadline in SHORT_DEADLINES:
        monkeypatch.setattr(deadline, PATIENT_SECONDS)
