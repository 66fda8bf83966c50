"""The two distributions as a user gets them: wheels, and virtual environments that hold nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[2]


def build(source: Path, target: str, folder: Path) -> Path:
    """The `wheel` or `sdist` of the project in `source`."""
    before = set(folder.glob("*"))
    argv = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(argv, cwd=source, capture_output=True, text=True, timeout=60)
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
    """A virtual environment with pip and nothing else; packages come from files, or from the environment of the tests."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True, with_pip=True)
        self.folder = folder
        self.python = folder / "bin/python"
        self.provided: set[str] = set()
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        # Neither this process's packages nor a folder of wheels that this machine's pip knows of.
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        self.env["PIP_CONFIG_FILE"] = os.devnull

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in its own folder."""
        argv = [str(self.folder / "bin" / words[0]), *words[1:]]
        return subprocess.run(argv, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout)

    def output(self, *words: str) -> str:
        """What it prints."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, *wheels: Path) -> None:
        """Install wheels without an index: what they need has to be there."""
        self.output("python", "-m", "pip", "install", "--no-index", "--disable-pip-version-check", *map(str, wheels))

    def provide(self, requirements: list[str]) -> None:
        """Copy what these requirements name, and what that needs, from the environment of the tests."""
        for each in map(Requirement, requirements):
            name = canonicalize_name(each.name)
            if name not in self.provided:
                self.provided.add(name)
                self._copy(name)
                extras = each.extras or {""}
                needed = [(line, Requirement(line).marker) for line in distribution(name).requires or []]
                self.provide(
                    [
                        line
                        for line, when in needed
                        if when is None or any(when.evaluate({"extra": one}) for one in extras)
                    ]
                )

    def _copy(self, name: str) -> None:
        try:
            files = distribution(name).files or []
        except PackageNotFoundError as missing:
            raise AssertionError(f"{name} is not in the environment of the tests") from missing
        for file in files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = self.packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), target)
