"""Servers that run with the configuration files of `nats/`, and their stream files sent as they are."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.broker.answers import EPOCH_KEY, PARTITIONS_KEY, StreamState
from engine.broker.jetstream import Broker, NatsSettings
from engine.topology.files import is_log
from ops.dev.natsserver import account_users
from ops.dev.servers import NatsServer


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a test changes in the files.

    Args:
        replicas: copies of every stream and consumer.
        pin_timeout_seconds: `priority_timeout` of consumers that pin.
        stream_bytes: `max_bytes` by stream; `LOG` means every LOG-<p>.
    """

    replicas: int | None = None
    pin_timeout_seconds: float | None = None
    stream_bytes: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """What is changed in one configuration."""
        pin = None if self.pin_timeout_seconds is None else round(self.pin_timeout_seconds * 1e9)
        changes = {
            "num_replicas": self.replicas,
            "max_bytes": self.stream_bytes.get("LOG" if is_log(name) else name),
            "priority_timeout": pin if "priority_timeout" in config else None,
        }
        return {key: value for key, value in changes.items() if value is not None}


NOW = 1_795_478_400.0
"""A server's clock."""


def stream_with(config: Mapping[str, Any], **state: Any) -> StreamState:
    """A stream with this configuration, as its leader describes it at `NOW`; empty but for `state`."""
    metadata = config.get("metadata") or {}
    number = metadata.get(PARTITIONS_KEY)
    facts = {"first_seq": 0, "last_seq": 0, "messages": 0, "oldest_at": NOW, "asked_at": NOW} | state
    name, partitions = config.get("name", ""), None if number is None else int(number)
    return StreamState(name, metadata.get(EPOCH_KEY), partitions, config=dict(config), **facts)


ROLES = tuple(account_users())


def password(user: str) -> str:
    """A password for tests only."""
    return f"secret-of-{user}"


def passwords() -> dict[str, str]:
    """What `accounts.conf` wants from the environment."""
    return {f"SEAMARK_NATS_{user.upper()}_PASSWORD": password(user) for user in ROLES}


def settings_for(url: str, user: str) -> NatsSettings:
    """How a role connects: its own user, its own inboxes."""
    return NatsSettings(url, user=user, password=password(user), name=user, inbox_prefix=f"_INBOX_{user}")


@contextmanager
def running_with_accounts(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[NatsServer]:
    """A server with accounts, for which the environment holds the passwords."""
    for name, value in passwords().items():
        patch.setenv(name, value)
    server = server_with_accounts(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def server_with_accounts(data: Path) -> NatsServer:
    """One server that runs `server.conf` and `accounts.conf`."""
    return NatsServer(data, files=("server.conf", "accounts.conf"), variables=passwords())


async def send_as_they_are(broker: Broker, paths: Sequence[Path]) -> None:
    """Create streams and consumers from rendered files, byte for byte; the first refusal fails."""
    for path in sorted(paths, key=lambda path: path.parent.name != "streams"):
        config = json.loads(path.read_bytes())
        if path.parent.name == "streams":
            subject, body = f"$JS.API.STREAM.CREATE.{config['name']}", path.read_bytes()
        else:
            stream = path.name.split(".")[0]
            subject = f"$JS.API.CONSUMER.CREATE.{stream}.{config['name']}.{config['filter_subject']}"
            body = b'{"stream_name":"%b","config":%b}' % (stream.encode(), path.read_bytes())
        reply = await broker.request(subject, body, timeout_seconds=30)
        assert json.loads(reply.payload).get("error") is None, (path.name, reply.payload)
