"""Problems of the HTTP interface: what an error of the engine is told as."""

from engine.errors import StoreBroken, StoreUnavailable
from gateway.http.problems import problem_of


def test_a_database_that_refuses_is_not_told_as_one_that_is_away() -> None:
    away, broken = problem_of(StoreUnavailable("PostgreSQL: gone")), problem_of(StoreBroken("PostgreSQL: a value"))
    assert (away.kind.status, away.kind.code, away.retry_after_seconds) == (503, "unavailable", 2)
    assert (broken.kind.status, broken.kind.code, broken.retry_after_seconds) == (500, "store_broken", None)
    assert "recorded" in broken.detail
    assert "try again" not in broken.detail
