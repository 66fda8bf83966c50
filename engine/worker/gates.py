"""The gates of a process: one for each provider, and one for each of what fares apart behind it.

These are endpoints of webhooks, push services of browsers and domains of recipients; the latest are remembered.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import Final

from redis.asyncio import Redis

from engine.channels.email.settings import DEFAULT_DOMAIN, DomainSettings
from engine.jobs.handling import SEND_SECONDS
from engine.jobs.redisbucket import RedisBucket, bucket_script
from engine.redisscript import RedisScript
from engine.worker.domains import DomainGate
from engine.worker.gate import Gate, Noted
from engine.worker.providers import Provider, limit_of
from engine.worker.remembered import Remembered, owner_of

KEYS_MAX: Final = 10_000
"""How many keys of a provider, such as endpoints or domains, a process remembers the fate of, about a kilobyte each. One that is
forgotten begins anew."""


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
        self._places: dict[tuple[str, ...], dict[object, float]] = {}
        self._of_domains: RedisScript | None = None

    def of(self, provider: Provider, key: str = "") -> Gate:
        """The gate in front of a provider, or of one key of it."""
        if key:
            of_keys, whole = self._of_keys[provider.channel_name, provider.name], self.of(provider)
            gate = of_keys.get(key)
            if gate is None:
                gate = _gate_of_key(provider, key)
                of_keys.put(key, gate)
            if gate.whole is not whole:
                gate.whole = whole
                if isinstance(gate, DomainGate):
                    self._limit(gate, provider, key)
            return gate
        named = (provider.channel_name, provider.name, provider.reading)
        found = self._of_providers.get(named)
        if found is None:
            limited = f"{provider.channel_name}/{provider.name}"
            bucket = None if provider.limit is None else RedisBucket(self._redis, limited, provider.limit)
            found = self._of_providers[named] = Gate(provider.name, bucket=bucket, noted=self._noted)
        return found

    def _limit(self, gate: DomainGate, provider: Provider, domain: str) -> None:
        """Have the gate of a domain keep to what the providers' file says now."""
        said = provider.domains or {}
        settings = said.get(domain) or said.get(DEFAULT_DOMAIN) or DomainSettings()
        limit, name = limit_of(settings), f"{provider.channel_name}/{provider.name}/{domain}"
        if limit is not None and self._of_domains is None:
            self._of_domains = bucket_script(self._redis)
        gate.limited(settings, None if limit is None else RedisBucket(self._redis, name, limit, self._of_domains))

    def take_place(self, provider: Provider, key: str, who: object) -> float:
        """Take a place for a send to this endpoint, `<tenant>/<id>`, or domain.

        A quick endpoint needs none, and neither does a domain without a limit.

        Returns:
            0: `who` may send. Else in how many seconds there may be a place.
        """
        gate = self.of(provider, key) if key and not provider.platform else None
        if isinstance(gate, DomainGate):
            most, wait_seconds = gate.at_once, UNKNOWN_WAIT_SECONDS
        elif gate is None or gate.slow is False:
            return 0.0
        else:
            most = SLOW_AT_ONCE if gate.slow else UNKNOWN_AT_ONCE
            wait_seconds = SLOW_WAIT_SECONDS if gate.slow else UNKNOWN_WAIT_SECONDS
        if most == math.inf:
            return 0.0
        holder, now = _holder(provider, key), time.monotonic()
        held = {one: until for one, until in self._places.get(holder, {}).items() if until > now}
        self._places[holder] = held
        if len(held) >= most:
            return wait_seconds
        held[who] = now + PLACE_SECONDS
        return 0.0

    def free_place(self, provider: Provider, key: str, who: object) -> None:
        """Give the place back, if there was one."""
        holder = _holder(provider, key)
        held = self._places.get(holder, {})
        held.pop(who, None)
        if not held:
            self._places.pop(holder, None)

    async def forget(self, reading: int) -> None:
        """Let go of the gates of providers as a reading of the file had them: they are configured no more."""
        for named in [one for one in self._of_providers if one[-1] == reading]:
            await self._of_providers.pop(named).close()

    async def close(self) -> None:
        """Drop the connections of limits."""
        for reading in {named[-1] for named in self._of_providers}:
            await self.forget(reading)
        if self._of_domains is not None:
            await self._of_domains.close()


def _gate_of_key(provider: Provider, key: str) -> Gate:
    if provider.channel_name == "email":
        return DomainGate(provider.name, key)
    return Gate(provider.name, key, single=not provider.platform)


def _holder(provider: Provider, key: str) -> tuple[str, ...]:
    """Whose places at a provider those of a key are: those of a tenant for all its endpoints, those of a domain for itself."""
    tenant = owner_of(key)
    return provider.channel_name, provider.name, tenant, "" if tenant else key
