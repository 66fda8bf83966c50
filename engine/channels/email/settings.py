"""Who sends mails, and in whose name: the part `email` of the providers' file.

    [email.providers.own]
    kind = "smtp"
    host = "smtp.example.com"
    username = "seamark"
    password_file = "smtp.password"

    [email.providers.spare]
    kind = "postmark"
    key_file = "postmark.token"

    [email.senders.default]
    address = "news@example.com"
    name = "Example"
    layout_files = { default = "layout.html", de = "layout.de.html" }

    [email.domains."gmail.com"]
    per_second = 20
    at_once = 10

Providers are asked in the order of the file. Secrets are files of their own, named from where the providers' file is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from engine.channels.aws import Credentials
from engine.channels.email.channel import EmailChannel, Sender
from engine.channels.email.provider import MailProvider
from engine.channels.email.services import Postmark, SendGrid, Ses
from engine.channels.email.smtp import MailRelay, SmtpProvider
from engine.channels.exchange import open_http
from engine.channels.files import Entry, read_secret, read_text, read_trust
from engine.channels.templates import TemplateFailed, check
from engine.directory.templates import LOCALE
from engine.errors import InvalidSetting
from engine.limits import TEMPLATE_BYTES_MAX
from engine.settings import Secret

REQUESTS_MAX: Final = 50
"""To one service at once from one process: what takes 200 ms then goes out 250 times a second, which is beyond any account's
rate."""

_Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[^/\s]+$(?!\n)")]
_PORTS: Final = {"starttls": 587, "implicit": 465, "none": 25}


class SmtpSettings(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="smtp"):
    """A mail relay. `port`: 0: the usual one for `tls`. `hello`: our name, as EHLO says it."""

    host: Annotated[str, msgspec.Meta(min_length=1)]
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    tls: Literal["starttls", "implicit", "none"] = "starttls"
    username: str = ""
    password_file: str = ""
    hello: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9.:\[\]-]+$(?!\n)")] = "localhost"


class SesSettings(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ses"):
    """Amazon SES. `url`: where it is; "": Amazon's in the region."""

    region: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{4,32}$(?!\n)")]
    key_id: str
    secret_file: str
    configuration_set: str = ""
    url: _Url | Literal[""] = ""


class SendGridSettings(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sendgrid"):
    """SendGrid."""

    key_file: str
    url: _Url = "https://api.sendgrid.com"


class PostmarkSettings(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="postmark"):
    """A server of Postmark. `stream`: which of its message streams."""

    key_file: str
    stream: str = "outbound"
    url: _Url = "https://api.postmarkapp.com"


class SenderSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As `Sender`, its layouts in files, by locale."""

    address: str
    name: str = ""
    reply_to: str = ""
    envelope_from: str = ""
    layout_files: dict[Annotated[str, msgspec.Meta(pattern=LOCALE)], str] = {}


ProviderSettings = SmtpSettings | SesSettings | SendGridSettings | PostmarkSettings


class DomainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many mails a domain of recipients gets from each provider.

    Args:
        per_second, burst: as those of a provider, from all workers together. 0: as much as the provider takes.
        at_once: mails that are under way to it, from one worker process. 0: as many as there are.
    """

    per_second: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    burst: Annotated[int, msgspec.Meta(ge=1)] = 1
    at_once: Annotated[int, msgspec.Meta(ge=0)] = 0


DEFAULT_DOMAIN: Final = "default"
"""Stands for every domain that is not named."""

_Domain = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]+(\.[a-z0-9-]+)*$(?!\n)")]


class EmailSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `email`. `senders`: by tenant, and `default` for all others. `domains`: of recipients, and `default` likewise."""

    providers: dict[str, ProviderSettings]
    senders: dict[str, SenderSettings]
    domains: dict[_Domain, DomainSettings] = {}


def email_settings(table: Mapping[str, object]) -> EmailSettings:
    """The table `email`.

    Raises:
        InvalidSetting: names the member and the remedy.
    """
    try:
        found = msgspec.convert(table, EmailSettings)
    except msgspec.ValidationError as error:
        raise InvalidSetting(f"email: {error}") from error
    if not found.providers or not found.senders:
        missing = "senders" if found.providers else "providers"
        raise InvalidSetting(
            f"email.{missing}: there are none; write [email.{missing}.<name>], or leave out all of [email]"
        )
    return found


def email_channels(settings: EmailSettings, folder: Path) -> dict[str, EmailChannel]:
    """A channel for each provider, by their names, in the order of the file. They belong to the event loop that runs.

    Args:
        folder: where the providers' file is.

    Raises:
        InvalidSetting: a file cannot be read, or holds something else. What is in it is not repeated.
    """
    senders = {tenant: _sender(tenant, entry, folder) for tenant, entry in settings.senders.items()}
    return {name: EmailChannel(_provider(name, entry, folder), senders) for name, entry in settings.providers.items()}


def _sender(tenant: str, entry: SenderSettings, folder: Path) -> Sender:
    where, layouts = f"email.senders.{tenant}", {}
    for locale, file in entry.layout_files.items():
        field = f"{where}.layout_files.{locale}"
        text = read_text(field, folder / file)
        if len(text.encode()) > TEMPLATE_BYTES_MAX:
            raise InvalidSetting(f"{field}: a layout may have {TEMPLATE_BYTES_MAX} bytes")
        try:
            check(text)
        except TemplateFailed as error:
            raise InvalidSetting(f"{field}: {error}") from error
        if "content" not in text:
            raise InvalidSetting(f"{field} shows no content: write {{{{ content }}}} where a mail's own part stands")
        layouts[locale] = text
    try:
        return Sender(
            address=entry.address,
            name=entry.name,
            reply_to=entry.reply_to,
            envelope_from=entry.envelope_from,
            layouts=layouts,
        )
    except ValueError as error:
        raise InvalidSetting(f"{where}: {error}") from error


def _provider(name: str, entry: ProviderSettings, folder: Path) -> MailProvider:
    where = f"email.providers.{name}"
    tls = read_trust(f"{where}.authority_file", folder, entry.authority_file)

    def secret(field: str) -> Secret:
        return Secret(read_secret(f"{where}.{field}", folder / getattr(entry, field)))

    match entry:
        case SmtpSettings():
            return SmtpProvider(_relay(name, entry, secret("password_file") if entry.password_file else None), tls)
        case SesSettings():
            credentials = Credentials(key_id=entry.key_id, secret=secret("secret_file").reveal())
            return Ses(
                name,
                open_http(connections_max=REQUESTS_MAX, tls=tls),
                region=entry.region,
                credentials=credentials,
                configuration_set=entry.configuration_set,
                url=entry.url,
            )
        case SendGridSettings():
            key = secret("key_file")
            return SendGrid(name, open_http(connections_max=REQUESTS_MAX, tls=tls), key=key, url=entry.url)
        case PostmarkSettings():
            key = secret("key_file")
            http = open_http(connections_max=REQUESTS_MAX, tls=tls)
            return Postmark(name, http, key=key, stream=entry.stream, url=entry.url)


def _relay(name: str, entry: SmtpSettings, password: Secret | None) -> MailRelay:
    try:
        return MailRelay(
            name=name,
            host=entry.host,
            port=entry.port or _PORTS[entry.tls],
            tls=entry.tls,
            username=entry.username,
            password=password,
            hello=entry.hello,
        )
    except ValueError as error:
        raise InvalidSetting(f"email.providers.{name}: {error}") from error
