"""Long work waits for a server that is away, and tells of a fault at once."""

import pytest

from engine import patience
from engine.errors import ApiError, StoreBroken, StoreUnavailable, Unavailable
from engine.patience import patiently


class _Server:
    """Fails with one error after the other, and then answers. Counts how often it was asked."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.asked = 0

    async def ask(self) -> str:
        self.asked += 1
        if self._errors:
            raise self._errors.pop(0)
        return "answer"


async def test_a_server_that_is_away_is_asked_again_until_it_answers(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE_SECONDS_MIN", 0.0)
    server = _Server(Unavailable("no leader"), StoreUnavailable("PostgreSQL is starting up"))
    assert await patiently(server.ask) == "answer"
    assert server.asked == 3


async def test_a_fault_is_told_at_once_and_not_waited_for_like_an_outage():
    server = _Server(StoreBroken("PostgreSQL: a table is missing"))
    with pytest.raises(StoreBroken):
        await patiently(server.ask)
    assert server.asked == 1


async def test_an_outage_that_lasts_too_long_is_told():
    server = _Server(Unavailable("no leader"))
    with pytest.raises(Unavailable):
        await patiently(server.ask, seconds=0.0)


async def test_a_broker_in_trouble_of_its_own_is_waited_for_and_one_that_refuses_is_not(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE_SECONDS_MIN", 0.0)
    trouble = _Server(ApiError(503, 10008, "JetStream system temporarily unavailable"))
    assert await patiently(trouble.ask) == "answer"
    refusing = _Server(ApiError(404, 10059, "stream not found"))
    with pytest.raises(ApiError):
        await patiently(refusing.ask)
    assert (trouble.asked, refusing.asked) == (2, 1)
