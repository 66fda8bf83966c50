"""Which push providers there are: the part `push` of the providers' file, and the senders that come of it.

    [push.apple]
    kind = "apns"
    key_file = "AuthKey_ABC1234567.p8"
    key_id = "ABC1234567"
    team_id = "DEF1234567"
    apps = ["com.example.shop"]

    [push.google]
    kind = "fcm"
    account_file = "service-account.json"

    [push.browsers]
    kind = "webpush"
    key_file = "vapid.pem"
    subject = "mailto:ops@example.com"

Secrets are files of their own, named from where the providers' file is. Tenants may have apps of their own: a token goes to the
first entry of its platform that names its app, or names none.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import msgspec

from engine.channels.push.apns import SERVERS, ApnsSender
from engine.channels.push.apns_pool import ApnsPool
from engine.channels.push.channel import Sender
from engine.channels.push.fcm import SERVER, FcmSender
from engine.channels.push.oauth import service_account
from engine.channels.push.signing import ApnsToken, VapidTokens, es256_key
from engine.channels.push.webpush import HOSTS, WebPushSender
from engine.directory.push_tokens import Environment
from engine.errors import InvalidSetting

_TEN: Final = r"^[A-Z0-9]{10}$(?!\n)"
_ADDRESS: Final = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::(?P<port>[0-9]{1,5}))?", re.ASCII)


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all kinds have.

    Args:
        apps: bundle ids, packages or sites it is for; none: all that nobody else is for.
        authority_file: whom to trust, in PEM, in place of the system's authorities: for simulators and proxies.
        per_second, burst: what the provider's contract allows all workers together; see `engine.jobs.bucket.Limit`. 0: unknown.
    """

    apps: tuple[str, ...] = ()
    authority_file: str = ""
    per_second: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    burst: Annotated[int, msgspec.Meta(ge=1)] = 1


class ApnsSettings(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="apns"):
    """A key for APNs. `production`, `sandbox`: where each is, as `host` or `host:port`."""

    key_file: str
    key_id: Annotated[str, msgspec.Meta(pattern=_TEN)]
    team_id: Annotated[str, msgspec.Meta(pattern=_TEN)]
    production: str = SERVERS["production"]
    sandbox: str = SERVERS["sandbox"]


class FcmSettings(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fcm"):
    """A project of Firebase. `server`: where FCM is, without a slash at the end."""

    account_file: str
    server: Annotated[str, msgspec.Meta(pattern=r"^https?://[^/]+$(?!\n)")] = SERVER


class WebPushSettings(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="webpush"):
    """A VAPID key. `subject`: where push services find us. `hosts`: of push services, in place of those of the known browsers."""

    key_file: str
    subject: Annotated[str, msgspec.Meta(pattern=r"^(mailto:[^@\s]+@[^@\s]+|https://\S+)$(?!\n)")]
    hosts: tuple[str, ...] = HOSTS


PushSettings = ApnsSettings | FcmSettings | WebPushSettings


def push_settings(table: Mapping[str, object]) -> dict[str, PushSettings]:
    """The entries of the table `push`, by their names.

    Raises:
        InvalidSetting: names the entry, the field and the remedy.
    """
    found = {}
    for name, entry in table.items():
        try:
            found[name] = msgspec.convert(entry, PushSettings)
        except msgspec.ValidationError as error:
            raise InvalidSetting(f"push.{name}: {error}") from error
    return found


def push_senders(settings: Mapping[str, PushSettings], folder: Path) -> list[Sender]:
    """The senders, in the order of the file, but those that name their apps before those that serve all.

    Args:
        folder: where the providers' file is.

    Raises:
        InvalidSetting: a file cannot be read, or holds something else. What is in it is not repeated.
    """
    order = sorted(settings, key=lambda name: not settings[name].apps)
    return [_sender(name, settings[name], partial(_read, folder, name, settings[name])) for name in order]


def _sender(name: str, entry: PushSettings, read: Callable[[str], str]) -> Sender:
    apps = frozenset(entry.apps)
    tls = None
    if entry.authority_file:
        try:
            tls = ssl.create_default_context(cadata=read("authority_file"))
        except ssl.SSLError as error:
            raise InvalidSetting(f"push.{name}.authority_file holds no certificates in PEM") from error
    match entry:
        case ApnsSettings():
            key = es256_key(f"push.{name}.key_file", read("key_file"))
            places: dict[Environment, str] = {"production": entry.production, "sandbox": entry.sandbox}
            pools = {
                place: ApnsPool(*_address(f"push.{name}.{place}", address), tls) for place, address in places.items()
            }
            return ApnsSender(name, ApnsToken(key, entry.key_id, entry.team_id), apps, pools)
        case FcmSettings():
            account = service_account(f"push.{name}.account_file", read("account_file"))
            return FcmSender(name, account, apps, server=entry.server, tls=tls)
        case WebPushSettings():
            key = es256_key(f"push.{name}.key_file", read("key_file"))
            return WebPushSender(name, VapidTokens(key, entry.subject), apps, hosts=entry.hosts, tls=tls)


def _read(folder: Path, name: str, entry: PushSettings, field: str) -> str:
    path = folder / str(getattr(entry, field))
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidSetting(f"push.{name}.{field}: {path} cannot be read: {why}") from error


def _address(setting: str, text: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"] or 443) if found else 0
    if found is None or not 1 <= port <= 65_535:
        raise InvalidSetting(f"{setting} must be <host> or <host>:<port>, not {text!r}")
    return found["host"].strip("[]"), port
