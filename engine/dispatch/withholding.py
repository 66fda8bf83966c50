"""The last look at events before their records are written: what is over or cancelled by now is stored for nobody to see."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from engine import metrics
from engine.cancels import Cancels
from engine.dispatch.rounds import Planned
from seamark.protocol.records import Withheld


class Withholding:
    """Looks at the events of a round, as often as is needed.

    Who cancels a transaction is told that nothing of it is written after a second. A process that was frozen between its look
    and the write, or a log that took nothing for a while, would write it later; so a look counts for as long as what is known of
    cancels is fresh.

    Args:
        cancels: which transactions are cancelled; None: none is.

    Attributes:
        until: until when the last look counts, by the monotonic clock.
    """

    def __init__(self, cancels: Cancels | None, planned: Sequence[Planned]) -> None:
        # Only events with a `transaction_id` can be cancelled, and only those with `expires_at` expire; nearly all have neither.
        self._planned = [
            one
            for one in planned
            if (event := one.accepted.event).transaction_id is not None or event.expires_at is not None
        ]
        self._cancels = cancels if any(one.accepted.event.transaction_id is not None for one in self._planned) else None
        self.until = -math.inf

    async def look(self) -> None:
        """Look now; waits where it is not known what is cancelled."""
        cancels = self._cancels
        if cancels is not None:
            await cancels.heard()
        if self._planned:
            withhold(self._planned, cancels.holds if cancels is not None else lambda *_: False, datetime.now(UTC))
        self.until = math.inf if cancels is None else cancels.fresh_until

    async def look_if_old(self) -> None:
        """Look again where the last look no longer counts."""
        if time.monotonic() > self.until:
            await self.look()


def withhold(planned: Iterable[Planned], cancelled: Callable[[str, str], bool], now: datetime) -> None:
    """Have the records of events that are over or cancelled stored as shown to nobody.

    Args:
        cancelled: whether a tenant, named by its token, has cancelled a transaction.
        now: what expiry is compared with.
    """
    for one in planned:
        if one.template.withheld is not None:
            continue
        event = one.accepted.event
        transaction, expires_at = event.transaction_id, event.expires_at
        why: Withheld | None = None
        if transaction is not None and cancelled(one.accepted.at.tenant_token, transaction):
            why = "cancelled"
        elif expires_at is not None and expires_at <= now:
            why = "expired"
        if why is not None:
            one.template.withhold(why)
            metrics.withheld_records.labels(why).inc(len(one.accepted.recipients))
