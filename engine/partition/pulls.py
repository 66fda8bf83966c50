"""Raw pulls on a pinned consumer: how many messages are on order, and when to order more."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from engine.broker import wire
from engine.broker.jetstream import Broker
from engine.errors import Unavailable
from engine.limits import BUFFERED_PULLS_MAX, LINGER_SECONDS, PULL_BATCH, PULL_BYTES

GROUP = "owner"

_ENDS = (b"Batch Completed", b"MaxBytes")
"""A pull with a bound in bytes says so when it is done: no reason to doubt anything."""


class Pace:
    """When a round may begin. A small one costs nearly as much as a large one, so one that follows soon upon another lingers."""

    def __init__(self) -> None:
        self._begun_at = 0.0

    def pause_seconds(self, buffered: int) -> float:
        """How long to wait before `buffered` messages are handled; 0: the round begins now."""
        now = time.monotonic()
        pause = self._begun_at + LINGER_SECONDS - now
        if pause > 0 and buffered < PULL_BATCH // 2:
            return pause
        self._begun_at = now
        return 0.0


class Pulls:
    """Keeps one to two batches on order, none while two are buffered: then to lose the pin is normal.

    Args:
        inbox: where messages and statuses go.
        expires_seconds: when a pull ends by itself.
    """

    def __init__(self, broker: Broker, stream: str, consumer: str, inbox: str, expires_seconds: float) -> None:
        self._broker = broker
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._reply = f"{inbox}.1"
        self._expires_seconds = expires_seconds
        self.outstanding = 0
        self.ordered_at = time.monotonic()

    def arrived(self) -> bool:
        """One message less is on order; is it time to order more?"""
        if self.outstanding:  # a pull that was given up may still deliver
            self.outstanding -= 1
        return self.outstanding <= PULL_BATCH // 2

    def ended(self, headers: bytes) -> bool:
        """A status says that a pull is over; was that its time, number or bytes, and so to be expected?"""
        pending = wire.header(headers, b"Nats-Pending-Messages")
        self.outstanding = max(0, self.outstanding - int(pending)) if pending else 0
        code = wire.status(headers)
        return code == 408 or (code == 409 and any(word in headers for word in _ENDS))

    def give_up(self) -> None:
        """Nothing that was ordered is expected any more."""
        self.outstanding = 0

    def order(self, pin: bytes | None, buffered: int, buffered_bytes: int) -> None:
        """Order what there is room for: a batch with our pin, one message of whoever waits to get it."""
        batch, room = (PULL_BATCH, PULL_BATCH * (BUFFERED_PULLS_MAX - 1)) if pin else (1, 0)
        if self.outstanding + buffered > room or buffered_bytes > PULL_BYTES or not self._broker.connected:
            return
        body: dict[str, Any] = {"batch": batch, "max_bytes": PULL_BYTES, "group": GROUP}
        body |= {"expires": int(self._expires_seconds * 1e9)} | ({"id": pin.decode()} if pin else {})
        try:
            self._broker.publish(self._subject, msgspec.json.encode(body), reply=self._reply)
        except Unavailable:
            return  # whoever watches tries again
        self.outstanding += batch
        self.ordered_at = time.monotonic()
