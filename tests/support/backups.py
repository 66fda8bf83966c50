"""A stream's backup as its store on disk: taken and put back while the server is down, epoch and consumers included."""

import shutil
from pathlib import Path

from seamark.dev.servers import NatsServer


def folder_of(server: NatsServer, stream: str) -> Path:
    """Where a server without accounts keeps a stream."""
    return server.data / "store" / "jetstream" / "$G" / "streams" / stream


def take(server: NatsServer, stream: str, backup: Path) -> None:
    """Copy a stream as it is now; the server is restarted."""
    server.stop()
    shutil.copytree(folder_of(server, stream), backup)
    server.start()


def put_back(server: NatsServer, stream: str, backup: Path) -> None:
    """Make a stream what it was; the server is restarted."""
    server.stop()
    shutil.rmtree(folder_of(server, stream))
    shutil.copytree(backup, folder_of(server, stream))
    server.start()
