"""Who makes a request. A token speaks for one user; an API key for a service, or for whoever operates this Seamark."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Scope(StrEnum):
    """What the key of a service may allow."""

    EVENTS_WRITE = "events:write"
    """To publish events."""

    BROADCASTS_WRITE = "broadcasts:write"
    """To show a message to all of the tenant's users who are connected."""

    NOTIFICATIONS_READ = "notifications:read"
    """To see what became of the notifications of the tenant's users."""

    USERS_READ = "users:read"
    """To see the users of the directory: addresses, attributes."""

    USERS_WRITE = "users:write"
    """To make, change and delete users, also by naming a recipient with what is known of him."""

    DEVICES_READ = "devices:read"
    """To see where users get pushes; never the tokens themselves."""

    DEVICES_WRITE = "devices:write"
    """To register and remove push tokens of users."""

    TOPICS_READ = "topics:read"
    """To see topics and their members."""

    TOPICS_WRITE = "topics:write"
    """To make and delete topics, and to change who is in them."""

    CAMPAIGNS_READ = "campaigns:read"
    """To see campaigns and how far they have come."""

    CAMPAIGNS_WRITE = "campaigns:write"
    """To send to whole audiences, to hold campaigns up and to end them."""


class User(msgspec.Struct, frozen=True):
    """A user, who may see and change what is theirs. `expires_at`: when the token ends, in Unix seconds."""

    tenant: str
    user: str
    expires_at: float


class Service(msgspec.Struct, frozen=True):
    """A service, which may do for its tenant what its scopes allow. `expires_at`: when its key ends, in Unix seconds."""

    tenant: str
    scopes: frozenset[str]
    expires_at: float | None = None


class Operator(msgspec.Struct, frozen=True):
    """Whoever operates this Seamark, for all tenants; `expires_at` as of a `Service`. `key`: number of the API key."""

    expires_at: float | None = None
    key: int | None = None


Principal = User | Service | Operator
