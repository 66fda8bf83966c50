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
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec

from engine.channels.files import Entry, read_text, read_trust
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


class _Entry(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all kinds have. `apps`: bundle ids, packages or sites it is for; none: all that nobody else is for."""

    apps: tuple[str, ...] = ()


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
    return [_sender(name, settings[name], folder) for name in order]


def _sender(name: str, entry: PushSettings, folder: Path) -> Sender:
    def read(field: str) -> str:
        return read_text(f"push.{name}.{field}", folder / str(getattr(entry, field)))

    apps = frozenset(entry.apps)
    tls = read_trust(f"push.{name}.authority_file", folder, entry.authority_file)
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


def _address(setting: str, text: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"] or 443) if found else 0
    if found is None or not 1 <= port <= 65_535:
        raise InvalidSetting(f"{setting} must be <host> or <host>:<port>, not {text!r}")
    return found["host"].strip("[]"), port
