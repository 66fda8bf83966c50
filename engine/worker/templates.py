"""The active templates as workers render them: read once for each version of a tenant's rules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

import msgspec

from engine.channels.locales import best
from engine.plan.patterns import patterns_of
from engine.postgres import Pool, asking

KEPT_MAX: Final = 1000
"""Types of all tenants whose templates a process remembers, by channel: some 10 MB at usual sizes."""

KEPT_BYTES_MAX: Final = 64 << 20
"""The same in bytes: a pattern in fifty languages of 100 KB each is kept once for each type that it matches."""

_READ: Final = """
SELECT type, locale, parts FROM templates WHERE tenant = $1 AND channel = $2 AND type = ANY($3) AND active
"""

Parts = dict[str, str]


class _Kept(NamedTuple):
    """Templates by pattern and language, and how large they are."""

    texts: dict[str, dict[str, Parts]]
    bytes: int


class ActiveTemplates:
    """Reads templates from PostgreSQL.

    Args:
        pool: the primary: a replica could show what was before the version that is asked for.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._kept: OrderedDict[tuple[str, int, str, str], _Kept] = OrderedDict()
        self._bytes = 0

    async def find(self, tenant: str, version: int, channel: str, type: str, locale: str) -> Parts | None:
        """The parts of the template for a type in a language; None: it has none.

        Of all patterns that match the type, the one that says most of it wins if it has something in this language, or for all.

        Args:
            version: of the tenant's rules, which every change of a template counts.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        key = (tenant, version, channel, type)
        kept = self._kept.get(key)
        if kept is None:
            kept = await self._read(tenant, channel, type)
            self._keep(key, kept)
        else:
            self._kept.move_to_end(key)
        found = kept.texts
        in_language = (best(found[pattern], locale) for pattern in patterns_of(type) if pattern in found)
        return next((parts for parts in in_language if parts is not None), None)

    def _keep(self, key: tuple[str, int, str, str], kept: _Kept) -> None:
        """Remember it, and forget what was not asked for for longest."""
        before = self._kept.pop(key, None)  # somebody else may have read it meanwhile
        self._kept[key] = kept
        self._bytes += kept.bytes - (before.bytes if before is not None else 0)
        while len(self._kept) > KEPT_MAX or (self._bytes > KEPT_BYTES_MAX and len(self._kept) > 1):
            self._bytes -= self._kept.popitem(last=False)[1].bytes

    async def _read(self, tenant: str, channel: str, type: str) -> _Kept:
        found: dict[str, dict[str, Parts]] = {}
        bytes_ = 0
        async with asking(self._pool) as connection:
            for row in await connection.fetch(_READ, tenant, channel, list(patterns_of(type))):
                parts = msgspec.json.decode(row["parts"], type=Parts)
                found.setdefault(row["type"], {})[row["locale"]] = parts
                bytes_ += len(row["parts"])
        return _Kept(found, bytes_)
