"""How many files a gateway takes for its own, and how many sessions it promises from them."""

import resource

import pytest

from gateway import descriptors
from gateway.limits import SPARE_DESCRIPTORS

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "gives", "sessions"),
    [
        (1_024, 4_096, 4_096, 4_096 - SPARE_DESCRIPTORS),
        (256, UNLIMITED, 10_240, 10_240 - SPARE_DESCRIPTORS),
        (256, UNLIMITED, UNLIMITED, 50_000),
        (UNLIMITED, UNLIMITED, UNLIMITED, 50_000),
    ],
)
def test_a_limit_that_is_called_unlimited_leaves_more_than_one_session(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, gives: int, sessions: int
) -> None:
    now = [(soft, hard)]

    def setrlimit(_: int, wanted: tuple[int, int]) -> None:
        if gives != UNLIMITED and (wanted[0] == UNLIMITED or wanted[0] > gives):
            raise ValueError("not allowed to raise maximum limit")
        now[0] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: now[0])
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    descriptors.raise_limit()
    assert descriptors.sessions_within_limit(50_000) == sessions
