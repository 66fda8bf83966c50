"""What the answers of APNs mean."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from engine.channels.channel import Outcome
from engine.channels.push.answers import UNREADABLE, judged
from engine.channels.verdicts import Table, Verdict

_BUG: Final = Verdict("permanent")
_SETUP: Final = Verdict("config", scope="key")

_TOPIC: Final = Verdict("config", scope="target", alarm=True)
"""The topic is the app that a token was registered with: whoever registers one must not stop the pushes of others by its name."""

APNS: Final = Table(
    version="2026-11-29",
    codes={
        # Malformed, or of the other environment, which is tried before this is believed; see ApnsSender.
        "BadDeviceToken": Verdict("target_invalid"),
        # Tokens are stored with their app, which is the topic: the same device under another app is another token.
        "DeviceTokenNotForTopic": Verdict("target_invalid"),
        "MissingDeviceToken": _BUG,
        "BadCollapseId": _BUG,
        "BadExpirationDate": _BUG,
        "BadMessageId": _BUG,
        "BadPriority": _BUG,
        "InvalidPushType": _BUG,
        "DuplicateHeaders": _BUG,
        "PayloadEmpty": _BUG,
        "BadTopic": _TOPIC,
        "MissingTopic": _TOPIC,
        "TopicDisallowed": _TOPIC,
        "IdleTimeout": Verdict("transient", retry_after_seconds=0.0),
        # A token was too old: renewed where that is allowed, and then `transient`; see ApnsSender.
        "ExpiredProviderToken": _SETUP,
        "InvalidProviderToken": _SETUP,
        "MissingProviderToken": _SETUP,
        "BadCertificate": _SETUP,
        "BadCertificateEnvironment": _SETUP,
        "Forbidden": _SETUP,
        "BadPath": _BUG,
        "MethodNotAllowed": _BUG,
        "Unregistered": Verdict("target_invalid"),
        "ExpiredToken": Verdict("target_invalid"),
        "PayloadTooLarge": _BUG,
        # Of one device only; the next push to it takes the place of this one where both have one collapse id.
        "TooManyRequests": Verdict("throttled", scope="target", retry_after_seconds=60.0),
        "TooManyProviderTokenUpdates": Verdict("throttled", scope="key", retry_after_seconds=60.0),
        "InternalServerError": Verdict("transient"),
        "ServiceUnavailable": Verdict("transient"),
        "Shutdown": Verdict("transient"),
    },
    statuses={429: Verdict("throttled", scope="target", retry_after_seconds=60.0)},
    classes={2: Verdict("ok"), 5: Verdict("transient")},
    guesses={3: _BUG, 4: _BUG},
)
"""https://developer.apple.com/documentation/usernotifications/handling-notification-responses-from-apns"""


class _Body(msgspec.Struct):
    reason: str = ""
    timestamp: Any = None


_decoder: Final = msgspec.json.Decoder(_Body)


def apns_outcome(provider: str, status: int, body: bytes, apns_id: str, retry_after_seconds: float | None) -> Outcome:
    """What an answer of APNs has come to.

    Args:
        provider: its name in the configuration.
        body: JSON with `reason`, and with 410 the `timestamp` since when the token is none; it may be missing.
    """
    try:
        said = _decoder.decode(body)
    except UNREADABLE:
        said = _Body()
    outcome = judged(APNS, provider, status, said.reason, retry_after_seconds=retry_after_seconds)
    since = _since(said.timestamp) if outcome.kind == "target_invalid" else None
    return msgspec.structs.replace(
        outcome, provider_id=apns_id if outcome.kind == "ok" else "", target_invalid_at=since
    )


def _since(milliseconds: object) -> datetime | None:
    """A time in milliseconds since 1970; None where it is none, or beyond the year 2109."""
    if not isinstance(milliseconds, int) or isinstance(milliseconds, bool) or not 0 < milliseconds < 1 << 42:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
