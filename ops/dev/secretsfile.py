"""What a development stack keeps over restarts: its secret, its API keys, the ports it had. Mode 0600."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.errors import InvalidSetting


class Kept(msgspec.Struct, kw_only=True):
    """`<data folder>/kept.json`. `api_key`: the developer's. `page_key`: for the page, which a browser holds."""

    jwt_secret: str = msgspec.field(default_factory=lambda: secrets.token_urlsafe(32))
    api_key: str = msgspec.field(default_factory=lambda: f"sk_dev_{secrets.token_urlsafe(24)}")
    page_key: str = msgspec.field(default_factory=lambda: f"sk_dev_{secrets.token_urlsafe(24)}")
    unsubscribe_secret: str = msgspec.field(default_factory=lambda: secrets.token_urlsafe(32))
    storage_key: str = msgspec.field(default_factory=lambda: base64.b64encode(secrets.token_bytes(32)).decode())
    ports: dict[str, int] = {}


def read_kept(data: Path) -> Kept:
    """What an earlier run on this data kept, or fresh secrets.

    Raises:
        InvalidSetting: the file is there but cannot be read.
    """
    path = data / "kept.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return Kept()
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidSetting(f"{path} cannot be read ({error}): remove it to start with fresh secrets") from error


def kept_private(path: Path, make: Callable[[], str]) -> str:
    """The text of a file of ours; where there is none, what `make` makes, which is written so that only this user can read it.

    Raises:
        InvalidSetting: the file is there but cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        write_private(path, text := make())
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{path} cannot be read ({error}): remove it to have it made anew") from error


def write_private_json(path: Path, value: object) -> None:
    """Write `value` so that only this user can read it, whole or not at all."""
    write_private(path, msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def write_private(path: Path, text: str) -> None:
    """Write `text` so that only this user can read it, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
