"""Who sends texts: the part `sms` of the providers' file.

    [sms]
    segments_max = 6

    [sms.providers.first]
    kind = "twilio"
    account = "AC0123456789abcdef0123456789abcdef"
    secret_file = "twilio.secret"
    sender = "+15005550006"
    per_second = 50

    [sms.providers.spare]
    kind = "sns"
    region = "eu-central-1"
    key_id = "AKIAIOSFODNN7EXAMPLE"
    secret_file = "sns.secret"

Providers are asked in the order of the file. Secrets are files of their own, named from where the providers' file is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from engine.channels.aws import Credentials
from engine.channels.exchange import open_http
from engine.channels.files import Entry, read_secret, read_trust
from engine.channels.sms.channel import SEGMENTS_MAX, SmsChannel, SmsOptions, SmsProvider
from engine.channels.sms.sns import Sns, SnsSettings
from engine.channels.sms.twilio import URL, Twilio, TwilioSettings
from engine.errors import InvalidSetting

REQUESTS_MAX: Final = 50
"""To one provider at once from one process: beyond any account's rate where a request takes 200 ms."""

_Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[^/\s]+$(?!\n)")]
_Sender = Annotated[str, msgspec.Meta(pattern=r"^(\+[1-9][0-9]{6,14}|MG[0-9a-f]{32}|[A-Za-z0-9 ]{1,11})$(?!\n)")]


class TwilioEntry(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="twilio"):
    """An account of Twilio. `user`: the SID of an API key, if `secret_file` holds the secret of one."""

    account: Annotated[str, msgspec.Meta(pattern=r"^AC[0-9a-zA-Z]{1,64}$(?!\n)")]
    secret_file: str
    sender: _Sender
    user: str = ""
    status_url: str = ""
    url: _Url = URL


class SnsEntry(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sns"):
    """A key of AWS that may publish to phone numbers. `type`: what the texts are, which decides their route and price."""

    region: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{4,32}$(?!\n)")]
    key_id: str
    secret_file: str
    sender: _Sender | Literal[""] = ""
    type: Literal["Transactional", "Promotional"] = "Transactional"
    price_usd_max: Annotated[str, msgspec.Meta(pattern=r"^([0-9]+(\.[0-9]+)?)?$(?!\n)")] = ""
    url: _Url | Literal[""] = ""


SmsEntry = TwilioEntry | SnsEntry


class SmsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `sms`. `segments_max`, `smart_encoding`: as `SmsOptions` has them."""

    providers: dict[str, SmsEntry]
    segments_max: Annotated[int, msgspec.Meta(ge=1, le=20)] = SEGMENTS_MAX
    smart_encoding: bool = True


def sms_settings(table: Mapping[str, object]) -> SmsSettings:
    """The table `sms`.

    Raises:
        InvalidSetting: names the member and the remedy.
    """
    try:
        found = msgspec.convert(table, SmsSettings)
    except msgspec.ValidationError as error:
        raise InvalidSetting(f"sms: {error}") from error
    if not found.providers:
        raise InvalidSetting("sms.providers: there are none; write [sms.providers.<name>], or leave out all of [sms]")
    return found


def sms_channels(settings: SmsSettings, folder: Path) -> dict[str, SmsChannel]:
    """A channel for each provider, by their names, in the order of the file. They belong to the event loop that runs.

    Args:
        folder: where the providers' file is.

    Raises:
        InvalidSetting: a file cannot be read, or holds something else. What is in it is not repeated.
    """
    options = SmsOptions(segments_max=settings.segments_max, smart_encoding=settings.smart_encoding)
    return {name: SmsChannel(_provider(name, entry, folder), options) for name, entry in settings.providers.items()}


def _provider(name: str, entry: SmsEntry, folder: Path) -> SmsProvider:
    where = f"sms.providers.{name}"
    secret = read_secret(f"{where}.secret_file", folder / entry.secret_file)
    tls = read_trust(f"{where}.authority_file", folder, entry.authority_file)
    http = open_http(connections_max=REQUESTS_MAX, tls=tls)
    if isinstance(entry, TwilioEntry):
        account = TwilioSettings(
            name=name,
            account=entry.account,
            user=entry.user,
            secret=secret,
            sender=entry.sender,
            status_url=entry.status_url,
            url=entry.url,
        )
        return Twilio(account, http)
    key = SnsSettings(
        name=name,
        region=entry.region,
        credentials=Credentials(key_id=entry.key_id, secret=secret),
        sender=entry.sender,
        type=entry.type,
        price_usd_max=entry.price_usd_max,
        url=entry.url,
    )
    return Sns(key, http)
