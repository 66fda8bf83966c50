"""Which servers and which profile `seamark topology` takes when flags leave it open."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from ops.cli import topology
from seamark.protocol.errors import SeamarkError

STACK_REDIS = "redis://stack:1/0"


@pytest.fixture(autouse=True)
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a development stack, and nothing in the environment."""
    for name in ("NATS_URL", "REDIS_URL", "PROFILE", "PARTITIONS", "SETTINGS"):
        for suffix in ("", "_FILE"):
            monkeypatch.delenv(f"SEAMARK_{name}{suffix}", raising=False)
    names = ("postgres_url", "gateway_url", "tenant", "user", "token", "api_key", "jwt_secret")
    described = dict.fromkeys(names, "x") | {"nats_url": "nats://stack:1", "redis_url": STACK_REDIS}
    (tmp_path / "dev.json").write_text(json.dumps(described))
    return tmp_path


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({}, STACK_REDIS),
        ({"SEAMARK_REDIS_URL": "redis://named:1/0"}, "redis://named:1/0"),
        ({"SEAMARK_NATS_URL": "nats://named:1"}, "redis://127.0.0.1:6379/0"),
    ],
)
async def test_the_claims_are_those_of_the_broker_that_is_repaired(
    stack: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], url: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []
    from_url = Redis.from_url
    monkeypatch.setattr(Redis, "from_url", lambda url, **given: asked.append(url) or from_url(url, **given))
    async with topology._redis(stack):
        assert asked == [url]


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionError("refused"), OSError("no route")])
async def test_a_store_that_does_not_answer_is_an_error_of_ours(stack: Path, error: Exception) -> None:
    with pytest.raises(SeamarkError, match="SEAMARK_REDIS_URL"):
        async with topology._redis(stack):
            raise error


@pytest.mark.parametrize(
    ("env", "given", "profile"),
    [
        ({}, None, "dev"),
        ({"SEAMARK_NATS_URL": "nats://named:1"}, None, "production"),
        ({"SEAMARK_PROFILE": "production"}, None, "production"),
        ({"SEAMARK_PROFILE": "dev", "SEAMARK_NATS_URL": "nats://named:1"}, None, "dev"),
        ({"SEAMARK_NATS_URL": "nats://named:1"}, "dev", "dev"),
    ],
)
def test_the_profile_is_that_of_the_roles_on_the_same_servers(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], given: Any, profile: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert topology._profile(given) == profile
