"""The gates of a process: one for each provider, and one for each endpoint of webhooks, of which the latest are remembered."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from redis.asyncio import Redis

from engine.jobs.redisbucket import RedisBucket
from engine.worker.gate import Gate
from engine.worker.providers import Provider

KEYS_MAX: Final = 10_000
"""Endpoints that a process remembers the fate of, some 500 bytes each; whoever is forgotten begins anew."""


class Gates:
    """Gates by provider and key. A provider that was configured anew has a new one: what was mended works at once."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._of_providers: dict[tuple[str, int], Gate] = {}
        self._of_keys: OrderedDict[tuple[str, str], Gate] = OrderedDict()

    def of(self, provider: Provider, key: str = "") -> Gate:
        """The gate in front of a provider, or of one key of it."""
        if key:
            gate = self._of_keys.pop((provider.name, key), None) or Gate(provider.name, key)
            self._of_keys[provider.name, key] = gate
            while len(self._of_keys) > KEYS_MAX:
                self._of_keys.popitem(last=False)
            return gate
        named = (provider.name, provider.reading)
        found = self._of_providers.get(named)
        if found is None:
            bucket = None if provider.limit is None else RedisBucket(self._redis, provider.name, provider.limit)
            found = self._of_providers[named] = Gate(provider.name, bucket=bucket)
        return found

    async def forget(self, reading: int) -> None:
        """Let go of the gates of providers as a reading of the file had them: they are configured no more."""
        for named in [one for one in self._of_providers if one[1] == reading]:
            await self._of_providers.pop(named).close()

    async def close(self) -> None:
        """Drop the connections of limits."""
        for reading in {reading for _, reading in self._of_providers}:
            await self.forget(reading)
