"""Push tokens: where the apps and browsers of a user are reached. A token belongs to one user at a time.

An app that somebody else signs in to registers the token that it has. The token moves with it, so that nobody reads what is meant
for the user before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

from engine.directory.changing import ProfileChange
from engine.directory.users import ensure_user
from engine.limits import PUSH_TOKEN_BYTES_MAX, PUSH_TOKENS_PER_USER
from engine.postgres import Connection
from seamark.protocol.errors import SeamarkError
from seamark.protocol.limits import EVENT_ID_BYTES_MAX

Platform = Literal["apns", "fcm", "webpush"]
Environment = Literal["production", "sandbox"]

TokenId = Annotated[str, msgspec.Meta(min_length=1, max_length=EVENT_ID_BYTES_MAX, pattern=r"^[!-~]+$(?!\n)")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[!-~]+$(?!\n)")]

_APNS_HEX_MAX: Final = 200
"""Apple says 100 bytes at most, and that nobody should count on it."""

_COLUMNS: Final = "token_id AS id, platform, environment, app, device, registered_at, retired_at, reason"

_ALL: Final = f"SELECT {_COLUMNS} FROM push_tokens WHERE tenant = $1 AND user_id = $2 ORDER BY token_id"

# One statement waits for another that registers the same token: only the second of them sees whose it is.
_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended($1 || '/' || encode($2::bytea, 'hex'), 0))"

_OWNER: Final = "SELECT user_id, token_id FROM push_tokens WHERE tenant = $1 AND token_hash = $2"

_STORE: Final = f"""
INSERT INTO push_tokens (tenant, user_id, token_id, platform, environment, app, device, token, keys, token_hash)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
ON CONFLICT (tenant, user_id, token_id) DO UPDATE SET platform = excluded.platform, environment = excluded.environment,
    app = excluded.app, device = excluded.device, token = excluded.token, keys = excluded.keys,
    token_hash = excluded.token_hash, registered_at = now(), retired_at = NULL, reason = NULL
RETURNING {_COLUMNS}
"""

# Retired ones first, then those registered longest ago: an app registers its token each time it starts.
_CROWDED_OUT: Final = """
DELETE FROM push_tokens WHERE tenant = $1 AND user_id = $2 AND token_id IN (
    SELECT token_id FROM push_tokens WHERE tenant = $1 AND user_id = $2 AND token_id <> $3
    ORDER BY retired_at IS NOT NULL, registered_at DESC, token_id OFFSET $4
)
"""

_RETIRE: Final = """
UPDATE push_tokens SET retired_at = now(), reason = $4
WHERE tenant = $1 AND user_id = $2 AND token_hash = $3 AND retired_at IS NULL AND ($5::timestamptz IS NULL OR registered_at < $5)
"""

_MOVE: Final = """
UPDATE push_tokens SET environment = $4
WHERE tenant = $1 AND user_id = $2 AND token_hash = $3 AND retired_at IS NULL AND environment <> $4
"""


class WebPushKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of a browser's subscription, in base64url as `PushSubscription.toJSON()` gives them."""

    p256dh: str
    auth: str


class NewToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token as an app or browser has got it.

    Args:
        token: of APNs in hexadecimal; of FCM as it is; of a browser the `endpoint` of its subscription.
        app: which app it is of: the bundle id or package; of a browser the name of the site.
        keys: of a browser's subscription.
        environment: of APNs: a token of one is none in the other.
        device: the name that the same device has as a follower of the log.
    """

    platform: Platform
    token: str
    app: Name
    environment: Environment = "production"
    device: Name | None = None
    keys: WebPushKeys | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where the token is none of its platform, without repeating it."""
        if not self.token.isascii() or not self.token.isprintable() or not 1 <= len(self.token) <= PUSH_TOKEN_BYTES_MAX:
            raise ValueError(f"`token` must have 1 to {PUSH_TOKEN_BYTES_MAX} printable ASCII characters")
        if (self.platform == "webpush") != (self.keys is not None):
            raise ValueError(
                "`keys` are needed for webpush, and for nothing else: send those of the browser's subscription"
            )
        if self.platform == "apns" and not _is_hex(self.token):
            raise ValueError("`token` of apns is written in hexadecimal digits, two for each byte")
        if self.platform == "webpush":
            if not self.token.startswith("https://") or " " in self.token:
                raise ValueError("`token` of webpush is the `endpoint` of the subscription, which begins with https://")
            assert self.keys is not None
            _check_key("p256dh", self.keys.p256dh, 65)
            _check_key("auth", self.keys.auth, 16)

    @property
    def hash(self) -> bytes:
        """What tells whether two tokens are the same one."""
        return token_hash(self.platform, self.app, self.token)


class StoredToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token as its user sees it. The token itself is not told again: whoever has it can send to the device."""

    id: str
    platform: Platform
    environment: Environment
    app: str
    device: str | None
    registered_at: datetime
    retired_at: datetime | None
    reason: str | None


class HeldElsewhere(SeamarkError):
    """Another user has this token, whom the transaction does not hold.

    Attributes:
        user: who has it.
    """

    def __init__(self, user: str) -> None:
        super().__init__("another user has this token")
        self.user = user


def token_hash(platform: str, app: str, token: str) -> bytes:
    """What tells whether two tokens are the same one; upper and lower case hexadecimal are."""
    text = token.lower() if platform == "apns" else token
    return hashlib.sha256(f"{platform}\n{app}\n{text}".encode()).digest()


async def tokens_of(connection: Connection, tenant: str, user: str) -> list[StoredToken]:
    """All tokens of a user, by their ids."""
    return [StoredToken(**dict(row)) for row in await connection.fetch(_ALL, tenant, user)]


async def owner_of(connection: Connection, tenant: str, hash: bytes) -> str | None:
    """Who has this token."""
    owner: str | None = await connection.fetchval(_OWNER, tenant, hash)
    return owner


async def register_token(change: ProfileChange, user: str, id: str, new: NewToken) -> StoredToken:
    """Let the user have this token under this id, and nobody else. Beyond the bound his oldest one goes.

    A user who is in no directory gets a row there.

    Raises:
        HeldElsewhere: hold that user, too, and call again. UserDeleted: he was deleted, and nobody has made him anew.
    """
    tenant, hash = change.tenant, new.hash
    await ensure_user(change, user)
    await change.connection.execute(_LOCK, tenant, hash)
    row = await change.connection.fetchrow(_OWNER, tenant, hash)
    if row is not None and (row["user_id"], row["token_id"]) != (user, id):
        if not change.holds(row["user_id"]):
            raise HeldElsewhere(row["user_id"])
        await remove_token(change, row["user_id"], row["token_id"])
    keys = None if new.keys is None else msgspec.json.encode(new.keys).decode()
    args = new.platform, new.environment, new.app, new.device, new.token, keys, hash
    stored = await change.connection.fetchrow(_STORE, tenant, user, id, *args)
    assert stored is not None, "an upsert returns its row"
    await change.connection.execute(_CROWDED_OUT, tenant, user, id, PUSH_TOKENS_PER_USER - 1)
    change.touch(user)
    return StoredToken(**dict(stored))


async def remove_token(change: ProfileChange, user: str, id: str) -> bool:
    """Delete a token of the user; whether there was one of this id."""
    statement = "DELETE FROM push_tokens WHERE tenant = $1 AND user_id = $2 AND token_id = $3"
    gone = await change.connection.execute(statement, change.tenant, user, id) != "DELETE 0"
    if gone:
        change.touch(user)
    return gone


async def retire_token(
    change: ProfileChange, user: str, hash: bytes, reason: str, invalid_since: datetime | None = None
) -> bool:
    """Send nothing to a token any more that its provider calls invalid; whether it was in use.

    Args:
        invalid_since: when the provider lost the device. A token that was registered again since then is good.
    """
    args = change.tenant, user, hash, reason, invalid_since
    retired = await change.connection.execute(_RETIRE, *args) != "UPDATE 0"
    if retired:
        change.touch(user)
    return retired


async def move_token(change: ProfileChange, user: str, hash: bytes, environment: Environment) -> bool:
    """Store where a token was found to be one, as its app named the wrong environment; whether that was new.

    Nothing that a profile says changes: a device is reached as before.
    """
    return await change.connection.execute(_MOVE, change.tenant, user, hash, environment) != "UPDATE 0"


def _is_hex(text: str) -> bool:
    return len(text) <= _APNS_HEX_MAX and len(text) % 2 == 0 and all(one in "0123456789abcdefABCDEF" for one in text)


def _check_key(name: str, text: str, count: int) -> None:
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"`keys.{name}` is not in base64url") from error
    if len(key) != count:
        raise ValueError(f"`keys.{name}` must have {count} bytes, not {len(key)}")
