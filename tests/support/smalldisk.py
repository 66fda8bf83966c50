"""A disk that is easily filled: a file system of its own, in memory."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size; skips the test where that is not allowed."""
    folder.mkdir()
    mount = shutil.which("mount")
    argv = [mount or "mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=755", "seamark-test", str(folder)]
    if mount is None or os.geteuid() != 0 or (done := subprocess.run(argv, capture_output=True, text=True)).returncode:
        why = done.stderr.strip() if mount is not None and os.geteuid() == 0 else "only root may mount"
        pytest.skip(f"a small disk cannot be mounted here: {why}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left_bytes: int) -> Path:
    """Take all room but `left_bytes`; removing the file makes room again."""
    hog = disk / "hog"
    with hog.open("wb") as file:
        for _ in range((shutil.disk_usage(disk).free - left_bytes) >> 16):
            file.write(bytes(1 << 16))
    return hog
