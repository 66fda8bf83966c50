"""The broker's clock: what is put off is due by it, whatever a dispatcher's own clock says."""

from __future__ import annotations

import math
import time
from typing import Final

from engine.broker.jetstream import Broker
from seamark.protocol.subjects import LATER_STREAM

LOOK_SECONDS: Final = 5.0
"""How often the broker is asked. In between a monotonic clock goes on; it would take days to be wrong by a tenth of a second."""


class BrokerClock:
    """What time it is by the leader of LATER, which also says when messages were stored and when schedules are due.

    Its answer was written between the question and its arrival, so each answer bounds the difference of the clocks on both sides.
    A difference within these bounds stays as it is: an answer that took long tells less than one that came at once.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._looked_at = self._ahead = -math.inf

    async def now(self) -> float:
        """Unix time, never later than it is.

        Raises:
            BrokerError: nobody says.
        """
        asked = time.monotonic()
        if asked - self._looked_at > LOOK_SECONDS:
            said = (await self._broker.stream(LATER_STREAM)).asked_at
            self._ahead = min(max(self._ahead, said - time.monotonic()), said - asked)
            self._looked_at = asked
        return time.monotonic() + self._ahead
