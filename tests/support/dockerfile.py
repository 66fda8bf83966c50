"""A Dockerfile on a machine without a container engine: it is read, and a stage of it is carried out in a folder."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_FOLDERS: Final = ("/opt", "/source")
"""The folders that the file makes. They are made below the folder of the test instead."""


@dataclass(slots=True)
class Stage:
    """The instructions between one FROM and the next, as (word, rest of the line)."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for each, rest in self.instructions if each == word]

    def env(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for rest in self.all("ENV") for pair in shlex.split(rest))

    def array(self, word: str) -> list[str]:
        """The words of the last instruction of this kind, which is written as an array."""
        said: list[str] = json.loads(re.search(r"\[.*\]$", self.all(word)[-1])[0])  # type: ignore[index]
        return said


def stages(path: Path) -> list[Stage]:
    text = re.sub(r"(?m)^\s*#.*\n", "", path.read_text()).replace("\\\n", " ")
    found: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base.strip(), name.strip()))
        elif found:
            found[-1].instructions.append((word, re.sub(r"\s+", " ", rest.strip())))
    return found


def context(root: Path) -> Iterator[Path]:
    """The files that `.dockerignore` lets in, for a list that begins with `*` and then names what it wants."""
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "this reads only lists of what is wanted"
    wanted = [line[1:] for line in lines if line.startswith("!")]
    unwanted = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    for name in wanted:
        path = root / name
        assert path.exists(), f".dockerignore names {name}, which is not there"
        for each in path.rglob("*") if path.is_dir() else [path]:
            parts = each.relative_to(root).parts
            if each.is_file() and not any(fnmatch.fnmatch(part, bad) for part in parts for bad in unwanted):
                yield each.relative_to(root)


class Build:
    """A stage carried out: COPY from the context, RUN in a shell, with its folders below `root`.

    What a package index has already given to this machine is taken from pip's own store: the file tells pip to keep none.
    """

    def __init__(self, stage: Stage, source: Path, root: Path) -> None:
        self.root = root
        self._source, self._files = source, list(context(source))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SEAMARK_"))}
        self.env = kept | stage.env() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.env.pop("PIP_NO_CACHE_DIR", None)
        folder = root
        for word, rest in stage.instructions:
            if word == "WORKDIR":
                folder = Path(self.here(rest))
                folder.mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self._copy(rest.split(), folder)
            elif word == "RUN":
                self._run(rest, folder)
            else:
                assert word in ("ENV", "ARG"), f"nobody has said what {word} does here"

    def here(self, text: str) -> str:
        """The text with our folders in the place of the image's."""
        for path in _FOLDERS:
            text = re.sub(rf"(?<![\w.-]){re.escape(path)}(?=/|\b)", f"{self.root}{path}", text)
        return text

    def _copy(self, words: Sequence[str], folder: Path) -> None:
        *names, target = words
        place = (folder / self.here(target)).resolve()
        for path in self._files:
            if "." in names or str(path) in names:
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self._source / path, place / path)
        missing = [name for name in names if name != "." and not (place / name).exists()]
        assert missing == [], f"COPY of what the context does not have: {missing}"

    def _run(self, text: str, folder: Path) -> None:
        done = subprocess.run(
            ["sh", "-ec", self.here(text)], cwd=folder, env=self.env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
