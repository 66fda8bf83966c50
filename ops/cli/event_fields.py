"""Reads the fields of one event from options and from a file. A field that is not valid is refused by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from seamark.protocol.errors import InvalidEvent, InvalidToken
from seamark.protocol.events import Event
from seamark.protocol.subjects import check_type, encode_token

OPTIONS: Final = {"ordering_key": "--key", "channels": "--channel"}
"""Options whose name is not that of their field."""

_TYPES: Final = {field.name: field.type for field in msgspec.structs.fields(Event)}
_MOMENT: Final = "write it as RFC 3339 with an offset, such as 2026-01-31T12:00:00Z"
_REMEDIES: Final = {
    "to": 'name users, such as "to": ["alice"]',
    "data": """try --data '{"text":"hi"}', or --data @file""",
    "time": _MOMENT,
    "expires_at": _MOMENT,
    "send_at": _MOMENT,
    "priority": "choose one of critical, high, normal, low",
    "semantics": "choose one of at_least_once, effectively_once, at_most_once",
}
_TOKENS: Final[dict[str, Callable[[str], str]]] = {
    "tenant": encode_token,
    "ordering_key": encode_token,
    "type": check_type,
}
"""Fields that become part of the subject, with the function that checks each."""


def read_event(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Read an event from a file. Options win over its fields; unknown fields are kept as they are.

    Args:
        path: of a JSON object with the fields of `POST /v1/events`, or `-` for standard input.
        options: fields by name; None is not given.

    Raises:
        InvalidEvent: the file, or the field at fault, with the remedy.
    """
    try:
        text = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InvalidEvent("file", f"--file: {path} cannot be read: {error.strerror}") from error
    try:
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = """--file must hold one event, a JSON object such as {"to":["alice"],"type":"demo.hello"}"""
        raise InvalidEvent("file", f"{what}: {error}") from error
    if "key" in fields:
        raise InvalidEvent("key", "`key` is no field of an event: the ordering key is called `ordering_key`")
    read = {name: _decoded(name, bytes(raw)) for name, raw in fields.items()}
    return _checked({**read, **_given(options)}, f"in {path} or as an option")


def event_of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Make an event from options alone.

    Args:
        options: fields by name; None is not given.

    Raises:
        InvalidEvent: the option at fault, with the remedy.
    """
    return _checked(_given(options), "as an option")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as values of the types that an event's fields have."""
    fields = {name: value for name, value in options.items() if value is not None}
    for name, value in fields.items():
        option = OPTIONS.get(name, "--" + name.replace("_", "-"))
        if name == "data":
            fields[name] = read_data(value)
            continue
        try:
            fields[name] = msgspec.convert(value, _TYPES[name])
        except msgspec.ValidationError as error:
            raise InvalidEvent(name, _with_remedy(f"{option}: {error}", name)) from error
    return fields


def _decoded(name: str, raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw, type=_TYPES.get(name, msgspec.Raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent(name, _with_remedy(f"`{name}`: {error}", name)) from error


def _with_remedy(said: str, name: str) -> str:
    return f"{said}; {_REMEDIES[name]}" if name in _REMEDIES else said


def read_data(text: str) -> msgspec.Raw:
    """The JSON that `--data` holds, or that of the file it names, unchanged.

    Raises:
        InvalidEvent: it is none.
    """
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidEvent("data", f"--data: {error}") from error
    try:
        msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidEvent("data", _with_remedy(f"--data is not JSON ({error})", "data")) from error
    return msgspec.Raw(text.encode())


def _checked(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields, once it is certain that none is missing and that those of the subject are valid."""
    if not fields.get("to"):
        raise InvalidEvent("to", f"nobody is named: give `to` {where}, such as --to alice")
    if fields.get("type") is None:
        raise InvalidEvent("type", f"`type` is missing {where}: say what happened, such as --type order.shipped")
    for name, check in _TOKENS.items():
        try:
            if fields.get(name) is not None:
                check(fields[name])
        except InvalidToken as error:
            raise InvalidEvent(name, f"`{name}`: {error}") from error
    return fields
