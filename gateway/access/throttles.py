"""How many events a tenant's services may publish over HTTP, as operators have set it: counted over all gateways."""

from __future__ import annotations

from typing import Final

from redis.asyncio import Redis

from engine.buckets import Buckets
from engine.controls.document import Throttle
from engine.controls.watching import WatchedControls
from gateway import metrics
from gateway.access.shared_buckets import Bound, Empty, SharedBuckets
from seamark.protocol.subjects import encode_token

BURST_SECONDS: Final = 5.0
"""The events of so many seconds may come at once: services publish in bursts."""

BURST_EVENTS: Final = 60
"""At least so many may come at once, where a minute allows as many: who reads "2 a minute" expects two, and not one now and
one in half a minute."""

STOPPED_SECONDS: Final = 60.0
"""`Retry-After` where nothing may be published: nobody knows when that ends."""


class Throttles:
    """Counts the events of tenants that are throttled; those of others cost nothing.

    While Redis is away each process counts for itself, and grants the whole rate.
    """

    def __init__(self, redis: Redis | None, watched: WatchedControls) -> None:
        self._watched = watched
        self._shared = SharedBuckets(redis, "throttles")
        self._own: dict[Throttle, Buckets] = {}

    async def wait_seconds(self, tenant: str, type: str) -> float:
        """How long until an event may be published; 0: now, and it is counted."""
        throttles = self._watched.controls.throttles(tenant, type)
        if not throttles:
            return 0.0
        wait = await self._wait(tenant, throttles)
        if wait:
            metrics.gateway_events.labels("throttled").inc()
        return wait

    async def _wait(self, tenant: str, throttles: tuple[Throttle, ...]) -> float:
        if any(not each.per_minute for each in throttles):
            return STOPPED_SECONDS
        token = encode_token(tenant)
        # The rate is part of the key: a bucket that is emptied at another rate means something else.
        keys = [f"throttle:{{{token}}}:{each.type or '='}:{each.per_minute}" for each in throttles]
        taken = await self._shared.take(keys, 1, [_bound(each) for each in throttles])
        if isinstance(taken, Empty):
            return taken.wait_seconds
        return 0.0 if taken else self._alone(tenant, throttles)

    def _alone(self, tenant: str, throttles: tuple[Throttle, ...]) -> float:
        if len(self._own) > len(self._watched.document.controls):
            self._own.clear()  # of throttles that are no longer in force
        buckets = [self._own.setdefault(each, _buckets(each)) for each in throttles]
        if wait := max(each.wait_seconds(tenant) for each in buckets):
            return wait
        for each in buckets:
            each.take(tenant)
        return 0.0


def _bound(throttle: Throttle) -> Bound:
    per_second = throttle.per_minute / 60
    return Bound(max(float(min(throttle.per_minute, BURST_EVENTS)), per_second * BURST_SECONDS), per_second)


def _buckets(throttle: Throttle) -> Buckets:
    return Buckets(throttle.per_minute, burst=_bound(throttle).burst)
