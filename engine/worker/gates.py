"""The gates of a process: one for each provider, and one for each endpoint of webhooks, of which the latest are remembered."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Final

from redis.asyncio import Redis

from engine.jobs.handling import SEND_SECONDS
from engine.jobs.redisbucket import RedisBucket
from engine.worker.gate import Gate, Noted
from engine.worker.providers import Provider
from engine.worker.remembered import Remembered, owner_of

KEYS_MAX: Final = 10_000
"""Keys of a provider, endpoints or push services, that a process remembers the fate of, up to 900 bytes each; who is forgotten
begins anew."""


SLOW_AT_ONCE: Final = 8
"""So many of the jobs that a worker has under way (`engine.jobs.worker.AT_A_TIME`) may be one tenant's to endpoints that are
slow. Those that answer after 19 s, which is no failure, would else leave no place for anybody's."""

UNKNOWN_AT_ONCE: Final = 32
"""The same with those of which this process knows nothing yet: they may be slow, too, and leave half of the places to others."""

SLOW_WAIT_SECONDS: Final = 15.0
UNKNOWN_WAIT_SECONDS: Final = 2.0
"""When a place is worth asking for again; an endpoint that answers at once is known by then."""

PLACE_SECONDS: Final = SEND_SECONDS + 5.0
"""A place that was not given back by then is free: it came to no send."""


class Gates:
    """Gates by provider and key. A provider that was configured anew has a new one: what was mended works at once.

    Args:
        noted: told when the breaker of a provider changes.
    """

    def __init__(self, redis: Redis, noted: Noted | None = None) -> None:
        self._redis, self._noted = redis, noted
        self._of_providers: dict[tuple[str, str, int], Gate] = {}
        # By provider: whoever registers tokens names hosts, and must not have the fate of endpoints forgotten by it.
        self._of_keys: defaultdict[tuple[str, str], Remembered[Gate]] = defaultdict(lambda: Remembered(KEYS_MAX))
        self._slow: dict[str, dict[object, float]] = {}

    def of(self, provider: Provider, key: str = "") -> Gate:
        """The gate in front of a provider, or of one key of it."""
        if key:
            of_keys = self._of_keys[provider.serves, provider.name]
            gate = of_keys.get(key)
            if gate is None:
                gate = Gate(provider.name, key, single=not provider.platform)
                of_keys.put(key, gate)
            gate.whole = self.of(provider)
            return gate
        named = (provider.serves, provider.name, provider.reading)
        found = self._of_providers.get(named)
        if found is None:
            limited = f"{provider.serves}/{provider.name}"
            bucket = None if provider.limit is None else RedisBucket(self._redis, limited, provider.limit)
            found = self._of_providers[named] = Gate(provider.name, bucket=bucket, noted=self._noted)
        return found

    def take_place(self, provider: Provider, key: str, who: object) -> float:
        """Take a place for a send to this endpoint, `<tenant>/<id>`; what is quick needs none.

        Returns:
            0: `who` may send. Else in how many seconds there may be a place.
        """
        slow = self.of(provider, key).slow if key and not provider.platform else False
        if slow is False:
            return 0.0
        tenant, now = owner_of(key), time.monotonic()
        held = {one: until for one, until in self._slow.get(tenant, {}).items() if until > now}
        self._slow[tenant] = held
        if len(held) >= (SLOW_AT_ONCE if slow else UNKNOWN_AT_ONCE):
            return SLOW_WAIT_SECONDS if slow else UNKNOWN_WAIT_SECONDS
        held[who] = now + PLACE_SECONDS
        return 0.0

    def free_place(self, key: str, who: object) -> None:
        """Give the place back, if there was one."""
        tenant = owner_of(key)
        held = self._slow.get(tenant, {})
        held.pop(who, None)
        if not held:
            self._slow.pop(tenant, None)

    async def forget(self, reading: int) -> None:
        """Let go of the gates of providers as a reading of the file had them: they are configured no more."""
        for named in [one for one in self._of_providers if one[-1] == reading]:
            await self._of_providers.pop(named).close()

    async def close(self) -> None:
        """Drop the connections of limits."""
        for reading in {named[-1] for named in self._of_providers}:
            await self.forget(reading)
