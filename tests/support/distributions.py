"""The two distributions as a user gets them: wheels, and virtual environments that hold nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[2]


def build(source: Path, target: str, folder: Path) -> Path:
    """The `wheel` or `sdist` of the project in `source`."""
    before = set(folder.glob("*"))
    argv = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(argv, cwd=source, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [made] = set(folder.glob("*")) - before
    return made


def unpacked(sdist: Path, folder: Path) -> Path:
    """The one folder in a source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [made] = folder.iterdir()
    return made


class Environment:
    """A virtual environment with nothing in it; packages come from files, or from the environment of the tests."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder = folder
        self.python = folder / "bin/python"
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        self.provided: set[str] = set()
        # Neither this process's packages nor a folder of wheels that this machine's pip knows of.
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        self.env["PIP_CONFIG_FILE"] = os.devnull

    def run(self, *words: str) -> str:
        """What a program of the environment prints, run in its folder."""
        return self._output(str(self.folder / "bin" / words[0]), *words[1:])

    def pip(self, *words: str) -> str:
        """What pip says, which works on this environment from outside."""
        return self._output(
            sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python), *words
        )

    def _output(self, *argv: str) -> str:
        done = subprocess.run(argv, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, *wheels: Path) -> None:
        """Install wheels without an index: what they need has to be there."""
        self.pip("install", "--no-index", *map(str, wheels))

    def provide(self, requirements: list[str]) -> None:
        """Link what these requirements name, and what that needs, from the environment of the tests."""
        for each in map(Requirement, requirements):
            name = canonicalize_name(each.name)
            if name in self.provided:
                continue
            self.provided.add(name)
            self._link(name)
            for line in distribution(name).requires or []:
                when = Requirement(line).marker
                if when is None or any(when.evaluate({"extra": one}) for one in each.extras or {""}):
                    self.provide([line])

    def _link(self, name: str) -> None:
        for file in distribution(name).files or []:
            target = self.packages / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / file.parts[0])
