"""Bounds of requests that are sent again, each with its reason."""

from typing import Final

IDEMPOTENCY_KEY_BYTES: Final = 255
"""Length of an `Idempotency-Key`."""

IDEMPOTENCY_KEPT_SECONDS: Final = 86_400
"""How long a key belongs to the request that it came with, and its answer is given again."""

IDEMPOTENCY_RUNNING_SECONDS: Final = 60
"""How long a request may run that holds a key; then it is taken for dead, and the same request may be tried again. A bulk request
takes half a minute at most."""

IDEMPOTENCY_ANSWER_BYTES: Final = 524_288
"""Largest answer kept. A thousand results of a bulk request, each with an error, have less."""

IDEMPOTENCY_BURST_BYTES: Final = 64 << 20
"""What keys of one tenant may take of Redis at once, then 429: some 130 000 of single events."""

IDEMPOTENCY_BYTES_PER_DAY: Final = 192 << 20
"""How much of that comes back in a day: never more than 256 MiB are kept for a tenant, 6 requests a second without end."""
