"""What the answers of mail services mean. They accept a mail; what becomes of it, they report later.

A 500 says that something went wrong, not what was done before. So it is not tried elsewhere at once, and what a gateway in
between says (502, 504) is as good as no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engine.channels.verdicts import Table, Verdict

_OK: Final = Verdict("ok")
_CREDENTIALS: Final = Verdict("config", scope="key")
_NO_ADDRESS: Final = Verdict("target_invalid")
_THROTTLED: Final = Verdict("throttled", scope="key")
_USED_UP: Final = Verdict("throttled", scope="key", retry_after_seconds=3600.0)
"""A quota of the day or month: it is pointless to ask every second."""

_NEVER: Final = Verdict("permanent")
_LATER: Final = Verdict("transient")
_AWAY: Final = Verdict("transient", elsewhere=True)
_UNKNOWN_END: Final = Verdict("ambiguous")

_STATUSES: Final[Mapping[int, Verdict]] = {
    401: _CREDENTIALS,
    403: _CREDENTIALS,
    404: _CREDENTIALS,  # of the path: its address is wrong
    408: _LATER,
    413: _NEVER,
    429: _THROTTLED,
    500: _LATER,
    502: _UNKNOWN_END,
    503: _AWAY,
    504: _UNKNOWN_END,
}

SES: Final = Table(
    version="2026-11-29",
    codes={
        "AccessDenied": _CREDENTIALS,
        "AccountSuspended": _CREDENTIALS,
        "BadRequest": _NEVER,
        "BadRequest/To": _NO_ADDRESS,
        "ExpiredToken": _CREDENTIALS,
        "IncompleteSignature": _CREDENTIALS,
        "InternalFailure": _LATER,
        "InternalServiceError": _LATER,
        "InvalidClientTokenId": _CREDENTIALS,
        "InvalidSignature": _CREDENTIALS,
        "LimitExceeded": _USED_UP,
        "MailFromDomainNotVerified": _CREDENTIALS,
        "MessageRejected": _NEVER,
        "MessageRejected/NotVerified": _CREDENTIALS,
        "MissingAuthenticationToken": _CREDENTIALS,
        "NotFound": _CREDENTIALS,  # a configuration set that there is not
        "RequestExpired": _CREDENTIALS,  # our clock is wrong
        "SendingPaused": _CREDENTIALS,
        "ServiceUnavailable": _AWAY,
        "SignatureDoesNotMatch": _CREDENTIALS,
        "Throttling": _THROTTLED,
        "TooManyRequests": _THROTTLED,
        "TooManyRequests/Quota": _USED_UP,
        "UnrecognizedClient": _CREDENTIALS,
    },
    statuses=_STATUSES,
    classes={2: _OK, 5: _LATER},
    guesses={4: _NEVER},
)
"""https://docs.aws.amazon.com/ses/latest/APIReference-V2/API_SendEmail.html, and its common errors"""

SENDGRID: Final = Table(
    version="2026-11-29",
    codes={
        "to": _NO_ADDRESS,
        "from": _CREDENTIALS,
        "credits": _USED_UP,
    },
    statuses={**_STATUSES, 400: _NEVER, 405: _NEVER, 406: _NEVER, 415: _NEVER},
    classes={2: _OK, 5: _LATER},
    guesses={4: _NEVER},
)
"""https://www.twilio.com/docs/sendgrid/api-reference/mail-send/errors. It has no codes, but names the member that is wrong."""

POSTMARK: Final = Table(
    version="2026-11-29",
    codes={
        "10": _CREDENTIALS,  # bad or missing token
        "100": _AWAY,  # maintenance
        "300": _NEVER,  # invalid request
        "300/To": _NO_ADDRESS,
        "400": _CREDENTIALS,  # sender signature not found
        "401": _CREDENTIALS,  # sender signature not confirmed
        "402": _NEVER,  # invalid JSON
        "403": _NEVER,  # invalid fields
        "405": _USED_UP,  # not allowed to send: out of credits
        "406": _NO_ADDRESS,  # inactive recipient: it has bounced or complained before
        "409": _NEVER,  # JSON required
        "411": _NEVER,  # forbidden attachment type
        "412": _CREDENTIALS,  # account is pending
        "413": _CREDENTIALS,  # account may not send
        "429": _THROTTLED,
        "1235": _CREDENTIALS,  # no such message stream
    },
    statuses={**_STATUSES, 400: _NEVER, 422: _NEVER},
    classes={2: _OK, 5: _LATER},
    guesses={4: _NEVER},
)
"""https://postmarkapp.com/developer/api/overview#error-codes"""
