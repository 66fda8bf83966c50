"""The faults that the outbox page switches on, in each provider's own words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Final, Literal, get_args

from ops.dev.providers.faults import Answers, Fault, Hangs, Late, Resets

FaultName = Literal["throttled", "unavailable", "hang", "reset", "late", "gone"]
NAMES: Final[tuple[FaultName, ...]] = get_args(FaultName)

RETRY_AFTER_SECONDS: Final = 5
LATE_SECONDS: Final = 3.0
"""Long enough to be seen, and well below any deadline of a worker."""

_WAIT: Final = {"Retry-After": str(RETRY_AFTER_SECONDS)}

_ALIKE: Final[Mapping[str, Fault]] = {"hang": Hangs(), "reset": Resets(), "late": Late(seconds=LATE_SECONDS)}


def _apns_gone() -> Answers:
    """Apple says since when the device is none: a token that is registered after that is good."""
    since = int(time.time() * 1000)
    return Answers(status=410, body=json.dumps({"reason": "Unregistered", "timestamp": since}))


_OWN: Final[Mapping[str, Mapping[str, Callable[[], Answers]]]] = {
    "apns": {
        "throttled": lambda: Answers(status=429, code="TooManyRequests", headers=_WAIT),
        "unavailable": lambda: Answers(status=503, code="ServiceUnavailable"),
        "gone": _apns_gone,
    },
    "fcm": {
        "throttled": lambda: Answers(status=429, code="QUOTA_EXCEEDED", headers=_WAIT),
        "unavailable": lambda: Answers(status=503, code="UNAVAILABLE"),
        "gone": lambda: Answers(status=404, code="UNREGISTERED"),
    },
    "webpush": {
        "throttled": lambda: Answers(status=429, headers=_WAIT),
        "unavailable": lambda: Answers(status=503),
        "gone": lambda: Answers(status=410),
    },
    "sendgrid": {
        "throttled": lambda: Answers(status=429, headers=_WAIT),
        "unavailable": lambda: Answers(status=503),
        "gone": lambda: Answers(
            status=400, code="personalizations.0.to.0.email", text="Does not contain a valid address."
        ),
    },
    "smtp": {
        "throttled": lambda: Answers(
            status=454,
            text=f"Throttling failure: Maximum sending rate exceeded, retry in {RETRY_AFTER_SECONDS} seconds",
        ),
        "unavailable": lambda: Answers(status=451, text="4.3.2 Service is not available, come back later"),
        "gone": lambda: Answers(status=550, text="5.1.1 The email account that you tried to reach does not exist"),
    },
    "twilio": {
        "throttled": lambda: Answers(status=429, code="20429", headers=_WAIT),
        "unavailable": lambda: Answers(status=503),
        "gone": lambda: Answers(status=400, code="21614"),
    },
    "sns": {
        "throttled": lambda: Answers(status=429, code="Throttling", headers=_WAIT),
        "unavailable": lambda: Answers(status=503, code="InternalError"),
        "gone": lambda: Answers(status=400, code="EndpointDisabled"),
    },
    "webhook": {
        "throttled": lambda: Answers(status=429, headers=_WAIT),
        "unavailable": lambda: Answers(status=503),
        "gone": lambda: Answers(status=410),
    },
}


def fault_of(kind: str, name: FaultName) -> Fault:
    """How a fault looks at a provider of this kind (`apns`, `fcm`, `webpush`, `sendgrid`, `smtp`, `twilio`, `sns`, `webhook`)."""
    return _ALIKE.get(name) or _OWN[kind][name]()
