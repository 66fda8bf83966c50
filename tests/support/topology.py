"""Servers that run with the configuration files of `nats/`, and their stream files sent as they are."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.jetstream import Broker, NatsSettings
from engine.topology_files import files_folder
from seamark.dev.child import free_port
from seamark.dev.servers import HOST, NatsServer, nats_server_binary

ROLES = ("publisher", "dispatcher", "gateway", "projector", "worker", "operator", "provisioner", "backup", "system")


def password(user: str) -> str:
    """A password for tests only."""
    return f"secret-of-{user}"


def passwords() -> dict[str, str]:
    """What `accounts.conf` and `cluster.conf` want from the environment."""
    return {f"SEAMARK_NATS_{user.upper()}_PASSWORD": password(user) for user in (*ROLES, "cluster")}


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
    """One server that includes `accounts.conf`; `passwords()` must be in the environment."""
    data.mkdir(parents=True)
    # The server takes an included path relative to the including file.
    accounts = os.path.relpath(files_folder() / "accounts.conf", data)
    return NatsServer(data, extra_config=f'include "{accounts}"\n')


class ClusterMember(NatsServer):
    """One node that runs `cluster.conf` itself; only addresses and the store come from the command line."""

    def __init__(self, data: Path, name: str, route_port: int, routes: Sequence[int]) -> None:
        super().__init__(data, name=name, cluster="cluster.conf")
        self.route_port = route_port
        self.routes = routes

    def prepare(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        routes = ", ".join(f'"nats://route:{password("cluster")}@{HOST}:{port}"' for port in self.routes)
        own = {
            "SEAMARK_NATS_NAME": self.server_name,
            "SEAMARK_NATS_ROUTES": f"[{routes}]",
            "SEAMARK_NATS_STORE": str(self.data / "store"),
        }
        return {**passwords(), **own}

    def command(self) -> list[str]:
        where = ["-a", HOST, "-p", str(self.port), "-m", str(self.monitor_port)]
        route = ["--cluster", f"nats://{HOST}:{self.route_port}"]
        return [str(nats_server_binary()), "-c", str(files_folder() / "cluster.conf"), *where, *route]


def cluster_of_three(data: Path) -> list[ClusterMember]:
    """Three nodes of one cluster, not started."""
    ports = [free_port(HOST) for _ in range(3)]
    return [ClusterMember(data / f"n{i}", f"n{i}", ports[i], ports) for i in range(3)]


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
        reply = await broker.request(subject, body, timeout_seconds=10)
        assert json.loads(reply.payload).get("error") is None, (path.name, reply.payload)
