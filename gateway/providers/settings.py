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

import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec

from engine.channels.files import read_secret
from engine.errors import InvalidSetting
from gateway.providers.certificates import Certificates
from gateway.providers.sources import FromPostmark, FromSendGrid, FromSes, FromSnsTexts, FromTwilio, Source

VARIABLE: Final = "SEAMARK_PROVIDERS"

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


def read_sources(setting: str | None, certificates: Certificates) -> dict[str, Source]:
    """Whom reports are taken from, by name; nobody, where the setting names no file.

    Args:
        setting: the file's path.
        certificates: of those who sign with them.

    Raises:
        InvalidSetting: the file, or one that its table `callbacks` names, cannot be read, or says something that is not
            understood. What is in a secret is not repeated.
    """
    if setting is None:
        return {}
    path = Path(setting)
    try:
        table = tomllib.loads(path.read_text()).get("callbacks", {})
        entries = msgspec.convert(table, dict[_Name, Entry])
    except OSError as error:
        raise InvalidSetting(f"{VARIABLE}: {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"{VARIABLE}: {path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise InvalidSetting(f"{path}: [callbacks]: {error}") from error
    return {name: _source(name, entry, path.parent, certificates) for name, entry in entries.items()}


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
