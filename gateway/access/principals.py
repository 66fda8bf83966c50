"""Who makes a request. A token speaks for one user; an API key for a service, or for whoever operates this Seamark."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Scope(StrEnum):
    """What the key of a service may allow."""

    EVENTS_WRITE = "events:write"
    """To publish events."""

    SESSIONS_READ = "sessions:read"
    """To see which devices of the tenant's users are connected."""

    SESSIONS_WRITE = "sessions:write"
    """To end sessions of the tenant's users, and to sign users out."""

    BROADCASTS_WRITE = "broadcasts:write"
    """To show a message to all of the tenant's users who are connected."""

    NOTIFICATIONS_READ = "notifications:read"
    """To see what became of the notifications of the tenant's users."""

    CONFIG_READ = "config:read"
    """To see the tenant's notification types, templates and defaults."""

    CONFIG_WRITE = "config:write"
    """To change them."""

    SUPPRESSIONS_READ = "suppressions:read"
    """To see which addresses get nothing, and why."""

    SUPPRESSIONS_WRITE = "suppressions:write"
    """To suppress addresses, and to lift that."""

    WEBHOOKS_READ = "webhooks:read"
    """To see webhook endpoints, without their secrets."""

    WEBHOOKS_WRITE = "webhooks:write"
    """To make, change and delete webhook endpoints."""

    DEAD_LETTERS_READ = "dead_letters:read"
    """To see what could not be delivered, what people were to be told included."""

    DEAD_LETTERS_WRITE = "dead_letters:write"
    """To have it tried again, and to drop it."""

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
    """A user, who may see and change what is theirs.

    Attributes:
        expires_at, issued_at: of the token, in Unix seconds; `issued_at` is 0 where the token does not say it.
    """

    tenant: str
    user: str
    expires_at: float
    issued_at: float = 0.0


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
