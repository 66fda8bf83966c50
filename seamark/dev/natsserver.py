"""Real nats-servers with JetStream on file storage: one alone, or several that form a cluster."""

import contextlib
import json
import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from engine.brokerhealth import write_error
from seamark.dev.binaries import nats_server_binary
from seamark.dev.child import READY_SECONDS_MAX, free_port
from seamark.dev.server import HOST, PROBE_SECONDS, Server

MAX_PAYLOAD_BYTES = 2 << 20
"""An event may be 1 MiB; an atomic batch and a bulk answer need head-room above it."""

NATS_CONFIG = """\
server_name: {name}
listen: "{host}:{port}"
http: "{host}:{monitor_port}"
max_payload: {max_payload}
write_deadline: "10s"
jetstream {{
  store_dir: "{store}"
  max_file_store: 64GB
{sync}}}
"""

NATS_OVER_CONFIG = """\
include "{base}"
listen: "{host}:{port}"
http: "{host}:{monitor_port}"
"""

NATS_CLUSTER_CONFIG = """\
cluster {{
  name: {cluster}
  listen: "{host}:{port}"
  routes: [{routes}]
}}
"""


class NatsServer(Server):
    """One nats-server with JetStream on file storage.

    Args:
        data: folder for store, configuration and log.
        port: client port, free one when None.
        name: server name, also the peer name in a cluster.
        config: a configuration file to run, such as `nats/server.conf`; only its addresses are replaced, its store is
            what SEAMARK_NATS_STORE names. None: a small one of our own, which `sync_interval` and `max_payload_bytes` shape.
        sync_interval: JetStream's fsync interval ("always", "2m", …); None leaves the server's default.
        extra_config: appended to the configuration file; a key given here wins over ours.
        cluster: cluster block of the configuration (made by `NatsCluster`).
    """

    # It keeps everything through SIGKILL, and a suspended orphan would never see SIGTERM.
    death_signal = signal.SIGKILL

    def __init__(
        self,
        data: Path,
        *,
        port: int | None = None,
        name: str = "seamark",
        config: Path | None = None,
        sync_interval: str | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        extra_config: str = "",
        cluster: str = "",
    ) -> None:
        super().__init__("nats-server", data, port)
        self.server_name = name
        self.config = config
        self.monitor_port = free_port(HOST)
        self.sync_interval = sync_interval
        self.max_payload_bytes = max_payload_bytes
        self.extra_config = extra_config
        self._cluster = cluster

    @property
    def url(self) -> str:
        """`nats://127.0.0.1:<port>`."""
        return f"nats://{HOST}:{self.port}"

    @property
    def monitor_url(self) -> str:
        """Base of the monitoring endpoints (`/healthz`, `/jsz`, `/varz`)."""
        return f"http://{HOST}:{self.monitor_port}"

    def prepare(self) -> None:
        """Write `nats-server.conf`."""
        super().prepare()
        path = self.data / "nats-server.conf"
        path.write_text(self._base() + self._cluster + self.extra_config)

    def _base(self) -> str:
        if self.config is not None:
            base = os.path.relpath(self.config, self.data)  # the server takes it as relative whatever it is
            return NATS_OVER_CONFIG.format(base=base, host=HOST, port=self.port, monitor_port=self.monitor_port)
        return NATS_CONFIG.format(
            name=self.server_name,
            host=HOST,
            port=self.port,
            monitor_port=self.monitor_port,
            max_payload=self.max_payload_bytes,
            store=self.data / "store",
            sync=f'  sync_interval: "{self.sync_interval}"\n' if self.sync_interval else "",
        )

    def environment(self) -> dict[str, str]:
        """Where the store of `config` is, quoted: the server reads the value as a piece of configuration."""
        return {"SEAMARK_NATS_STORE": f'"{self.data / "store"}"'}

    def command(self) -> list[str]:
        """`nats-server -c <data>/nats-server.conf`."""
        return [str(nats_server_binary()), "-c", str(self.data / "nats-server.conf")]

    def answers(self) -> bool:
        """Whether a client is greeted by a server that has JetStream; in a cluster also a healthy one with a leader."""
        info = nats_greeting(HOST, self.port)
        if not info.get("jetstream"):
            return False
        return not self._cluster or self._has_meta_leader()

    def monitor(self, path: str) -> dict[str, Any]:
        """JSON of a monitoring endpoint, `{}` when it does not answer (with 200)."""
        status, answer = self._monitored(path)
        return answer if status == 200 else {}

    def write_error(self) -> str | None:
        """What the server says it cannot write, since its disk was full for one; None when it can, or says nothing."""
        return write_error(self._monitored("/healthz")[1])

    def _monitored(self, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(self.monitor_url + path, timeout=PROBE_SECONDS) as reply:  # noqa: S310 - our own
                status, answer = reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with contextlib.suppress(OSError, ValueError), error:
                return error.code, _object(json.load(error))
            return error.code, {}
        except (urllib.error.URLError, OSError, ValueError):
            return 0, {}
        return status, _object(answer)

    def _has_meta_leader(self) -> bool:
        if self.monitor("/healthz").get("status") != "ok":
            return False
        return bool(self.monitor("/jsz").get("meta_cluster", {}).get("leader"))


def _object(answer: Any) -> dict[str, Any]:
    return answer if isinstance(answer, dict) else {}


class NatsCluster:
    """Nats-servers on loopback that form one cluster; members are restarted one by one through `servers`.

    Args:
        data: folder; every member gets a folder of its own below it.
        size: members.
        sync_interval, extra_config: as for `NatsServer`.
    """

    def __init__(self, data: Path, *, size: int = 3, sync_interval: str | None = None, extra_config: str = "") -> None:
        routes = [free_port(HOST) for _ in range(size)]
        self.servers = [
            NatsServer(
                data / f"n{i}",
                name=f"n{i}",
                sync_interval=sync_interval,
                extra_config=extra_config,
                cluster=NATS_CLUSTER_CONFIG.format(
                    cluster="seamark",
                    host=HOST,
                    port=routes[i],
                    routes=", ".join(f'"nats://{HOST}:{port}"' for port in routes),
                ),
            )
            for i in range(size)
        ]

    @property
    def url(self) -> str:
        """All members' URLs, separated by commas."""
        return ",".join(server.url for server in self.servers)

    @property
    def urls(self) -> list[str]:
        """All members' URLs."""
        return [server.url for server in self.servers]

    def start(self, timeout_seconds: float = READY_SECONDS_MAX) -> None:
        """Start all and wait until they have elected a leader and every member is healthy."""
        for server in self.servers:
            server.prepare()
            server.spawn()
        for server in self.servers:
            server.wait_ready(timeout_seconds)

    def stop(self) -> None:
        """End all members."""
        for server in self.servers:
            server.stop()

    def kill(self) -> None:
        """SIGKILL all members."""
        for server in self.servers:
            server.kill()

    def leader_of(self, stream: str) -> NatsServer | None:
        """The member that leads this stream now, None while there is none (or nobody answers)."""
        for server in self.servers:
            if not server.alive:
                continue
            for account in server.monitor("/jsz?acc=$G&streams=true").get("account_details") or []:
                for detail in account.get("stream_detail") or []:
                    if detail.get("name") == stream and (leader := detail.get("cluster", {}).get("leader")):
                        return next(member for member in self.servers if member.server_name == leader)
        return None


def nats_greeting(host: str, port: int) -> dict[str, Any]:
    """The INFO a nats-server greets with, `{}` when nobody does."""
    try:
        with (
            socket.create_connection((host, port), timeout=PROBE_SECONDS) as connection,
            connection.makefile("rb") as stream,
        ):
            line = stream.readline(1 << 16)
    except OSError:
        return {}
    if not line.startswith(b"INFO "):
        return {}
    greeting = json.loads(line[5:])
    return greeting if isinstance(greeting, dict) else {}
