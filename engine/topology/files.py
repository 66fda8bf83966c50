"""The files in `nats/`: plain JetStream stream and consumer configurations, one file per stream and profile.

They are what `nats stream add --config` and `nats consumer add --config` take. Two marks are filled in as text and
nothing else is touched: `${N}`, the number of partitions, and `${p}`, the number of one partition; a file that holds
`${p}` stands for one stream or consumer per partition. What comes out is what the server is sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from engine.errors import TopologyError

Profile = Literal["dev", "production"]

PROFILES: Final[tuple[Profile, ...]] = get_args(Profile)

PARTITIONS_DEFAULT: Final[Mapping[Profile, int]] = {"dev": 4, "production": 16}
"""On one replica an atomic batch costs about 1 ms of broker CPU, so dev has few; production has room to spread."""

PARTITIONS_MAX: Final = 64
"""The number is fixed for life; above 64 the marks and consumers of idle partitions cost more than spreading gains."""


@dataclass(frozen=True, slots=True)
class File:
    """A stream, or a durable consumer of `stream`, as rendered (and possibly overridden)."""

    filename: str
    stream: str
    name: str
    config: dict[str, Any] = field(repr=False)

    @property
    def kind(self) -> Literal["stream", "consumer"]:
        """What is described."""
        return "stream" if self.name == self.stream else "consumer"

    @property
    def target(self) -> str:
        """`<stream>` or `<stream>/<consumer>`."""
        return self.stream if self.name == self.stream else f"{self.stream}/{self.name}"

    @property
    def text(self) -> str:
        """The configuration as the file holds it."""
        return json.dumps(self.config, indent=2) + "\n"


Override = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
"""What a test or a small machine changes in a configuration, by its name and what its file says; production runs without."""


@dataclass(frozen=True, slots=True)
class Topology:
    """What the files of a profile describe for a number of partitions."""

    profile: Profile
    partitions: int
    streams: tuple[File, ...]
    consumers: tuple[File, ...]

    def write(self, folder: Path) -> list[Path]:
        """Write the rendered files to `<folder>/streams` and `<folder>/consumers`; returns their paths."""
        written = []
        for file in (*self.streams, *self.consumers):
            path = folder / f"{file.kind}s" / file.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text, encoding="utf-8")
            written.append(path)
        return written


def files_folder() -> Path:
    """Where the files are: `SEAMARK_NATS_FILES`, else `nats/` of the checkout, else the copy an installation carries.

    Raises:
        TopologyError: none of them has a folder `streams`.
    """
    here = Path(__file__).resolve().parents[1]
    named = os.environ.get("SEAMARK_NATS_FILES")
    # Once installed, the folder beside the packages is the NATS client's own `nats`, which has no streams.
    candidates = [Path(named)] if named else [here.parent / "nats", here / "_nats"]
    for folder in candidates:
        if (folder / "streams").is_dir():
            return folder
    places = ", ".join(map(str, candidates))
    raise TopologyError(f"no stream files found (looked in {places})", "Set SEAMARK_NATS_FILES to the folder nats/.")


def check_partitions(partitions: int) -> int:
    """`partitions` itself when a topology can have so many.

    Raises:
        TopologyError: not 1 to 64.
    """
    if not 1 <= partitions <= PARTITIONS_MAX:
        raise TopologyError(f"{partitions} partitions asked for", f"Choose 1 to {PARTITIONS_MAX}, once and for all.")
    return partitions


def profile_named(name: str) -> Profile:
    """The profile of this name.

    Raises:
        TopologyError: there is none.
    """
    for profile in PROFILES:
        if profile == name:
            return profile
    raise TopologyError(f"unknown profile {name!r}", f"Choose one of {', '.join(PROFILES)}.")


def render(
    profile: Profile, partitions: int | None = None, *, overrides: Override | None = None, folder: Path | None = None
) -> Topology:
    """The files of a profile with the numbers filled in.

    `partitions` defaults to the profile's own number (dev 4, production 16), `folder` to `files_folder()`.

    Raises:
        TopologyError: unknown profile, impossible number, or a file that is missing or no JSON object.
    """
    count = check_partitions(PARTITIONS_DEFAULT[profile_named(profile)] if partitions is None else partitions)
    root = folder or files_folder()
    streams, consumers = (tuple(_files(root / kind, profile, count, overrides)) for kind in ("streams", "consumers"))
    return Topology(profile, count, streams, consumers)


def _files(folder: Path, profile: Profile, partitions: int, overrides: Override | None) -> Iterator[File]:
    """In a stable order: names first, then numbers."""
    paths = sorted(folder.glob(f"*.{profile}.json"))
    if not paths:
        raise TopologyError(f"no files of profile {profile} in {folder}", "Restore the folder nats/ of the project.")
    for path in paths:
        text = path.read_text(encoding="utf-8").replace("${N}", str(partitions))
        for number in range(partitions if "${p}" in text else 1):
            config = _parsed(path, text.replace("${p}", str(number)))
            name = config["name"]
            # A consumer's stream is the first word of its file name: the configuration itself has no field for it.
            stream, *rest = path.name.replace("-p.", f"-{number}.").split(".")
            config |= overrides(name, config) if overrides else {}
            yield File(".".join([stream, *rest]), name if folder.name == "streams" else stream, name, config)


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise TopologyError(f"{path.name} is not JSON: {error}", "Correct the file.") from error
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise TopologyError(f"{path.name} is no configuration object with a name", "Correct the file.")
    return config


def log_partition(stream: str) -> int | None:
    """The partition of a LOG stream by its name, None for every other stream."""
    prefix, _, number = stream.partition("-")
    return int(number) if prefix == "LOG" and number.isdecimal() else None


def is_log(stream: str) -> bool:
    """Whether this is the name of a LOG stream."""
    return log_partition(stream) is not None
