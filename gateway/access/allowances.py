"""How many bytes of `read` and `archive` records a user, and a tenant, may still have stored: counted over all gateways.

A log keeps these records as long as any other, and they are the only ones that users themselves write: without a bound one
of them could fill the partition for everybody (ADR 0022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from redis.asyncio import Redis

from engine.broker.jetstream import StreamState
from engine.buckets import Buckets
from gateway import metrics
from gateway.access.shared_buckets import Bound, Empty, SharedBuckets
from gateway.limits import (
    LOG_AGE_ASSUMED_SECONDS,
    LOG_BYTES_ASSUMED,
    STATE_BURST_BYTES,
    STATE_BYTES_PER_DAY,
    STATE_RECORD_BYTES_MAX,
)
from seamark.protocol.subjects import encode_token

_DAY_SECONDS: Final = 86_400.0


class Allowance(NamedTuple):
    """A bound: so many bytes at once, and so many a second in the long run."""

    burst_bytes: float
    bytes_per_second: float

    def buckets(self) -> Buckets:
        """This bound, counted by this process alone."""
        return Buckets(self.bytes_per_second * 60, burst=self.burst_bytes)


class Refusal(NamedTuple):
    """Whose allowance is used up, and when there will be enough of it again."""

    whose: str
    wait_seconds: float


def user_allowance() -> Allowance:
    """What one user may have stored, in whichever log."""
    return Allowance(STATE_BURST_BYTES, STATE_BYTES_PER_DAY / _DAY_SECONDS)


def tenant_allowance(log: StreamState, percent: float) -> Allowance:
    """What the users of one tenant may have stored together in one log, so that it is never more than `percent` of it.

    A day of it at once: mornings are busier than nights. Its last record still leaves the log within the log's age.
    """
    max_bytes = int(log.config.get("max_bytes") or 0)
    age_seconds = int(log.config.get("max_age") or 0) / 1e9
    share = (max_bytes if max_bytes > 0 else LOG_BYTES_ASSUMED) * percent / 100
    rate = share / ((age_seconds or LOG_AGE_ASSUMED_SECONDS) + _DAY_SECONDS)
    # However small a log is made, one record fits: otherwise no read could ever be stored.
    return Allowance(max(rate * _DAY_SECONDS, STATE_RECORD_BYTES_MAX), rate)


class Allowances:
    """Counts what is stored twice: in Redis over all gateways, and in this process for this process alone.

    What the process's own count refuses needs no call to Redis. While Redis is away only the own count holds: each gateway
    process then grants the whole allowance, and Redis never learns what was granted meanwhile.

    Args:
        redis: shared by all gateways; None: each process counts for itself.
        user: the bound of each user.
        tenants: the bound of each tenant in each log, by partition.
    """

    def __init__(self, redis: Redis | None, user: Allowance, tenants: Sequence[Allowance]) -> None:
        self._buckets = SharedBuckets(redis, "allowances")
        self._user, self._tenants = user, list(tenants)
        self._own_user = user.buckets()
        self._own_tenants = [tenant.buckets() for tenant in self._tenants]

    async def take(self, tenant: str, user: str, partition: int, size: int) -> Refusal | None:
        """Count `size` bytes that are about to be stored for a user. None: they may be stored.

        A refused request is not counted. Takes at most a quarter of a second, whether Redis answers or not.
        """
        refusal = self._own(tenant, user, partition, size)
        if refusal is None:
            refusal = await self._charge(tenant, user, partition, size)
        if refusal is not None:
            metrics.gateway_state_records.labels(f"refused_{refusal.whose}").inc()
        return refusal

    def _own(self, tenant: str, user: str, partition: int, size: int) -> Refusal | None:
        if wait := self._own_user.wait_seconds((tenant, user), size):
            return Refusal("user", wait)
        if wait := self._own_tenants[partition].wait_seconds(tenant, size):
            return Refusal("tenant", wait)
        return None

    async def _charge(self, tenant: str, user: str, partition: int, size: int) -> Refusal | None:
        """Count for this process, then for all. In that order: those who come while Redis is silent find it counted."""
        self._own_user.take((tenant, user), size)
        self._own_tenants[partition].take(tenant, size)
        granted = False
        try:
            refusal = await self._shared(tenant, user, partition, size)
            granted = refusal is None
        finally:
            if not granted:
                self._own_user.give_back((tenant, user), size)
                self._own_tenants[partition].give_back(tenant, size)
        return refusal

    async def _shared(self, tenant: str, user: str, partition: int, size: int) -> Refusal | None:
        token = encode_token(tenant)  # the hash tag: one script touches one slot of a Redis cluster
        keys = [f"allowance:{{{token}}}:user:{encode_token(user)}", f"allowance:{{{token}}}:log:{partition}"]
        bounds = [Bound(*self._user), Bound(*self._tenants[partition])]
        taken = await self._buckets.take(keys, size, bounds)
        return Refusal(("user", "tenant")[taken.bucket], taken.wait_seconds) if isinstance(taken, Empty) else None
