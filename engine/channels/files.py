"""What the parts of the providers' file have in common: the members of an entry, and the files that entries name."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

import msgspec

from engine.errors import InvalidSetting


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
