"""Real stores beside the broker: Valkey and PostgreSQL."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from seamark.dev.binaries import postgres_bin, valkey_binary
from seamark.dev.child import READY_SECONDS_MAX, ServerFailed
from seamark.dev.overlay import Overlay, overlaid_settings
from seamark.dev.secretsfile import write_private
from seamark.dev.server import HOST, PROBE_SECONDS, Server

NOBODY = "nobody"
"""The user PostgreSQL runs as when we are root: it exists everywhere and owns nothing."""


VALKEY_SETTINGS: Final = {
    # Claims and counters are state, not cache: full must be an error, not a silent loss.
    "maxmemory-policy": "noeviction",
    # One way to keep data is enough: the append-only file loses a second at most, a snapshot minutes.
    "save": "",
    "appendonly": "yes",
    "appendfsync": "everysec",
}
"""What Seamark wants of its Valkey or Redis."""

POSTGRES_SETTINGS: Final = {
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "200",
}
"""What Seamark wants of its PostgreSQL: a checkpoint that was committed is there after a crash."""


class Valkey(Server):
    """One Valkey with `VALKEY_SETTINGS`.

    Args:
        data: folder for the append-only file and the log.
        port: free one when None.
        overlay: what it has otherwise.
    """

    def __init__(self, data: Path, *, port: int | None = None, overlay: Overlay = ()) -> None:
        super().__init__("valkey", data, port)
        self.overlay = overlay

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:<port>/0`."""
        return f"redis://{HOST}:{self.port}/0"

    def command(self) -> list[str]:
        """`valkey-server` with everything on the command line."""
        place = {"bind": HOST, "port": str(self.port), "dir": str(self.data)}
        options = {**place, **overlaid_settings(VALKEY_SETTINGS, self.overlay)}
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
    """One PostgreSQL with `POSTGRES_SETTINGS` and a password, reachable over loopback TCP only.

    PostgreSQL refuses to run as root. Started by root, it runs as `nobody` with the one capability to pass folders that
    belong to root, so that neither the installation nor the folders above the data need other permissions.

    Args:
        data: folder; the cluster is made in `<data>/cluster` at the first start.
        port: free one when None.
        overlay: what it has otherwise.
    """

    stop_signal = signal.SIGINT  # "fast": roll back and close open connections, do not wait for them
    stop_seconds_max = 60.0  # its last checkpoint writes everything, and killed it would leave shared memory behind
    death_signal = signal.SIGQUIT  # "immediate": the parent is gone, recovery at the next start does the rest

    def __init__(self, data: Path, *, port: int | None = None, overlay: Overlay = ()) -> None:
        super().__init__("postgres", data, port)
        self.overlay = overlay
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
        self._initdb([*self._as_user(), *initdb, *options, f"--pgdata={fresh}"])
        fresh.rename(self.cluster)

    def _initdb(self, argv: Sequence[str]) -> None:
        try:
            done = subprocess.run(
                argv,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=READY_SECONDS_MAX,
                pass_fds=self.child.holds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            raise ServerFailed(f"initdb did not end within {READY_SECONDS_MAX:g} s\n{said}") from error
        if done.returncode:
            raise ServerFailed(f"initdb failed\n{done.stdout.decode(errors='replace')}")

    def command(self) -> list[str]:
        """`postgres` itself (no pg_ctl), as another user when we are root."""
        place = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            # In files of the cluster, which its next start removes: segments of the system outlive a SIGKILL for ever.
            "shared_memory_type": "mmap",
            "dynamic_shared_memory_type": "mmap",
        }
        options = {**place, **overlaid_settings(POSTGRES_SETTINGS, self.overlay)}
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
