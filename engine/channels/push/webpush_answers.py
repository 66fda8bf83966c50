"""What the answers of push services (RFC 8030) mean.

There is no common list of codes: each service has its own way to say what is wrong, and from most only the status is certain.
"""

from __future__ import annotations

from typing import Final

import msgspec

from engine.channels.channel import Outcome
from engine.channels.push.answers import UNREADABLE, judged
from engine.channels.verdicts import Table, Verdict

_GONE: Final = Verdict("target_invalid")
_OURS: Final = Verdict("config", scope="target", alarm=True)
"""Our key, or that of one subscription: whoever subscribes with a key of his own, and registers that here, is answered the same,
and must not stop the pushes of others by it."""

_AGAIN: Final = Verdict("transient", retry_after_seconds=30.0)

WEBPUSH: Final = Table(
    version="2026-11-29",
    codes={
        "UnauthorizedRegistration": _OURS,  # FCM, with 400
        "vapid": _OURS,  # any service that speaks of VAPID in its answer to a 400
        "BadJwtToken": _OURS,  # Apple, with 403
        "errno_201": _AGAIN,  # Mozilla, with 503: back off
        "errno_202": Verdict("transient", retry_after_seconds=0.0),  # Mozilla, with 503: at once will do
    },
    statuses={
        # One endpoint or all of them? A status cannot say; see `Refusals`.
        401: Verdict("config", scope="domain"),
        403: Verdict("config", scope="domain"),
        404: _GONE,  # RFC 8030, 7.3: the subscription has expired
        410: _GONE,
        429: Verdict("throttled", scope="domain", retry_after_seconds=60.0),
    },
    classes={2: Verdict("ok"), 4: Verdict("permanent"), 5: _AGAIN},
    guesses={3: Verdict("permanent")},
)
"""RFC 8030, 5 and 7; RFC 8292, 4; https://mozilla-services.github.io/autopush-rs/errors.html for `errno`."""


class _Body(msgspec.Struct):
    reason: str = ""
    errno: int = 0


_decoder: Final = msgspec.json.Decoder(_Body)


def webpush_outcome(provider: str, status: int, body: bytes, *, retry_after_seconds: float | None = None) -> Outcome:
    """What an answer of a push service has come to, before `Refusals` has its say.

    Args:
        provider: its name in the configuration.
        body: JSON or text, or nothing.
    """
    return judged(WEBPUSH, provider, status, _code(status, body), retry_after_seconds=retry_after_seconds)


def _code(status: int, body: bytes) -> str:
    """The code of ours that the body stands for. Texts of services change: nothing but these words is looked for."""
    if status < 400:
        return ""
    text = body.decode("utf-8", "replace")
    if status == 400:
        if "UnauthorizedRegistration" in text:
            return "UnauthorizedRegistration"
        return "vapid" if "vapid" in text.lower() else ""
    try:
        said = _decoder.decode(body)
    except UNREADABLE:
        return ""
    code = said.reason or f"errno_{said.errno}"
    return code if code in WEBPUSH.codes else ""


class _Origin:
    """What one push service has said to one key of ours.

    Attributes:
        accepts: how many requests it has taken.
        refused: by endpoint, how many it had taken when it first refused this one.
        refused_since_accept: the endpoints it has refused since it last took one.
    """

    __slots__ = ("accepts", "refused", "refused_since_accept")

    def __init__(self) -> None:
        self.accepts = 0
        self.refused: dict[bytes, int] = {}
        self.refused_since_accept: set[bytes] = set()


class Refusals:
    """Tells a dead subscription from a wrong key, which both are answered by 401 or 403.

    Apple refuses dead subscriptions so, and everybody a key that is not the one of the subscription. Retiring all subscriptions
    over a key that was set wrongly cannot be undone: only the browsers can subscribe again. So

    - an endpoint that is refused again, after the same service has taken something of ours meanwhile, is invalid: others pass;
    - three endpoints refused in a row, with nothing taken between them: the key is wrong;
    - before either is known, it is tried again after a minute.
    """

    IN_A_ROW: Final = 3
    ENDPOINTS_MAX: Final = 10_000
    """Remembered of each service, 100 bytes each. The one refused longest ago is forgotten: it is then judged anew."""
    ORIGINS_MAX: Final = 256

    def __init__(self) -> None:
        self._origins: dict[str, _Origin] = {}

    def accepted(self, origin: str, endpoint: bytes) -> None:
        """The service has taken a request to this endpoint."""
        found = self._origin(origin)
        found.accepts += 1
        found.refused.pop(endpoint, None)
        found.refused_since_accept.clear()

    def judged(self, outcome: Outcome, origin: str, endpoint: bytes) -> Outcome:
        """What a refusal of this endpoint has come to.

        Args:
            outcome: as the table has it.
            endpoint: a hash of it.
        """
        found = self._origin(origin)
        before = found.refused.get(endpoint)
        if before is None:
            while len(found.refused) >= self.ENDPOINTS_MAX:
                del found.refused[next(iter(found.refused))]
            found.refused[endpoint] = found.accepts
        elif found.accepts > before:
            del found.refused[endpoint]
            return msgspec.structs.replace(outcome, kind="target_invalid", scope="message", retry_after_seconds=None)
        if len(found.refused_since_accept) < self.IN_A_ROW:
            found.refused_since_accept.add(endpoint)
        if len(found.refused_since_accept) >= self.IN_A_ROW:
            return outcome
        return msgspec.structs.replace(outcome, kind="transient", scope="target", retry_after_seconds=60.0)

    def _origin(self, origin: str) -> _Origin:
        found = self._origins.get(origin)
        if found is None:
            while len(self._origins) >= self.ORIGINS_MAX:
                del self._origins[next(iter(self._origins))]
            found = self._origins[origin] = _Origin()
        return found
