"""Where tests keep their files: in memory, where there is room. Stores sync to a disk at every turn, and tests would wait."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

MEMORY: Final = "/dev/shm"
MEMORY_BYTES_MIN: Final = 4 << 30
"""How much room there must be in memory for the database of each of the processes, with as much again to spare."""

FILES_BYTES_MIN: Final = 10 << 30
"""How much there must be for all files of a run: it takes up to 3 GB of it, and as much again may be somebody else's."""


def in_memory(room_bytes_min: int = MEMORY_BYTES_MIN) -> str | None:
    """A folder in memory, where there is one with so much room, where programs may be run, too; else None."""
    try:
        room, way = shutil.disk_usage(MEMORY), os.statvfs(MEMORY)
        said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    fits = min(room.free, int(said["MemAvailable"].split()[0]) * 1024) > room_bytes_min
    return MEMORY if fits and not way.f_flag & os.ST_NOEXEC and os.access(MEMORY, os.W_OK) else None


def keep_files_in_memory() -> None:
    """Put this process's temporary files there, and those of all that it starts. A TMPDIR that is set says otherwise."""
    if "TMPDIR" not in os.environ and (folder := in_memory(FILES_BYTES_MIN)) is not None:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
