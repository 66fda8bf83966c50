"""What the answers of FCM (HTTP v1) mean.

Whether a token is none is read from what FCM says in fields, and never from a status alone: a wrong project answers 404, a
switched off API 403, and whoever took these for dead tokens has deleted all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from engine.channels.channel import Outcome, Scope
from engine.channels.push.answers import UNREADABLE, judged
from engine.channels.verdicts import Table, Verdict

FCM: Final = Table(
    version="2026-11-29",
    codes={
        "INVALID_TOKEN": Verdict("target_invalid"),
        "INVALID_ARGUMENT": Verdict("permanent"),
        "UNREGISTERED": Verdict("target_invalid"),
        "SENDER_ID_MISMATCH": Verdict("target_invalid"),
        # The project lacks the key of Apple or of the Web for this one token. Whoever registers a token chooses what it is for.
        "THIRD_PARTY_AUTH_ERROR": Verdict("config", scope="target", alarm=True),
        "APNS_AUTH_ERROR": Verdict("config", scope="target", alarm=True),
        # A full minute's quota is gone; it fills again with the next minute.
        "QUOTA_EXCEEDED": Verdict("throttled", scope="key", retry_after_seconds=60.0),
        "INTERNAL": Verdict("transient", retry_after_seconds=10.0),
        "UNAVAILABLE": Verdict("transient", retry_after_seconds=10.0),
        "UNSPECIFIED_ERROR": Verdict("transient", retries_max=3, retry_after_seconds=10.0),
    },
    statuses={
        401: Verdict("config", scope="key"),  # the access token; it is asked for anew once, see FcmSender
        403: Verdict("config", scope="key"),  # the API is not switched on, or the account may not use it
        404: Verdict("config", scope="key"),  # there is no such project
        429: Verdict("throttled", scope="key", retry_after_seconds=60.0),
    },
    classes={2: Verdict("ok"), 5: Verdict("transient", retry_after_seconds=10.0)},
    guesses={3: Verdict("permanent"), 4: Verdict("permanent")},
)
"""https://firebase.google.com/docs/reference/fcm/rest/v1/ErrorCode, and ".../docs/cloud-messaging/scale-fcm" for the waits:
at least 10 s before a retry.

INVALID_TOKEN is a name of ours: FCM says INVALID_ARGUMENT, and beside it that the argument is the token.
"""

_NOT_A_TOKEN: Final = "not a valid FCM registration token"
_TOKEN_FIELD: Final = "message.token"

_QUOTAS: Final[Sequence[tuple[str, Scope]]] = (("device", "target"), ("topic", "message"))


class _Detail(msgspec.Struct, rename="camel"):
    kind: str = msgspec.field(default="", name="@type")
    error_code: str = ""
    field_violations: list[dict[str, Any]] = []
    violations: list[dict[str, Any]] = []


class _Error(msgspec.Struct):
    message: str = ""
    status: str = ""
    details: list[_Detail] = []


class _Reply(msgspec.Struct):
    name: str = ""
    error: _Error = msgspec.field(default_factory=_Error)


_decoder: Final = msgspec.json.Decoder(_Reply)


def fcm_outcome(
    provider: str, status: int, body: bytes, *, cut_off: bool = False, retry_after_seconds: float | None = None
) -> Outcome:
    """What an answer of FCM has come to.

    Args:
        provider: its name in the configuration.
        body: JSON: the name of the message, or what is wrong.
        cut_off: it is not whole. Of a refusal it is then not known what it was for, and it is asked again.
        retry_after_seconds: what the header says.
    """
    try:
        reply = _decoder.decode(body)
    except UNREADABLE:
        if cut_off and status >= 300:
            return Outcome(kind="transient", provider=provider, code=f"{status}/cut_off", retry_after_seconds=10.0)
        reply = _Reply()
    code = _code(reply.error)
    outcome = judged(FCM, provider, status, code, retry_after_seconds=retry_after_seconds)
    if outcome.kind == "ok":
        return msgspec.structs.replace(outcome, provider_id=reply.name[:200])
    if outcome.kind == "throttled":
        return msgspec.structs.replace(outcome, scope=_throttled(reply.error))
    return outcome


def _code(error: _Error) -> str:
    """FCM's own code. Google's general status, such as NOT_FOUND, says less than the status of HTTP, and is none."""
    code = next((one.error_code for one in error.details if one.error_code and one.kind.endswith("FcmError")), "")
    if code == "INVALID_ARGUMENT":
        fields = [one.get("field") for detail in error.details for one in detail.field_violations]
        if set(fields) == {_TOKEN_FIELD} or (not fields and _NOT_A_TOKEN in error.message):
            return "INVALID_TOKEN"
    return code


def _throttled(error: _Error) -> Scope:
    """Which quota is used up: QuotaFailure says so, in words. By default the project's."""
    said = " ".join(
        str(one.get(name, "")).lower()
        for detail in error.details
        for one in detail.violations
        for name in ("subject", "description")
    )
    return next((scope for word, scope in _QUOTAS if word in said), "key")
