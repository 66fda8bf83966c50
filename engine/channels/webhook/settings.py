"""What an operator says of webhooks: the part `webhook` of the providers' file. All of it may be left out.

    [webhook]
    authority_file = "authority.pem"

    [webhook.hosts]
    "receiver.example.com" = "127.0.0.1:8443"

A name of `hosts` leads to that one server, on whatever network it is: the only way past what keeps webhooks out of private
networks, so a tenant who can name endpoints can reach that server, and no other port beside it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec

from engine.channels.files import read_trust
from engine.channels.webhook.channel import WebhookChannel
from engine.channels.webhook.guard import Server
from engine.directory.webhook_urls import check_url
from engine.errors import InvalidSetting

_SERVER: Final = re.compile(r"(?P<address>[0-9.]+|\[[0-9A-Fa-f:]+\]):(?P<port>[0-9]{1,5})", re.ASCII)


class WebhookSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `webhook`.

    Args:
        authority_file: whom to trust, in PEM, in place of the system's authorities: of a development stack.
        hosts: names in lower case, and the server that each leads to, as `address:port`.
    """

    authority_file: str = ""
    hosts: dict[Annotated[str, msgspec.Meta(min_length=1)], str] = {}


def webhook_settings(table: Mapping[str, object]) -> WebhookSettings:
    """The table `webhook`.

    Raises:
        InvalidSetting: names the member and the remedy.
    """
    try:
        return msgspec.convert(table, WebhookSettings)
    except msgspec.ValidationError as error:
        raise InvalidSetting(f"webhook: {error}") from error


def webhook_channel(settings: WebhookSettings, folder: Path) -> WebhookChannel:
    """The channel. It belongs to the event loop that runs.

    Args:
        folder: where the providers' file is.

    Raises:
        InvalidSetting: a file cannot be read or holds something else, or no endpoint can have such a name.
    """
    hosts = {name: _server(name, server) for name, server in settings.hosts.items()}
    tls = read_trust("webhook.authority_file", folder, settings.authority_file)
    return WebhookChannel(hosts=hosts, tls=tls)


def _server(name: str, text: str) -> Server:
    where = f"webhook.hosts.{name}"
    try:
        check_url(f"https://{name}/")
    except ValueError as error:
        raise InvalidSetting(f"{where}: no endpoint can have this name: {error}") from error
    found = _SERVER.fullmatch(text)
    try:
        if name != name.lower() or found is None or not 1 <= int(found["port"]) <= 65_535:
            raise ValueError
        return str(ipaddress.ip_address(found["address"].strip("[]"))), int(found["port"])
    except ValueError as error:
        raise InvalidSetting(
            f"{where}: write a name in lower case, and where it leads as <address>:<port>, such as 127.0.0.1:8443"
        ) from error
