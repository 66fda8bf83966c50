"""The `seamark` command as an operator types it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

from tests.support.forks import ROOT, Fork, fork

ENV: Final = {key: value for key, value in os.environ.items() if not key.startswith("SEAMARK_")} | {
    "PYTHONPATH": str(ROOT)
}
"""An operator's environment, without settings."""


def seamark(
    *words: str, folder: Path = ROOT, text: str = "", timeout_seconds: float = 80.0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run it in `folder` to its end, with `text` to read and settings in `env`."""
    return ended(["ops", *words], env=ENV | env, folder=folder, text=text, timeout_seconds=timeout_seconds)


def ended(
    words: list[str], *, env: Mapping[str, str] = ENV, folder: Path = ROOT, text: str = "", timeout_seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run `python -m <words>` to its end; it is killed where that takes longer than `timeout_seconds`."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(text.encode())
        stdin.seek(0)
        files = {"stdin": stdin.fileno(), "stdout": stdout.fileno(), "stderr": stderr.fileno()}
        process = fork(words, env=env, cwd=folder, **files)
        try:
            code = process.wait(timeout_seconds)
        finally:
            process.kill()
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode())
        return subprocess.CompletedProcess(words, code, *said)


def started(*words: str, folder: Path, output: IO[bytes], env: Mapping[str, str] = ENV) -> Fork:
    """Run it in `folder` with nothing to read and go on meanwhile; it ends in order when the tests do."""
    with Path(os.devnull).open("rb") as nothing:
        files = {"stdin": nothing.fileno(), "stdout": output.fileno(), "stderr": output.fileno()}
        return fork(["ops", *words], env=env, cwd=folder, death_signal=signal.SIGTERM, **files)
