"""A tenant's configuration as files, for people and git:

tenant.toml                                     the defaults
types/order.*.toml                              a rule, under the pattern that the file is called by
templates/order.shipped/email.de/subject.txt    a part of a template, as it is, and a line's end
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from engine.directory.configuration import Configuration
from engine.directory.templates import LOCALE, SHAPES, TemplateKey, check_channel, check_parts
from engine.directory.tenant_defaults import checked_defaults
from engine.errors import InvalidSetting
from engine.limits import RULE_BYTES_MAX
from engine.plan.patterns import check_pattern
from engine.plan.preferences import TenantDefaults
from engine.plan.rules import CHANNELS, TypeRule

TENANT_FILE: Final = "tenant.toml"
TYPES: Final = "types"
TEMPLATES: Final = "templates"

_ENDINGS: Final = {"subject": ".txt", "title": ".txt", "html": ".html"}
_BODY_ENDINGS: Final = {"email": ".md", "push": ".txt", "sms": ".txt"}
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

T = TypeVar("T")


class _Reading:
    """Reads a folder, and remembers what is wrong with each file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []

    def fault(self, path: Path, why: object) -> None:
        self.faults.append(f"{path.relative_to(self.folder)}: {why}")

    def entries(self, path: Path) -> Iterator[Path]:
        """What is in a folder, by name, without what is hidden."""
        yield from sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))

    def text(self, path: Path) -> str | None:
        try:
            if path.stat().st_size > RULE_BYTES_MAX:
                self.fault(path, f"has more than {RULE_BYTES_MAX} bytes")
                return None
            return path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            self.fault(path, "is no UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror)
            return None

    def toml(self, path: Path, type: type[T], checked: Callable[[T], T] = lambda read: read, **known: str) -> T | None:
        text = self.text(path)
        if text is None:
            return None
        try:
            said = tomllib.loads(text)
            if taken := sorted({"version", *known} & said.keys()):
                raise ValueError(f"leave out `{taken[0]}`: it is no part of the file")
            return checked(msgspec.convert({**said, **known}, type))
        except (ValueError, msgspec.ValidationError) as error:
            self.fault(path, error)
            return None


def read_folder(folder: Path) -> tuple[Configuration, list[str]]:
    """The configuration in a folder, and what is wrong with it: each file that has a fault, with the fault.

    Raises:
        InvalidSetting: there is no such folder, or nothing in it is a configuration.
    """
    paths = folder / TENANT_FILE, folder / TYPES, folder / TEMPLATES
    if not any(path.exists() for path in paths):
        raise InvalidSetting(
            f"{folder} has none of {TENANT_FILE}, {TYPES}/, {TEMPLATES}/: `seamark config export` makes them"
        )
    reading = _Reading(folder)
    configuration = Configuration(
        types=dict(_types(reading)) if paths[1].is_dir() else {},
        templates=dict(_templates(reading)) if paths[2].is_dir() else {},
        defaults=reading.toml(paths[0], TenantDefaults, checked_defaults) if paths[0].exists() else None,
    )
    return configuration, reading.faults


def _types(reading: _Reading) -> Iterator[tuple[str, TypeRule]]:
    for path in reading.entries(reading.folder / TYPES):
        if path.suffix != ".toml":
            reading.fault(path, "is no rule: a file is called as its pattern, with .toml at the end")
            continue
        pattern = path.name.removesuffix(".toml")
        rule = reading.toml(path, TypeRule, pattern=pattern)
        if rule is not None:
            yield pattern, rule


def _templates(reading: _Reading) -> Iterator[tuple[TemplateKey, dict[str, str]]]:
    for type_path in reading.entries(reading.folder / TEMPLATES):
        try:
            check_pattern(type_path.name)
            places = list(reading.entries(type_path))
        except (ValueError, OSError) as error:
            reading.fault(type_path, error if isinstance(error, ValueError) else "is no folder of templates")
            continue
        for path in places:
            channel, _, locale = path.name.partition(".")
            if channel not in CHANNELS or re.match(LOCALE, locale) is None or not path.is_dir():
                reading.fault(path, "is no folder of a template: it is called as channel and locale, as in email.de")
                continue
            try:
                check_channel(channel)
            except ValueError as error:
                reading.fault(path, error)
                continue
            known = len(reading.faults)
            parts = dict(_parts(reading, path, channel))
            if len(reading.faults) > known:  # a part is missing because its file has a fault, which is told already
                continue
            try:
                check_parts(channel, parts)
            except ValueError as error:
                reading.fault(path, error)
                continue
            yield TemplateKey(type_path.name, channel, locale), parts


def _parts(reading: _Reading, folder: Path, channel: str) -> Iterator[tuple[str, str]]:
    for path in reading.entries(folder):
        files = sorted(_part_file(channel, part) for part in SHAPES[channel].must | SHAPES[channel].may)
        if path.name not in files:
            reading.fault(path, f"is no part of a template for {channel}: its files are {', '.join(files)}")
            continue
        text = reading.text(path)
        if text is not None:
            yield path.stem, text.removesuffix("\n")


def _part_file(channel: str, part: str) -> str:
    return part + (_BODY_ENDINGS[channel] if part == "body" else _ENDINGS.get(part, ""))


def write_folder(folder: Path, configuration: Configuration) -> list[Path]:
    """Write the files of a configuration into a folder that has none; their paths.

    Templates of channels that have none are left out. What was kept from before a check existed is written as it is, and
    `read_folder` names it as a fault.

    Raises:
        InvalidSetting: it has some already, or cannot be written to.
    """
    for name in (TENANT_FILE, TYPES, TEMPLATES):
        if (folder / name).exists():
            raise InvalidSetting(f"{folder / name} is there already: export into another folder, and compare")
    files = {}
    if configuration.defaults is not None:
        files[folder / TENANT_FILE] = toml_of(msgspec.to_builtins(configuration.defaults))
    for pattern, rule in configuration.types.items():
        said = msgspec.to_builtins(rule)
        del said["pattern"]
        files[folder / TYPES / f"{pattern}.toml"] = toml_of(said)
    for key, parts in configuration.templates.items():
        if key.channel not in SHAPES:  # kept from before such templates were refused: no worker uses it
            continue
        for part, text in parts.items():
            place = folder / TEMPLATES / key.type / f"{key.channel}.{key.locale}"
            files[place / _part_file(key.channel, part)] = f"{text}\n"
    try:
        for name in (TYPES, TEMPLATES):  # also empty ones: a folder without any is no configuration
            (folder / name).mkdir(parents=True)
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:  # where `Order` and `order` are one name, one must not replace the other
                file.write(text.encode())
    except OSError as error:
        raise InvalidSetting(f"{error.filename} cannot be written: {error.strerror}") from error
    return list(files)


def toml_of(document: Mapping[str, Any]) -> str:
    """A document of texts, numbers, lists and tables, as TOML."""
    return "\n".join(_lines(document, "")).lstrip("\n") + "\n" if document else ""


def _lines(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in table.items():
        if not isinstance(value, dict):
            yield f"{_key(name)} = {_value(value)}"
    for name, value in table.items():
        if isinstance(value, dict):
            if not value or not all(
                isinstance(one, dict) for one in value.values()
            ):  # else its tables say that it is there
                yield f"\n[{prefix}{_key(name)}]"
            yield from _lines(value, f"{prefix}{_key(name)}.")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _value(name)


def _value(value: Any) -> str:
    match value:
        case str():  # JSON's escapes are TOML's, but for one character that JSON leaves as it is
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case dict():
            return f"{{ {', '.join(f'{_key(name)} = {_value(one)}' for name, one in value.items())} }}"
    return str(value)
