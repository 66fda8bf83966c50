"""What servers of tests have otherwise than shipped. Everything that is not named here, they have as an operator has it."""

from __future__ import annotations

from typing import Final

from ops.dev.servers import Change

FORGETFUL: Final = (
    Change("appendonly", "no", "a Valkey that comes back must be empty: what is lost with it is what tests look at"),
)
"""For `Valkey`."""

UNSYNCED: Final = (
    Change("fsync", "off", "no test cuts the power, and each makes a database of its own"),
    Change("synchronous_commit", "off", "no test cuts the power, and each makes a database of its own"),
)
"""For `Postgres`."""

SYNCED_LATE: Final = (
    Change(
        "jetstream.sync_interval", '"2m"', "a server that acknowledges before it has written to disk, to be noticed"
    ),
)
"""For `NatsServer`."""

QUICK_DISK: Final = (
    Change(
        "jetstream.sync_interval",
        '"2m"',
        "thousands of single appends, each synced to a disk that others use, too, outlast the time-outs of these tests",
    ),
)
"""For `NatsServer`."""
