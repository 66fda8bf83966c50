"""Settings: one frozen object, from environment variables, `*_FILE` secrets and an optional TOML file.

Precedence: environment, then file, then default. A secret is best given as a file (`SEAMARK_JWT_SECRET_FILE`): its content
shows neither in a process list nor in an environment dump.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from engine.errors import InvalidSetting
from engine.jetstream import NatsSettings

Profile = Literal["dev", "production"]
LogFormat = Literal["json", "console"]

PREFIX: Final = "SEAMARK_"
FILE_VARIABLE: Final = "SEAMARK_SETTINGS"


class Secret:
    """A value that does not show itself in logs, errors or dumps; whoever needs it says `reveal()`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "'***'"

    def reveal(self) -> str:
        """The secret itself."""
        return self._value


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of every role. The variable of a field is `SEAMARK_` and its name in capitals."""

    nats_url: str = "nats://127.0.0.1:4222"
    """The broker; several servers are separated by commas."""
    nats_user: str | None = None
    """User of this role in the broker's accounts (`nats/accounts.conf`)."""
    nats_password: Secret | None = None
    """Password of `nats_user`."""
    nats_credentials: str | None = None
    """Path of a credentials file, instead of user and password."""
    nats_inbox_prefix: str | None = None
    """Prefix of reply subjects; unset: `_INBOX_<user>` where there is a user (as `nats/accounts.conf` has it), else `_INBOX`."""
    nats_monitor_urls: tuple[str, ...] = ()
    """Monitoring addresses of all NATS servers, separated by commas: only they tell whether a server syncs to disk."""
    redis_url: Secret = field(default_factory=lambda: Secret("redis://127.0.0.1:6379/0"))
    """Redis or Valkey, for claims and unread counts; it must run `noeviction`."""
    postgres_url: Secret | None = None
    """PostgreSQL, for API keys. Without it `POST /v1/events` is not served."""
    profile: Profile = "production"
    """`dev` serves the inbox page and accepts what `production` refuses to run with."""
    partitions: int | None = None
    """Number of partitions this process expects; a topology made for another number is refused. Unset: as made."""
    jwt_secret: Secret | None = None
    """Shared secret of users' tokens (HS256), for development. Exactly one of this and `jwks_url`."""
    jwks_url: str | None = None
    """Address of the key set that signs users' tokens."""
    jwt_issuer: str | None = None
    """`iss` that tokens must carry; unset: not checked."""
    jwt_audience: str | None = None
    """`aud` that tokens must carry; unset: not checked."""
    origins: tuple[str, ...] = ()
    """Web origins that may open sessions, exactly as browsers send them, separated by commas."""
    gateway_host: str = "127.0.0.1"
    """Address the gateway listens on."""
    gateway_port: int = 8080
    """Port of the gateway, shared by its processes; 0: chosen by the system."""
    handshakes_per_minute: int = 0
    """Handshakes one address may make in a minute; 0: no bound (behind a proxy all addresses are the proxy's)."""
    health_host: str = "127.0.0.1"
    """Address of each process's own health and metrics port."""
    health_port: int = 0
    """Port of `/healthz`, `/readyz` and `/metrics`; 0: chosen by the system and logged. N gateway processes take N in a row."""
    log_format: LogFormat = "json"
    """`json` for machines, `console` for people."""
    dev_api_key: Secret | None = None
    """API key the inbox page of the `dev` profile publishes with."""

    def nats(self, name: str) -> NatsSettings:
        """How this process connects to the broker, as `name` in the server's list of connections."""
        return NatsSettings(
            self.nats_url,
            user=self.nats_user,
            password=self.nats_password.reveal() if self.nats_password else None,
            credentials_file=self.nats_credentials,
            name=name,
            inbox_prefix=self.nats_inbox_prefix or (f"_INBOX_{self.nats_user}" if self.nats_user else "_INBOX"),
        )


def load_settings(env: Mapping[str, str] | None = None, file: Path | None = None) -> Settings:
    """The settings in force.

    Args:
        env: environment; by default the process's.
        file: TOML file with the fields' names as keys; by default the one `SEAMARK_SETTINGS` names, if any.

    Raises:
        InvalidSetting: names the variable (or key) and the remedy.
    """
    return Settings(**{name: _convert(name, value) for name, value in _values(env, file).items()})


def given_settings(env: Mapping[str, str] | None = None, file: Path | None = None) -> frozenset[str]:
    """The names of the settings that somebody gave, in whatever way; the others are at their defaults.

    Raises:
        InvalidSetting: as `load_settings`.
    """
    return frozenset(name for name, value in _values(env, file).items() if value != "")


def _values(env: Mapping[str, str] | None, file: Path | None) -> dict[str, Any]:
    env = os.environ if env is None else env
    path = file or (Path(env[FILE_VARIABLE]) if env.get(FILE_VARIABLE) else None)
    values = _from_file(path) if path else {}
    for entry in fields(Settings):
        text = _from_environment(env, PREFIX + entry.name.upper())
        if text is not None:
            values[entry.name] = text
    return values


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidSetting(f"{FILE_VARIABLE}: {path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidSetting(f"{FILE_VARIABLE}: {path} is not TOML: {error}") from error
    known = {entry.name for entry in fields(Settings)}
    if unknown := sorted(values.keys() - known):
        raise InvalidSetting(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return values


def _from_environment(env: Mapping[str, str], variable: str) -> str | None:
    """The variable's value, or the content of the file that `<variable>_FILE` names."""
    path = env.get(f"{variable}_FILE")
    if path is None:
        return env.get(variable)
    if variable in env:
        raise InvalidSetting(f"{variable} and {variable}_FILE are both set: unset one of them")
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise InvalidSetting(f"{variable}_FILE: {path} cannot be read: {error.strerror}") from error


_TYPES: Final = {entry.name: str(entry.type) for entry in fields(Settings)}
_CHOICES: Final = {"profile": get_args(Profile), "log_format": get_args(LogFormat)}


def _convert(name: str, value: Any) -> Any:
    kind, variable = _TYPES[name], PREFIX + name.upper()
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise InvalidSetting(f"{variable} must be one of {', '.join(_CHOICES[name])}, not {value!r}")
        return value
    try:
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidSetting(f"{variable} must be a number, not {value!r}") from error
    if kind.startswith("tuple"):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(part.strip() for part in parts if part.strip())
    if not isinstance(value, str):
        raise InvalidSetting(f"{variable} must be a string, not a {type(value).__name__}")
    return Secret(value) if kind.startswith("Secret") else value
