"""The providers' file and what it names: workers read it, and gateways a part of it, again whenever it changes."""

from __future__ import annotations

import asyncio
import ssl
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import structlog

from engine import metrics
from engine.errors import InvalidSetting
from engine.tasks import end_if_cancelled

_log = structlog.get_logger("seamark.channels")

VARIABLE: Final = "SEAMARK_PROVIDERS"

WATCH_SECONDS: Final = 2.0
"""How often a process looks whether a file has changed: some calls of `stat`."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all kinds of providers have.

    Args:
        authority_file: whom to trust, in PEM, in place of the system's authorities: for simulators and proxies.
        per_second, burst: what the provider's contract allows all workers together; see `engine.jobs.bucket.Limit`. 0: unknown.
    """

    authority_file: str = ""
    per_second: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    burst: Annotated[int, msgspec.Meta(ge=1)] = 1


def read_text(field: str, path: Path) -> str:
    """The text of a file.

    Args:
        field: of the providers' file, which names it.

    Raises:
        InvalidSetting: it cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidSetting(f"{field}: {path} cannot be read: {why}") from error


def read_secret(field: str, path: Path) -> str:
    """A secret, without the line's end. Arguments as of `read_text`.

    Raises:
        InvalidSetting: it cannot be read, or holds something else. What is in it is not repeated.
    """
    text = read_text(field, path).strip()
    if not text or not text.isascii() or not text.isprintable():
        raise InvalidSetting(f"{field}: {path} must hold the secret, in one line, and nothing else")
    return text


def read_trust(field: str, folder: Path, name: str) -> ssl.SSLContext | None:
    """Whom to trust; None: the system's authorities, as no file is named.

    Args:
        field: as of `read_text`.
        folder: where the providers' file is.
        name: of a file with certificates in PEM; "": there is none.

    Raises:
        InvalidSetting: it cannot be read, or holds no certificates.
    """
    if not name:
        return None
    text = read_text(field, folder / name)
    try:
        return ssl.create_default_context(cadata=text or "-")  # an empty text would mean the system's authorities
    except ssl.SSLError as error:
        raise InvalidSetting(f"{field} holds no certificates in PEM") from error


class ProvidersToml:
    """The providers' file as TOML. What its tables mean, others know.

    Args:
        path: where it is.
        part: the table of which files are watched; "": all.

    Raises:
        InvalidSetting: it cannot be read, or is not TOML.
    """

    def __init__(self, path: Path, part: str = "") -> None:
        self.path = path
        # Before anything is read: what changes in between is read again.
        seen = _fingerprint(path)
        try:
            self.tables = tomllib.loads(path.read_text())
        except OSError as error:
            raise InvalidSetting(f"{VARIABLE}: {path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidSetting(f"{VARIABLE}: {path} is not TOML: {error}") from error
        self._files = [path.parent / name for name in _named_files(self.tables.get(part) if part else self.tables)]
        self._seen = [seen, *map(_fingerprint, self._files)]

    def changed(self) -> bool:
        """Whether it, or a file that it names, is another one than was read."""
        return self._seen != [_fingerprint(self.path), *map(_fingerprint, self._files)]


async def watch(changed: Callable[[], bool], read: Callable[[], Callable[[], bool]]) -> None:
    """Read the providers' file anew when it changes, until cancelled. What cannot be read is said, and what was before goes on.

    Args:
        changed: `ProvidersToml.changed` of what was read.
        read: returns the same of what it has read, or raises InvalidSetting, and has then changed nothing.
    """
    refused = ""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        end_if_cancelled()
        if not changed():
            continue
        try:
            changed = read()
        except InvalidSetting as error:
            metrics.providers_stale.set(1)
            if str(error) != refused:
                _log.error("providers_not_read", why=str(error))
            refused = str(error)
            continue
        refused = ""
        metrics.providers_stale.set(0)
        _log.info("providers_read")


def _named_files(value: Any, name: str = "") -> Iterator[str]:
    """What is named by members `…_file` and `…_files`, wherever they stand."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _named_files(one, name if name.endswith("_files") else key)
    elif isinstance(value, list):
        for one in value:
            yield from _named_files(one, name)
    elif isinstance(value, str) and value and name.endswith(("_file", "_files")):
        yield value


def _fingerprint(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size
