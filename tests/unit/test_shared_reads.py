"""Profiles that are read together: what is wrong with one of them is nobody else's fault."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from engine.errors import StoreBroken, StoreUnavailable
from engine.plan.profile import Profile
from engine.profiles import reader
from engine.profiles.reader import UNREADABLE_MAX, SharedReads


class Table:
    """Profiles by user; an error stands for one that cannot be read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **errors: Exception) -> None:
        self.statements: list[int] = []
        self._errors = errors
        monkeypatch.setattr(reader, "read_profiles", self.read)

    async def read(self, pool: Any, users: Sequence[tuple[str, str]]) -> list[Profile]:
        self.statements.append(len(users))
        await asyncio.sleep(0)
        for _, user in users:
            if user in self._errors:
                raise self._errors[user]
        return [Profile(locale=user) for _, user in users]


async def read_by(table: Table, *users: str) -> list[Any]:
    reads = SharedReads(None)  # type: ignore[arg-type]
    first = asyncio.create_task(reads.read("acme", "first"))
    await asyncio.sleep(0)
    found = await asyncio.gather(*(reads.read("acme", user) for user in users), return_exceptions=True)
    await first
    return [one.locale if isinstance(one, Profile) else type(one) for one in found]


async def test_one_that_cannot_be_read_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, bad=StoreBroken("a value does not fit"))
    assert await read_by(table, "a", "bad", "b") == ["a", StoreBroken, "b"]
    assert table.statements == [1, 3, 1, 1, 1]


async def test_what_is_the_stores_fault_fails_all_and_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch, bad=StoreUnavailable("away"))
    assert await read_by(table, "a", "bad", "b") == [StoreUnavailable] * 3
    assert table.statements == [1, 3]
    broken = {f"u{number}": StoreBroken("no such table") for number in range(UNREADABLE_MAX + 5)}
    table = Table(monkeypatch, **broken)
    assert await read_by(table, *broken) == [StoreBroken] * len(broken)
    assert table.statements == [1, len(broken), *[1] * (UNREADABLE_MAX + 1)]
