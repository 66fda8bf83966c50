"""Real nats-servers that run the shipped configuration: one alone, or several that form a cluster."""

import contextlib
import json
import re
import secrets
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.broker.health import write_error
from engine.topology.files import files_folder
from ops.dev.binaries import nats_server_binary
from ops.dev.child import READY_SECONDS_MAX, free_port
from ops.dev.overlay import Change, Overlay, overlaid_file, with_includes
from ops.dev.server import HOST, PROBE_SECONDS, Server

ACCOUNT = "SEAMARK"
"""The account of all roles in `accounts.conf`."""

ADMINISTRATOR = "admin"

_PASSWORD = re.compile(r"\$SEAMARK_NATS_(\w+)_PASSWORD")


class NatsServer(Server):
    """One nats-server with JetStream that runs files of `nats/`, with an overlay of the settings that must differ here.

    Args:
        data: folder for store, configuration and log.
        port: client port, free one when None.
        files: the shipped files it runs; later ones win over earlier ones.
        variables: what these files take from the environment, besides the store's folder.
        overlay: other settings that differ from the shipped ones; its addresses always do.
    """

    # It keeps everything through SIGKILL, and a suspended orphan would never see SIGTERM.
    death_signal = signal.SIGKILL

    def __init__(
        self,
        data: Path,
        *,
        port: int | None = None,
        files: Sequence[str] = ("server.conf",),
        variables: Mapping[str, str] | None = None,
        overlay: Overlay = (),
    ) -> None:
        super().__init__("nats-server", data, port)
        self.monitor_port = free_port(HOST)
        self._files = files
        self._variables = dict(variables or {})
        self._overlay = overlay

    @property
    def url(self) -> str:
        """`nats://127.0.0.1:<port>`."""
        return f"nats://{HOST}:{self.port}"

    @property
    def monitor_url(self) -> str:
        """Base of the monitoring endpoints (`/healthz`, `/jsz`, `/varz`)."""
        return f"http://{HOST}:{self.monitor_port}"

    @property
    def max_payload_bytes(self) -> int:
        """The size in bytes of the largest message it takes, by its own greeting."""
        return int(nats_greeting(HOST, self.port, READY_SECONDS_MAX)["max_payload"])

    def prepare(self) -> None:
        """Write `nats-server.conf`: the shipped files as they are now, and the overlay."""
        super().prepare()
        shipped = "".join(with_includes(files_folder() / name) for name in self._files)
        (self.data / "nats-server.conf").write_text(overlaid_file(shipped, (*self._addresses(), *self._overlay)))

    def _addresses(self) -> Overlay:
        return (
            Change("listen", f'"{HOST}:{self.port}"', "other servers run on this machine, too"),
            Change("http", f'"{HOST}:{self.monitor_port}"', "other servers run on this machine, too"),
        )

    def environment(self) -> dict[str, str]:
        """The variables that the files read. The store is quoted: the server reads the value as a piece of configuration."""
        return {"SEAMARK_NATS_STORE": f'"{self.data / "store"}"', **self._variables}

    def command(self) -> list[str]:
        """`nats-server -c <data>/nats-server.conf`."""
        return [str(nats_server_binary()), "-c", str(self.data / "nats-server.conf")]

    def answers(self) -> bool:
        """Whether a client is greeted by a server that has JetStream."""
        return bool(nats_greeting(HOST, self.port).get("jetstream"))

    def monitor(self, path: str) -> dict[str, Any]:
        """JSON of a monitoring endpoint, `{}` when it does not answer (with 200)."""
        status, answer = self._monitored(path)
        return answer if status == 200 else {}

    def write_error(self) -> str | None:
        """The write error that the server reports, such as a full disk; None when it can write, or does not answer."""
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


class ClusterMember(NatsServer):
    """One node of a cluster: it runs `cluster.conf`, and with it `accounts.conf`.

    Args:
        data: folder for store, configuration and log.
        name: of this node, unique in the cluster.
        route_port: where the other nodes connect.
        routes: the route ports of all nodes.
        passwords: the password of each user in `accounts.conf`, of `cluster` (the routes) and of the administrator.
        overlay: other settings that differ from the shipped ones.
    """

    def __init__(
        self,
        data: Path,
        name: str,
        route_port: int,
        routes: Sequence[int],
        passwords: Mapping[str, str],
        overlay: Overlay = (),
    ) -> None:
        peers = ", ".join(f'"nats://route:{passwords["cluster"]}@{HOST}:{port}"' for port in routes)
        variables = {f"SEAMARK_NATS_{user.upper()}_PASSWORD": password for user, password in passwords.items()}
        variables |= {"SEAMARK_NATS_NAME": name, "SEAMARK_NATS_TAGS": f'"az:{name}"'}
        variables |= {"SEAMARK_NATS_ROUTES": f"[{peers}]"}
        administrator = f"{{ user: {ADMINISTRATOR}, password: {passwords[ADMINISTRATOR]} }}"
        own = (
            Change("cluster.listen", f'"{HOST}:{route_port}"', "the other nodes run on this machine, too"),
            Change(f"accounts.{ACCOUNT}.users[]", administrator, "an administrator makes streams and deposes leaders"),
        )
        super().__init__(data, files=("cluster.conf",), variables=variables, overlay=(*own, *overlay))
        self.server_name = name
        self._passwords = passwords

    @property
    def url(self) -> str:
        """Its address with the administrator's name and password: whoever uses it may do everything."""
        return self.url_of(ADMINISTRATOR)

    def url_of(self, user: str) -> str:
        """Its address for a user of `accounts.conf`, with the password."""
        return f"nats://{user}:{self._passwords[user]}@{HOST}:{self.port}"

    def answers(self) -> bool:
        """Whether it greets clients, is healthy and knows a leader of the cluster."""
        if not super().answers() or self.monitor("/healthz").get("status") != "ok":
            return False
        return bool(self.monitor("/jsz").get("meta_cluster", {}).get("leader"))

    def streams(self) -> list[dict[str, Any]]:
        """Its streams, as its monitoring describes them; empty when it does not answer."""
        accounts = self.monitor(f"/jsz?acc={ACCOUNT}&streams=true").get("account_details") or []
        return [detail for account in accounts for detail in account.get("stream_detail") or []]


def _object(answer: Any) -> dict[str, Any]:
    return answer if isinstance(answer, dict) else {}


class NatsCluster:
    """Nodes on loopback that form one cluster with accounts. `servers` has each of them, to be restarted by itself.

    Args:
        data: folder; every member gets a folder of its own below it.
        size: members.
        overlay: as for `NatsServer`, for every member.
    """

    def __init__(self, data: Path, *, size: int = 3, overlay: Overlay = ()) -> None:
        routes = [free_port(HOST) for _ in range(size)]
        passwords = {user: f"p{secrets.token_hex(16)}" for user in (*account_users(), "cluster", ADMINISTRATOR)}
        self.servers = [
            ClusterMember(data / f"n{i}", f"n{i}", routes[i], routes, passwords, overlay) for i in range(size)
        ]

    @property
    def url(self) -> str:
        """All members' URLs, separated by commas; whoever uses them may do everything."""
        return self.url_of(ADMINISTRATOR)

    def url_of(self, user: str) -> str:
        """All members' URLs for a user of `accounts.conf`, separated by commas."""
        return ",".join(server.url_of(user) for server in self.servers)

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

    def leader_of(self, stream: str) -> ClusterMember | None:
        """The member that leads this stream now, None while there is none (or nobody answers)."""
        for server in self.servers:
            if not server.alive:
                continue
            for detail in server.streams():
                if detail.get("name") == stream and (leader := detail.get("cluster", {}).get("leader")):
                    return next(member for member in self.servers if member.server_name == leader)
        return None


def account_users() -> list[str]:
    """The users whose passwords `accounts.conf` takes from the environment."""
    text = (files_folder() / "accounts.conf").read_text(encoding="utf-8")
    return [name.lower() for name in dict.fromkeys(_PASSWORD.findall(text))]


def nats_greeting(host: str, port: int, timeout_seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """The INFO a nats-server greets with, `{}` when nobody does."""
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_seconds) as connection,
            connection.makefile("rb") as stream,
        ):
            line = stream.readline(1 << 16)
    except OSError:
        return {}
    if not line.startswith(b"INFO "):
        return {}
    greeting = json.loads(line[5:])
    return greeting if isinstance(greeting, dict) else {}
