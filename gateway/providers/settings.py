"""From whom reports are taken: the table `callbacks` of the providers' file, of which a gateway reads nothing else.

    [callbacks.ses]
    kind = "ses"
    topic = "arn:aws:sns:eu-central-1:123456789012:mail-reports"

    [callbacks.twilio]
    kind = "twilio"
    url = "https://notify.example.com/v1/providers/twilio/callbacks"
    token_files = ["twilio.token"]
    tenants = ["default"]

An entry is called as its provider is elsewhere in the file. What it holds proves whose a request is, and sends nothing: a gateway
needs none of the secrets that workers send with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec

from engine.channels.files import ProvidersToml, read_secret, watch
from engine.errors import InvalidSetting
from engine.tasks import end
from gateway.providers.certificates import Certificates
from gateway.providers.sources import FromPostmark, FromSendGrid, FromSes, FromSnsTexts, FromTwilio, Source

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$(?!\n)")]
_Topic = Annotated[
    str, msgspec.Meta(pattern=r"^arn:aws[a-z-]*:sns:[a-z0-9-]{4,32}:[0-9]{12}:[A-Za-z0-9_-]{1,256}$(?!\n)")
]
_Files = Annotated[list[str], msgspec.Meta(min_length=1, max_length=4)]
_Tenants = Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1, max_length=1000)]


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all kinds have: their kind."""


class SesEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ses"):
    """Amazon SES. `topic`: of Amazon SNS, to which a configuration set publishes what becomes of mails."""

    topic: _Topic


class SendGridEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sendgrid"):
    """SendGrid. `key_files`: verification keys of its Signed Event Webhook, two while one is replaced."""

    key_files: _Files


class PostmarkEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="postmark"):
    """Postmark. `password_files`: of `user`, as the addresses of its webhooks have them, two while one is replaced."""

    user: Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[!-9;-~]+$(?!\n)")] = "postmark"
    password_files: _Files


class TwilioEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="twilio"):
    """Twilio.

    Args:
        url: of this endpoint as Twilio is given it, since that is what it signs.
        token_files: auth tokens of the account, two while one is replaced.
        tenants: whose texts STOP ends: all that send by this account.
    """

    url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s?#]+$(?!\n)")]
    token_files: _Files
    tenants: _Tenants


class SnsEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sns"):
    """Texts by Amazon. `topic`: to which answers of people are published. `tenants`: as of Twilio."""

    topic: _Topic
    tenants: _Tenants


Entry = SesEntry | SendGridEntry | PostmarkEntry | TwilioEntry | SnsEntry


class Sources:
    """Whom reports are taken from; nobody, where the setting names no file.

    Args:
        setting: the file's path.
        certificates: of those who sign with them.

    Raises:
        InvalidSetting: the file, or one that its table `callbacks` names, cannot be read, or says something that is not
            understood. What is in a secret is not repeated.
    """

    def __init__(self, setting: str | None, certificates: Certificates) -> None:
        self._path, self._certificates = Path(setting or ""), certificates
        self._now: dict[str, Source] = {}
        self._changed = None if setting is None else self._read()
        self._watching: asyncio.Task[None] | None = None

    def of(self, name: str) -> Source | None:
        """Who posts under a name; None: nobody."""
        return self._now.get(name)

    def start(self) -> None:
        """Read the table anew when it, or a file that it names, changes. What cannot be read is said, and changes nothing."""
        if self._changed is not None:
            self._watching = asyncio.create_task(watch(self._changed, self._read), name="callbacks-watch")

    async def close(self) -> None:
        """Look no more."""
        await end(self._watching)

    def _read(self) -> Callable[[], bool]:
        toml = ProvidersToml(self._path, "callbacks")
        try:
            entries = msgspec.convert(toml.tables.get("callbacks", {}), dict[_Name, Entry])
        except msgspec.ValidationError as error:
            raise InvalidSetting(f"{self._path}: [callbacks]: {error}") from error
        folder = self._path.parent
        self._now = {name: _source(name, entry, folder, self._certificates) for name, entry in entries.items()}
        return toml.changed


def _source(name: str, entry: Entry, folder: Path, certificates: Certificates) -> Source:
    match entry:
        case SesEntry():
            return FromSes(name, entry.topic, certificates)
        case SnsEntry():
            return FromSnsTexts(entry.topic, certificates, tuple(entry.tenants))
        case SendGridEntry():
            return FromSendGrid(name, _secrets(name, "key_files", entry.key_files, folder))
        case PostmarkEntry():
            passwords = _secrets(name, "password_files", entry.password_files, folder)
            return FromPostmark(name, [(entry.user, password) for password in passwords])
        case TwilioEntry():
            tokens = _secrets(name, "token_files", entry.token_files, folder)
            return FromTwilio(name, entry.url, tokens, tuple(entry.tenants))


def _secrets(name: str, field: str, files: list[str], folder: Path) -> list[str]:
    return [read_secret(f"callbacks.{name}.{field}", folder / file) for file in files]
