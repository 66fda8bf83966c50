"""What a decision needs to know of a user, in one small document without an address in it."""

from __future__ import annotations

from datetime import datetime

import msgspec

from engine.plan.preferences import Preferences
from engine.plan.rules import Channel

OPTED_OUT = "opted_out"
"""Reason of a suppression that the law asks for: the recipient said stop, by whatever way. Nothing goes through it."""

COMPLAINT = "complaint"
"""Reason of a suppression of somebody who has called a mail spam."""

SCOPE_ALL = "all"


class Suppression(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a channel's address of this user gets nothing.

    Args:
        scope: `all`, or the category it is about.
        expires_at: from then on it does not count; none: until somebody takes it back.
    """

    channel: Channel
    reason: str
    scope: str = SCOPE_ALL
    expires_at: datetime | None = None

    def holds(self, channel: str, category: str | None, now: datetime) -> bool:
        """Whether it forbids `channel` for a notification of `category`."""
        return (
            self.channel == channel
            and self.scope in {SCOPE_ALL, category}
            and (self.expires_at is None or now < self.expires_at)
        )


class Profile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user as decisions see him. One who is in no directory has the empty profile, and is reached in the app.

    Args:
        version: counts the changes of the user; 0: nothing is stored of him.
        locale, timezone: as the directory has them; what the preferences say wins.
        reach: channels with an address, a live token or an endpoint.
        suppressions: of the user's addresses.
        deleted: this is a tombstone: work that comes late ends as `user_deleted`.
    """

    version: int = 0
    locale: str | None = None
    timezone: str | None = None
    preferences: Preferences = Preferences()
    reach: tuple[Channel, ...] = ()
    suppressions: tuple[Suppression, ...] = ()
    deleted: bool = False
