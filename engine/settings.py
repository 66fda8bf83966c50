"""Settings: one frozen object, from environment variables, `*_FILE` secrets and an optional TOML file.

Precedence: environment, then file, then default; what is empty is not set. A secret is best given as a file
(`SEAMARK_JWT_SECRET_FILE`): its content shows neither in a process list nor in an environment dump.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from engine.broker.settings import NatsSettings
from engine.errors import InvalidSetting
from engine.topology.files import PARTITIONS_MAX
from seamark.protocol.logins import inbox_prefix_of

Profile = Literal["dev", "production"]
LogFormat = Literal["json", "console"]

PREFIX: Final = "SEAMARK_"
FILE_VARIABLE: Final = "SEAMARK_SETTINGS"
PORT_MAX: Final = 65_535


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

    nats_url: Secret = field(default_factory=lambda: Secret("nats://127.0.0.1:4222"))
    """The broker; several servers are separated by commas. A secret, as user and password may stand in it."""
    nats_user: str | None = None
    """User of this role in the broker's accounts (`nats/accounts.conf`)."""
    nats_password: Secret | None = None
    """Password of `nats_user`."""
    nats_credentials: str | None = None
    """Path of a credentials file, instead of user and password."""
    nats_inbox_prefix: str | None = None
    """Prefix of reply subjects; unset: as `inbox_prefix_of` says."""
    nats_monitor_urls: tuple[str, ...] = ()
    """Monitoring addresses of all NATS servers, separated by commas: only they tell whether a server syncs
    to disk, and to a role that writes nothing whether it can write."""
    redis_url: Secret = field(default_factory=lambda: Secret("redis://127.0.0.1:6379/0"))
    """Redis or Valkey, for claims, unread counts, profiles, limits and idempotency keys; it must run `noeviction`."""
    postgres_url: Secret | None = None
    """PostgreSQL. Without it no API key is known, there are no tables, and planners, pagers and workers do not start."""
    profile: Profile = "production"
    """`dev` serves the page and accepts what `production` refuses to run with."""
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
    unsubscribe_secrets: Secret | None = None
    """Secrets of the links in mails by which people unsubscribe, and of the references by which reports find their notification,
    separated by blanks: the first makes them, all are good. One that is taken away ends what it has made."""
    storage_keys: Secret | None = None
    """Keys that secrets of webhooks are sealed by in PostgreSQL, separated by blanks, each of 32 bytes in base64: the first one
    seals, all open. Unset: they are stored as they are."""
    providers: str | None = None
    """Path of the file that says who sends pushes, mails, texts and webhooks, and whose reports are taken. Workers need it."""
    public_url: str | None = None
    """Where people reach the gateway, as `https://notify.example.com`: links in mails lead there. Unset: mails have none."""
    origins: tuple[str, ...] = ()
    """Web origins that may open sessions, exactly as browsers send them, separated by commas."""
    gateway_host: str = "127.0.0.1"
    """Address the gateway listens on."""
    gateway_port: int = 8080
    """Port of the gateway, shared by its processes; 0: chosen by the system."""
    handshakes_per_minute: int = 0
    """Handshakes one address may make in a minute; 0: no bound (behind a proxy that is not trusted all have its address)."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks of proxies whose `X-Forwarded-For` is believed, separated by commas."""
    tenant_state_percent: int = 25
    """How much of each log the users of one tenant may fill with read and archive records."""
    health_host: str = "127.0.0.1"
    """Address of the health and metrics port."""
    health_port: int = 0
    """Port of `/healthz`, `/readyz` and `/metrics`; 0: chosen by the system and logged. Where one command has N processes it
    answers for all of them, and they have the N ports behind it."""
    log_format: LogFormat = "json"
    """`json` for machines, `console` for people."""
    traces_endpoint: str | None = None
    """OpenTelemetry collector that gets spans: `http://host:4318` or `https://…` (OTLP over HTTP), `grpc://host:4317` or `grpcs://…`
    (over gRPC). Unset: no spans are made. Headers, certificates and compression are the exporter's own `OTEL_EXPORTER_OTLP_*`."""
    trace_one_in: int = 100
    """Of so many events that no publisher has decided about, one is followed; 1: all."""
    trace_follow_seconds: int = 300
    """What is older than this begins a trace of its own, with a link to its origin."""
    trace_url: str | None = None
    """Where a trace can be looked at, with `{trace_id}` in it: `https://traces.example.com/trace/{trace_id}`."""
    dev_api_key: Secret | None = None
    """API key of the page of the `dev` profile."""
    dev_outbox_url: str | None = None
    """Where the outbox page of `seamark dev` is; the page of the `dev` profile has a link to it."""

    def nats(self, name: str) -> NatsSettings:
        """How this process connects to the broker, as `name` in the server's list of connections."""
        return NatsSettings(
            self.nats_url.reveal(),
            user=self.nats_user,
            password=self.nats_password.reveal() if self.nats_password else None,
            credentials_file=self.nats_credentials,
            name=name,
            inbox_prefix=self.nats_inbox_prefix or inbox_prefix_of(self.nats_url.reveal(), self.nats_user),
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
    return frozenset(_values(env, file))


def given_variables(env: Mapping[str, str] | None = None, file: Path | None = None) -> dict[str, str]:
    """What somebody gave, in whatever way, as variables that hold the values themselves: for a process of ours.

    Raises:
        InvalidSetting: as `load_settings`.
    """
    return {variable_of(name): _text(value) for name, value in _values(env, file).items()}


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def cannot_listen(role: Literal["gateway", "health"], host: str, port: int, error: OSError) -> InvalidSetting:
    """What to raise where an address of `SEAMARK_<ROLE>_HOST` and `_PORT` cannot be had."""
    host_variable, port_variable = variable_of(f"{role}_host"), variable_of(f"{role}_port")
    why = error.strerror or str(error)
    return InvalidSetting(
        f"{host_variable}, {port_variable}: cannot listen on port {port} of {host} ({why}):"
        " end what listens there, or choose another"
    )


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _values(env: Mapping[str, str] | None, file: Path | None) -> dict[str, Any]:
    env = os.environ if env is None else env
    path = file or (Path(env[FILE_VARIABLE]) if env.get(FILE_VARIABLE) else None)
    # Empty is not set: that is how a compose file or a chart leaves a variable out.
    values = {name: value for name, value in _from_file(path).items() if value != ""} if path else {}
    for entry in fields(Settings):
        if text := _from_environment(env, variable_of(entry.name)):
            values[entry.name] = text
    return values


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidSetting(f"{FILE_VARIABLE}: {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{FILE_VARIABLE}: {path} is not TOML: {error}") from error
    known = {entry.name for entry in fields(Settings)}
    if unknown := sorted(values.keys() - known):
        raise InvalidSetting(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return values


def _from_environment(env: Mapping[str, str], variable: str) -> str | None:
    """The variable's value, or the content of the file that `<variable>_FILE` names."""
    path = env.get(f"{variable}_FILE")
    if not path:
        return env.get(variable)
    if env.get(variable):
        raise InvalidSetting(f"{variable} and {variable}_FILE are both set: unset one of them")
    try:
        text = Path(path).read_text().strip()
    except OSError as error:
        raise InvalidSetting(f"{variable}_FILE: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidSetting(
            f"{variable}_FILE: {path} is not text in UTF-8: write the value into it as text"
        ) from error
    if not text:
        # Who names a file means what is in it: a secret that was never written must not become a default.
        raise InvalidSetting(f"{variable}_FILE: {path} is empty: write the value into it, or unset the variable")
    return text


_TYPES: Final = {entry.name: str(entry.type) for entry in fields(Settings)}
_CHOICES: Final = {"profile": get_args(Profile), "log_format": get_args(LogFormat)}
_SCHEMES: Final = {
    "redis_url": ("redis://", "rediss://", "unix://"),
    "postgres_url": ("postgresql://", "postgres://"),
    "traces_endpoint": ("http://", "https://", "grpc://", "grpcs://"),
    "trace_url": ("http://", "https://"),
    "dev_outbox_url": ("http://", "https://"),
    "public_url": ("http://", "https://"),
}
_RANGES: Final = {
    "partitions": (1, PARTITIONS_MAX),
    "gateway_port": (0, PORT_MAX),
    "health_port": (0, PORT_MAX),
    "handshakes_per_minute": (0, 1_000_000_000),
    "tenant_state_percent": (1, 100),
    "trace_one_in": (1, 1_000_000_000),
    "trace_follow_seconds": (1, 86_400),
}


def _convert(name: str, value: Any) -> Any:
    kind, variable = _TYPES[name], variable_of(name)
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise InvalidSetting(f"{variable} must be one of {', '.join(_CHOICES[name])}, not {value!r}")
        return value
    if kind.startswith("int"):
        return _number(variable, value, *_RANGES[name])
    if kind.startswith("tuple"):
        return _list(variable, value)
    if not isinstance(value, str):
        raise InvalidSetting(f"{variable} must be a string, not a {type(value).__name__}")
    _check_scheme(name, variable, value)
    return Secret(value) if kind.startswith("Secret") else value


def _check_scheme(name: str, variable: str, value: str) -> None:
    """What a driver would refuse only once a role has begun to work. The value is not repeated: it may hold a password."""
    schemes = _SCHEMES.get(name)
    if schemes and not value.startswith(schemes):
        raise InvalidSetting(f"{variable} must begin with {' or '.join(schemes)}")
    if name == "trace_url" and "{trace_id}" not in value:
        raise InvalidSetting(f"{variable} must hold {{trace_id}}, where the id of the trace goes")
    if name in ("postgres_url", "redis_url") and not all(map(_has_port_or_none, _hosts(value))):
        # Drivers repeat what they take for the port: behind a / in the password it is a piece of that.
        raise InvalidSetting(
            f"{variable} is not an address: write %XX for what is special in the password, %2F for a /"
        )


def _hosts(url: str) -> list[str]:
    return url.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2].split(",")


def _has_port_or_none(host: str) -> bool:
    port = host.rpartition("]")[2].partition(":")[2]
    return not port or port.isdecimal()


def _number(variable: str, value: Any, lowest: int, highest: int) -> int:
    # A file can say `true`, which is a number to Python, and 80.5, which would be cut.
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidSetting(f"{variable} must be a whole number, not {value!r}")
    try:
        number = int(value)
    except ValueError as error:
        raise InvalidSetting(f"{variable} must be a whole number, not {value!r}") from error
    if not lowest <= number <= highest:
        raise InvalidSetting(f"{variable} must be {lowest} to {highest}, not {number}")
    return number


def _list(variable: str, value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise InvalidSetting(f"{variable} must be a list of strings, or one string with commas between them")
    return tuple(part.strip() for part in parts if part.strip())
