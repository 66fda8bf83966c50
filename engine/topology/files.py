"""The files in `nats/`: plain JetStream stream and consumer configurations, one file per stream and profile.

They are what `nats stream add --config` and `nats consumer add --config` take. Two marks are filled in as text and
nothing else is touched: `${N}`, the number of partitions, and `${p}`, the number of one partition; a file that holds
`${p}` stands for one stream or consumer per partition. What comes out is what the server is sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from engine.errors import TopologyError

Profile = Literal["dev", "production"]

PROFILES: Final[tuple[Profile, ...]] = get_args(Profile)

PARTITIONS_DEFAULT: Final[Mapping[Profile, int]] = {"dev": 4, "production": 16}
"""On one replica an atomic batch costs about 1 ms of broker CPU, so dev has few; production has room to spread."""

PARTITIONS_MAX: Final = 64
"""The number is fixed for life; above 64 the marks and consumers of idle partitions cost more than spreading gains."""

PARTITION_COUNT_MARK: Final = "${N}"
PARTITION_MARK: Final = "${p}"


@dataclass(frozen=True, slots=True)
class StreamFile:
    """One stream as rendered. `text` is what the file holds, `config` the same parsed (and possibly overridden)."""

    filename: str
    name: str
    text: str = field(repr=False)
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ConsumerFile:
    """One durable consumer of `stream` as rendered."""

    filename: str
    stream: str
    name: str
    text: str = field(repr=False)
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a test or a small machine changes in the files; production runs without any.

    Args:
        replicas: copies of every stream and consumer.
        pin_timeout_seconds: `priority_timeout` of the dispatch consumers.
        stream_bytes: `max_bytes` by stream; `LOG` means every LOG-<p>.
    """

    replicas: int | None = None
    pin_timeout_seconds: float | None = None
    stream_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Topology:
    """What the files of a profile describe for a number of partitions."""

    profile: Profile
    partitions: int
    streams: tuple[StreamFile, ...]
    consumers: tuple[ConsumerFile, ...]

    def write(self, folder: Path) -> list[Path]:
        """Write the rendered files to `<folder>/streams` and `<folder>/consumers`; returns their paths."""
        written = []
        for kind, files in (("streams", self.streams), ("consumers", self.consumers)):
            target = folder / kind
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                path = target / file.filename
                path.write_text(file.text, encoding="utf-8")
                written.append(path)
        return written


def files_folder() -> Path:
    """Where the files are: `SEAMARK_NATS_FILES`, else `nats/` of the checkout, else the copy an installation carries.

    Raises:
        TopologyError: none of them has a folder `streams`.
    """
    if named := os.environ.get("SEAMARK_NATS_FILES"):
        candidates = [Path(named)]
    else:
        here = Path(__file__).resolve().parents[1]
        # Once installed, the folder beside the packages is the NATS client's own `nats`, which has no streams.
        candidates = [here.parent / "nats", here / "_nats"]
    for folder in candidates:
        if (folder / "streams").is_dir():
            return folder
    places = ", ".join(str(folder) for folder in candidates)
    raise TopologyError(f"no stream files found (looked in {places})", "Set SEAMARK_NATS_FILES to the folder nats/.")


def check_partitions(partitions: int) -> int:
    """`partitions` itself when a topology can have so many.

    Raises:
        TopologyError: not 1 to 64.
    """
    if not 1 <= partitions <= PARTITIONS_MAX:
        raise TopologyError(f"{partitions} partitions asked for", f"Choose 1 to {PARTITIONS_MAX}, once and for all.")
    return partitions


def render(
    profile: Profile, partitions: int | None = None, *, overrides: Overrides | None = None, folder: Path | None = None
) -> Topology:
    """The files of a profile with the numbers filled in.

    `partitions` defaults to the profile's own number (dev 4, production 16), `folder` to `files_folder()`.

    Raises:
        TopologyError: unknown profile, impossible number, or a file that is missing or no JSON object.
    """
    if profile not in PROFILES:
        raise TopologyError(f"unknown profile {profile!r}", f"Choose one of {', '.join(PROFILES)}.")
    count = check_partitions(PARTITIONS_DEFAULT[profile] if partitions is None else partitions)
    root = folder or files_folder()
    streams = [_stream(name, text) for name, text in _rendered(root / "streams", profile, count)]
    consumers = [_consumer(name, text) for name, text in _rendered(root / "consumers", profile, count)]
    topology = Topology(profile, count, tuple(streams), tuple(consumers))
    return topology if overrides is None else _overridden(topology, overrides)


def _rendered(folder: Path, profile: Profile, partitions: int) -> Iterator[tuple[str, str]]:
    """File names and texts, in a stable order: names first, then numbers."""
    paths = sorted(folder.glob(f"*.{profile}.json"))
    if not paths:
        raise TopologyError(f"no files of profile {profile} in {folder}", "Restore the folder nats/ of the project.")
    for path in paths:
        text = path.read_text(encoding="utf-8").replace(PARTITION_COUNT_MARK, str(partitions))
        if PARTITION_MARK not in text:
            yield path.name, text
            continue
        for number in range(partitions):
            yield path.name.replace("-p.", f"-{number}."), text.replace(PARTITION_MARK, str(number))


def _stream(filename: str, text: str) -> StreamFile:
    config = _parsed(filename, text)
    return StreamFile(filename, config["name"], text, config)


def _consumer(filename: str, text: str) -> ConsumerFile:
    """A consumer's stream is the first word of its file name: the configuration itself has no field for it."""
    config = _parsed(filename, text)
    return ConsumerFile(filename, filename.split(".", 1)[0], config["name"], text, config)


def _parsed(filename: str, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise TopologyError(f"{filename} is not JSON: {error}", "Correct the file.") from error
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise TopologyError(f"{filename} is no configuration object with a name", "Correct the file.")
    return config


def _overridden(topology: Topology, overrides: Overrides) -> Topology:
    streams = []
    for stream in topology.streams:
        changes: dict[str, Any] = {} if overrides.replicas is None else {"num_replicas": overrides.replicas}
        if (size := overrides.stream_bytes.get("LOG" if is_log(stream.name) else stream.name)) is not None:
            changes["max_bytes"] = size
        streams.append(replace(stream, config=stream.config | changes, text=_text(stream.config | changes)))
    consumers = []
    for consumer in topology.consumers:
        changes = {} if overrides.replicas is None else {"num_replicas": overrides.replicas}
        if overrides.pin_timeout_seconds is not None and "priority_timeout" in consumer.config:
            changes["priority_timeout"] = round(overrides.pin_timeout_seconds * 1e9)
        consumers.append(replace(consumer, config=consumer.config | changes, text=_text(consumer.config | changes)))
    return replace(topology, streams=tuple(streams), consumers=tuple(consumers))


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def log_partition(stream: str) -> int | None:
    """The partition of a LOG stream by its name, None for every other stream."""
    prefix, _, number = stream.partition("-")
    return int(number) if prefix == "LOG" and number.isdecimal() else None


def is_log(stream: str) -> bool:
    """Whether this is the name of a LOG stream."""
    return log_partition(stream) is not None
