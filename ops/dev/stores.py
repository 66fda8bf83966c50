"""Real stores beside the broker: Valkey and PostgreSQL."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from ops.dev.binaries import PostgresInstallation, postgres_installation, valkey_binary
from ops.dev.child import OURS, POLL_SECONDS, READY_SECONDS_MAX, Rights, ServerFailed
from ops.dev.nobody import nobody_rights, reachable, remove_copy
from ops.dev.overlay import Overlay, overlaid_settings
from ops.dev.secretsfile import write_private
from ops.dev.server import HOST, PROBE_SECONDS, Server

VALKEY_SETTINGS: Final = {
    # Claims and counters are state, not cache: full must be an error, not a silent loss.
    "maxmemory-policy": "noeviction",
    # One way to keep data is enough: the append-only file loses a second at most, a snapshot minutes.
    "save": "",
    "appendonly": "yes",
    "appendfsync": "everysec",
}
"""The settings that Seamark needs of its Valkey or Redis."""

POSTGRES_SETTINGS: Final = {
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "200",
}
"""The settings that Seamark needs of its PostgreSQL: a committed checkpoint is there after a crash."""


class Valkey(Server):
    """One Valkey with `VALKEY_SETTINGS`.

    Args:
        data: folder for the append-only file and the log.
        port: free one when None.
        overlay: settings that differ.
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


_STILL_THERE: Final = "is still in use"
"""What PostgreSQL says of its folder while processes of a former incarnation live."""


class Postgres(Server):
    """One PostgreSQL with `POSTGRES_SETTINGS` and a password, reachable over loopback TCP only.

    PostgreSQL refuses to run as root. Started by root, it runs as the user `nobody` without any capability. Its programs lie
    where this user can reach them (`ops.dev.nobody`), and it gets its folder as an open descriptor, so that no other
    permissions need to change (ADR-0012).

    Args:
        data: folder; the cluster is made in `<data>/cluster` at the first start.
        port: free one when None.
        overlay: settings that differ.
    """

    stop_signal = signal.SIGINT  # "fast": roll back and close open connections, do not wait for them
    stop_seconds_max = 60.0  # its last checkpoint writes everything, and killed it would leave shared memory behind
    death_signal = signal.SIGQUIT  # "immediate": the parent is gone, recovery at the next start does the rest

    def __init__(self, data: Path, *, port: int | None = None, overlay: Overlay = ()) -> None:
        super().__init__("postgres", data, port)
        self.overlay = overlay
        self.cluster = self.data / "cluster"
        self._as_root = os.geteuid() == 0
        self._installation: PostgresInstallation | None = None

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

    @property
    def _rights(self) -> Rights:
        return nobody_rights() if self._as_root else OURS

    def prepare(self) -> None:
        """Find the programs and make the cluster if there is none; ServerFailed with initdb's output when that fails."""
        super().prepare()
        self._installation = postgres_installation()
        if self._as_root:
            if not Path("/proc/self/fd").is_dir():
                raise ServerFailed(
                    "PostgreSQL does not run as root, and root can start it only where there is /proc: use another user"
                )
            self._installation = reachable(self._installation, self._copy_link)
        if not self.cluster.exists():
            self._make_cluster(self._installation)

    @property
    def _copy_link(self) -> Path:
        """A link to the copy of the programs, where one is needed. An orderly end removes it."""
        return self.data / "programs"

    def _make_cluster(self, installation: PostgresInstallation) -> None:
        # Made beside its place: one that was interrupted half-way is thrown away, not taken for a whole one.
        fresh = self.data / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        (fresh / "cluster").mkdir(mode=0o700)
        write_private(self._password_path, secrets.token_urlsafe(24))
        write_private(fresh / "password", self._password_path.read_text())
        if self._as_root:
            for path in (fresh, fresh / "cluster", fresh / "password"):
                os.chown(path, self._rights["user"], self._rights["group"])
        with self._given(fresh) as (folder, descriptors):
            initdb = [installation.program("initdb"), "--username=postgres", f"--pwfile={folder}/password", "--no-sync"]
            options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=builtin"]
            self._initdb([*initdb, *options, f"--pgdata={folder}/cluster"], descriptors)
        (fresh / "cluster").rename(self.cluster)
        shutil.rmtree(fresh)

    @contextlib.contextmanager
    def _given(self, folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The path by which the server finds a folder, and the descriptors it needs for that.

        A process that holds a folder open can enter it by /proc/self/fd, even if it may not enter the folders above.
        """
        if not self._as_root:
            yield str(folder), ()
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{descriptor}", (descriptor,)
        finally:
            os.close(descriptor)

    def _initdb(self, argv: Sequence[str], descriptors: Sequence[int] = ()) -> None:
        try:
            done = subprocess.run(
                argv,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=READY_SECONDS_MAX,
                pass_fds=(*self.child.holds, *descriptors),
                check=False,
                **self._rights,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            raise ServerFailed(f"initdb did not end within {READY_SECONDS_MAX:g} s\n{said}") from error
        if done.returncode:
            raise ServerFailed(f"initdb failed\n{done.stdout.decode(errors='replace')}")

    def start(self, timeout_seconds: float = READY_SECONDS_MAX) -> None:
        """Prepare, spawn and wait until it answers. Its processes end a moment after the first one was killed: it waits."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                return super().start(deadline - time.monotonic())
            except ServerFailed:
                if self.alive or _STILL_THERE not in self.child.log_tail(500) or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_SECONDS)

    def spawn(self) -> None:
        """Fork the process and return. It dies with the calling thread."""
        with self._given(self.cluster) as (folder, descriptors):
            self.child.spawn(self._command(folder), inherits=descriptors, rights=self._rights)

    def command(self) -> list[str]:
        """`postgres` itself (no pg_ctl)."""
        return self._command(str(self.cluster))

    def _command(self, folder: str) -> list[str]:
        if self._installation is None:
            raise ServerFailed(f"postgres in {self.data} was not prepared")
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
        return [self._installation.program("postgres"), "-D", folder, *settings]

    def answers(self) -> bool:
        """Whether the postmaster of *this* incarnation calls itself ready."""
        try:
            lines = (self.cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def stop(self) -> None:
        """End it in good order, and remove the copy of its programs."""
        super().stop()
        remove_copy(self._copy_link)
