"""How to reach the broker. Apart from the connection: commands name a broker long before they load what talks to it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NatsSettings:
    """Where the broker is and who we are to it.

    `inbox_prefix` keeps one role's replies unreadable for others (`nats/accounts.conf`). `url` may name several servers,
    separated by commas.
    """

    url: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    credentials_file: str | None = None
    name: str = "seamark"
    inbox_prefix: str = "_INBOX"
