"""What `seamark dev` prints: where everything is, and nothing that lets anybody in but the token it says it is."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from ops.cli import dev
from ops.cli.target import DevFile


def test_addresses_are_printed_without_user_and_password(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    monkeypatch.setattr(dev, "out", Console(file=printed, highlight=False, soft_wrap=True))
    stack = DevFile(
        nats_url="nats://user:hidden@n1:4222,nats://user:hidden@n2:4222",
        redis_url="redis://:hidden@r:6379/0",
        postgres_url="postgresql://user:hidden@p:5432/seamark",
        gateway_url="http://127.0.0.1:8080",
        tenant="default",
        user="alice",
        token="token",
        api_key="hidden",
        jwt_secret="hidden",
    )
    dev._print(stack, None, Path(".seamark"))
    assert "hidden" not in printed.getvalue()
    for address in ("nats://n1:4222,nats://n2:4222", "redis://r:6379/0", "p:5432/seamark"):
        assert address in printed.getvalue()
