"""What the answers and reports of SMS providers mean.

Codes of the 30000s come in reports about a message that was accepted, the others in answers to requests. One table serves both.
What follows from a report is what it means for the number: a text that was taken is paid for, and not sent again.
"""

from __future__ import annotations

from typing import Final

from engine.channels.verdicts import Table, Verdict

_OK: Final = Verdict("ok")
_THROTTLED: Final = Verdict("throttled", scope="key")
_CREDENTIALS: Final = Verdict("config", scope="key")
_NO_NUMBER: Final = Verdict("target_invalid")
_FILTERED: Final = Verdict("permanent", alarm=True)
"""The same text is not sent again, and a person has to see why carriers take it for spam."""

_THEIR_FAULT: Final = Verdict("transient", retries_max=2, elsewhere=True)

TWILIO: Final = Table(
    version="2026-11-29",
    codes={
        "20003": _CREDENTIALS,  # authentication failed
        "20429": _THROTTLED,  # too many requests
        "21211": _NO_NUMBER,  # `To` is no number
        "21265": _NO_NUMBER,  # a short code
        "21268": _NO_NUMBER,  # a premium number
        "21408": Verdict("config", scope="target"),  # no permission for this country: others are not concerned
        "21606": _CREDENTIALS,  # `From` cannot send
        "21608": Verdict("config", scope="target"),  # a trial account sends to numbers of its owner only
        "21610": Verdict("opted_out"),  # has answered STOP
        "21612": Verdict("permanent"),  # not reachable from this sender; it may be from others
        "21614": _NO_NUMBER,  # no mobile number
        "21617": Verdict("permanent"),  # too long
        "21635": _NO_NUMBER,  # a landline
        "30001": _THROTTLED,  # queue overflow
        "30002": _CREDENTIALS,  # account suspended
        "30003": Verdict("transient"),  # unreachable handset
        "30004": _FILTERED,  # blocked
        "30005": _NO_NUMBER,  # unknown handset
        "30006": _NO_NUMBER,  # landline
        "30007": _FILTERED,  # filtered by the carrier
        "30008": _THEIR_FAULT,  # unknown
        "30010": Verdict("permanent"),  # price above the limit
        "30012": Verdict("permanent"),  # validity too short
        "30022": _THROTTLED,  # above the rate of the campaign (10DLC)
        "30034": _CREDENTIALS,  # sender not registered (10DLC)
    },
    statuses={
        401: _CREDENTIALS,
        404: _CREDENTIALS,  # the path names the account, and nothing else
        429: _THROTTLED,
    },
    classes={2: _OK, 5: _THEIR_FAULT},
    guesses={4: Verdict("permanent")},
)
"""https://www.twilio.com/docs/api/errors"""

SNS: Final = Table(
    version="2026-11-29",
    codes={
        "AuthorizationError": _CREDENTIALS,
        "EndpointDisabled": _NO_NUMBER,
        "InternalError": _THEIR_FAULT,
        "InvalidClientTokenId": _CREDENTIALS,
        "InvalidParameter/PhoneNumber": _NO_NUMBER,
        "InvalidParameter": Verdict("permanent"),
        "InvalidSecurity": _CREDENTIALS,
        "OptedOut": Verdict("opted_out"),
        "PlatformApplicationDisabled": _CREDENTIALS,
        "SignatureDoesNotMatch": _CREDENTIALS,
        "Throttled": _THROTTLED,
        "Throttling": _THROTTLED,  # the general name of AWS for the same
    },
    statuses={401: _CREDENTIALS, 403: _CREDENTIALS, 429: _THROTTLED},
    classes={2: _OK, 5: _THEIR_FAULT},
    guesses={4: Verdict("permanent")},
)
"""https://docs.aws.amazon.com/sns/latest/api/API_Publish.html, and its common errors"""
