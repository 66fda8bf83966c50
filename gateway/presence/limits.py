"""Bounds around who was signed out, and which gateways there are, each with its reason."""

from typing import Final

SIGN_OUTS_KEPT_SECONDS: Final = 31 * 86_400
"""How long it is remembered that a user was signed out (`max_age` of the bucket `signouts`), and so the age of the oldest token
that is believed."""

SIGN_OUTS_PER_TENANT: Final = 200_000
"""Users of one tenant that are remembered as signed out; then 429. With 180 bytes each they fill half of the smallest bucket."""

SIGN_OUTS_OLD_SECONDS: Final = 10.0
"""After so long without knowing who was signed out, no token is believed. A leader election takes 4-9 s, and nobody can be
signed out meanwhile; a gateway that knows nothing for longer is cut off."""

BEAT_SECONDS: Final = 2.0
"""How often a gateway says that it is there."""

ALONE_SECONDS: Final = 60.0
"""A gateway that was cut off from the broker for so long ends its sessions: they get nothing here, and perhaps do elsewhere.
Shorter outages of the broker are not worth a storm of reconnects."""

GATEWAY_FORGOTTEN_SECONDS: Final = 90.0
"""After so long in silence a gateway is taken to have no sessions: it is dead, or has ended them by `ALONE_SECONDS`."""

GATEWAYS_MAX: Final = 10_000
"""Gateways remembered; with one more, answers are no longer said to be complete."""

ANSWER_SECONDS: Final = 1.0
"""How long an answer of all gateways is waited for; who has not answered by then is named."""

OBEY_SECONDS: Final = 0.9
"""How long a gateway that is asked to obey a sign-out looks for it; then it gives no answer, and is named."""

QUESTIONS_PER_MINUTE: Final = 600
"""Questions to all gateways that a tenant may have asked by one process; then 429. With 100 gateways they are 1 000 messages a
second."""

QUESTIONS_AT_A_TIME: Final = 64
"""Such questions under way in one process; then 503. Each waits for a second where a gateway is silent."""

QUESTIONS_AT_A_TIME_PER_TENANT: Final = 16
"""Of them, one tenant's."""

assert ALONE_SECONDS + 10 * BEAT_SECONDS < GATEWAY_FORGOTTEN_SECONDS, "who is forgotten must have ended its sessions"
assert SIGN_OUTS_OLD_SECONDS < ALONE_SECONDS, "sessions that were ended must not begin anew in the same place"
