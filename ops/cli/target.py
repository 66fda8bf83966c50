"""Which Seamark a command talks to: the flags, the environment, or the development stack of this folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from engine.broker.settings import NatsSettings
from engine.errors import InvalidSetting
from engine.settings import given_settings, load_settings
from seamark.protocol.errors import InvalidToken
from seamark.protocol.logins import inbox_prefix_of
from seamark.protocol.subjects import encode_token

_OPTIONS = re.compile(r"\?(?=\w+=)")  # not the ? that a password may hold

DATA_FOLDER = Path(".seamark")

Folder = Annotated[Path, typer.Option("--folder", help="Folder of the development stack.", envvar="SEAMARK_FOLDER")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Tenant; the stack's own by default.")]


class DevFile(msgspec.Struct, kw_only=True):
    """`<data folder>/dev.json`: where a running development stack is, and keys to it. Mode 0600."""

    nats_url: str
    redis_url: str
    postgres_url: str
    gateway_url: str
    tenant: str
    user: str
    token: str
    api_key: str
    jwt_secret: str
    nats_monitor_url: str | None = None
    outbox_url: str | None = None
    trace_url: str | None = None


def read_dev_file(data: Path) -> DevFile:
    """The development stack's description.

    Raises:
        InvalidSetting: there is none, or it cannot be read; the message says how to start one.
    """
    path = data / "dev.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=DevFile)
    except FileNotFoundError as error:
        message = f"{path} does not exist: start the stack with `make run` (or `seamark dev`), or name its folder with --folder"
        raise InvalidSetting(message) from error
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidSetting(f"{path} cannot be read: {error}") from error


def checked_tenant(tenant: str | None) -> str:
    """The tenant that `--tenant` names, or the stack's own.

    Raises:
        InvalidSetting: no tenant can be called so.
    """
    name = tenant or "default"
    try:
        encode_token(name)
    except InvalidToken as error:
        raise InvalidSetting(f"--tenant: {error}") from error
    return name


def nats_settings(data: Path, name: str) -> NatsSettings:
    """The broker: the settings where they give its address, else the development stack's."""
    if "nats_url" in given_settings():
        return load_settings().nats(name)
    url = read_dev_file(data).nats_url
    return NatsSettings(url, name=name, inbox_prefix=inbox_prefix_of(url))


def postgres_url(data: Path) -> str:
    """The database: the settings where they give its address, else the development stack's.

    Raises:
        InvalidSetting: the settings give another broker but no database, or there is no stack.
    """
    given = load_settings().postgres_url
    if given is not None:
        return given.reveal()
    if "nats_url" in given_settings():
        raise InvalidSetting("SEAMARK_POSTGRES_URL is not set")
    return read_dev_file(data).postgres_url


def shown(urls: str) -> str:
    """Addresses as they may be shown: without user and password, and without options, which may hold them too."""
    return "://".join(_OPTIONS.split(part)[0].rpartition("@")[2].partition("?")[0] for part in urls.split("://"))
