"""A bucket held whole: what a leader that was deposed shows is not believed, and what was put back to a backup is."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine.broker import tail as module
from engine.broker.jetstream import Stored
from engine.broker.tail import BucketTail
from engine.errors import ApiError, Forbidden, Unanswered


class Bucket:
    """A bucket that shows whatever it is told to."""

    def __init__(self) -> None:
        self.keys = ["a", "b", "c"]
        self.epoch = "e1"
        self.error: Exception | None = None

    async def stream(self, name: str) -> Any:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(epoch=self.epoch, last_seq=len(self.keys))

    async def next_by_subject(self, stream: str, subject: str, seq: int, *, batch: int) -> Any:
        return SimpleNamespace(records=[self._at(n) for n in range(seq, len(self.keys) + 1)])

    def _at(self, seq: int) -> Stored:
        return Stored(f"$KV.things.{self.keys[seq - 1]}", seq, "", b"", b"")


class Follower:
    """Who follows it, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.bucket: Any = Bucket()
        self.held: list[str] = []
        self.now = 100.0
        self.tail = BucketTail(self.bucket, "things", lambda key, _: self.held.append(key), self.held.clear, **options)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def read(self, seconds_later: float = 1.0) -> float:
        """One look; how old what is known is then."""
        self.now += seconds_later
        await self.tail._read_safely()
        return self.tail.age_seconds


async def test_a_leader_that_shows_the_past_is_not_believed_and_nothing_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follower = Follower(monkeypatch)
    assert await follower.read() == 0
    follower.bucket.keys = ["a"]
    assert await follower.read() == 1
    assert follower.held == ["a", "b", "c"]
    follower.bucket.keys = ["a", "b", "c", "d"]
    assert await follower.read() == 0
    assert follower.held == ["a", "b", "c", "d"]
    follower.bucket.keys = ["a"]
    assert await follower.read(100.0) == 100, "an earlier look into the past says nothing of this one"
    assert follower.held == ["a", "b", "c", "d"]


async def test_a_bucket_that_was_put_back_to_a_backup_or_made_anew_is_read_from_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follower = Follower(monkeypatch)
    await follower.read()
    follower.bucket.keys = ["x"]
    await follower.read()
    assert await follower.read(module.BACK_SECONDS) == 0
    assert follower.held == ["x"]
    follower.bucket.epoch, follower.bucket.keys = "e2", ["y", "z"]
    assert await follower.read() == 0
    assert follower.held == ["y", "z"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ApiError(404, 10059, "stream not found"), "seamark topology apply"),
        (Forbidden("permissions violation"), "accounts.conf"),
        (Unanswered(), ""),
    ],
)
async def test_what_an_operator_has_to_do_is_said_and_taken_back(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = Follower(monkeypatch)
    follower.bucket.error = error
    assert await follower.read() == float("inf")
    assert remedy in follower.tail.remedy
    assert bool(follower.tail.remedy) == bool(remedy)
    follower.bucket.error = None
    assert await follower.read() == 0
    assert follower.tail.remedy == ""


async def test_a_bucket_that_is_missing_may_be_known_to_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Follower(monkeypatch, missing_is_empty=True)
    await follower.read()
    follower.bucket.error = ApiError(404, 10059, "stream not found")
    assert await follower.read() == 0
    assert follower.held == []
