"""The `seamark` command as an operator types it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.support.forks import ROOT, fork

ENV: Final = {key: value for key, value in os.environ.items() if not key.startswith("SEAMARK_")} | {
    "PYTHONPATH": str(ROOT)
}
"""An operator's environment, without settings."""


def seamark(
    *words: str, folder: Path = ROOT, text: str = "", timeout_seconds: float = 80.0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run it in `folder` to its end, with `text` to read and settings in `env`."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(text.encode())
        stdin.seek(0)
        files = {"stdin": stdin.fileno(), "stdout": stdout.fileno(), "stderr": stderr.fileno()}
        process = fork(["ops", *words], env=ENV | env, cwd=folder, **files)
        try:
            code = process.wait(timeout_seconds)
        finally:
            process.kill()
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode())
        return subprocess.CompletedProcess(words, code, *said)
