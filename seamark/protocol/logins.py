"""Who somebody is to the broker: by what its addresses and settings say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def credentials_in(urls: str) -> tuple[str | None, str | None]:
    """User and password of the first address that has both, else None for each; as they stand, which is how nats-py sends them.

    Without a password an address names nobody: nats-py takes what stands there for a token.

    Args:
        urls: servers separated by commas.
    """
    for url in urls.split(","):
        try:
            parts = urlsplit(url.strip() if "://" in url else f"nats://{url.strip()}")
        except ValueError:
            continue  # whoever connects there says what is wrong with it
        if parts.username and parts.password is not None:
            return parts.username, parts.password
    return None, None


def login_of(urls: str, user: str | None, password: str | None, credentials_file: str | None) -> dict[str, Any]:
    """What nats-py is told apart from the addresses, even where they say it: servers that the first one tells of come without."""
    if not user:
        user, password = credentials_in(urls)
    login = {"user": user, "password": password, "user_credentials": credentials_file}
    return {name: value for name, value in login.items() if value}


def secret_of(login: Mapping[str, Any]) -> bytes | None:
    """The secret that only those with this login know; None: it has none."""
    if "user_credentials" in login:
        return Path(login["user_credentials"]).read_bytes()
    password = login.get("password")
    return password.encode() if password else None


def inbox_prefix_of(urls: str, user: str | None = None) -> str:
    """The prefix under which `nats/accounts.conf` lets a user read replies: `_INBOX_<user>`, and `_INBOX` for nobody.

    Args:
        urls: servers separated by commas; the user may stand in an address.
        user: the user, where it is given apart.
    """
    named = user or credentials_in(urls)[0]
    return f"_INBOX_{named}" if named else "_INBOX"


def shown(urls: str) -> str:
    """`urls` without what stands before an @: passwords do not belong into errors."""
    return ",".join(part.split("@")[-1] for part in urls.split(","))
