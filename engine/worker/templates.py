"""The active templates as workers render them: read once for each version of a tenant's rules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import msgspec

from engine.channels.locales import best
from engine.plan.patterns import patterns_of
from engine.postgres import Pool, asking

KEPT_MAX: Final = 1000
"""Types of all tenants whose templates a process remembers, by channel: some 10 MB at usual sizes."""

_READ: Final = """
SELECT type, locale, parts FROM templates WHERE tenant = $1 AND channel = $2 AND type = ANY($3) AND active
"""

Parts = dict[str, str]


class ActiveTemplates:
    """Reads templates from PostgreSQL.

    Args:
        pool: the primary: a replica could show what was before the version that is asked for.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._kept: OrderedDict[tuple[str, int, str, str], dict[str, dict[str, Parts]]] = OrderedDict()

    async def find(self, tenant: str, version: int, channel: str, type: str, locale: str) -> Parts | None:
        """The parts of the template for a type in a language; None: it has none.

        Of all patterns that match the type, the one that says most of it wins if it has something in this language, or for all.

        Args:
            version: of the tenant's rules, which every change of a template counts.

        Raises:
            StoreUnavailable: PostgreSQL does not answer.
        """
        key = (tenant, version, channel, type)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = await self._read(tenant, channel, type)
            while len(self._kept) > KEPT_MAX:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        in_language = (best(found[pattern], locale) for pattern in patterns_of(type) if pattern in found)
        return next((parts for parts in in_language if parts is not None), None)

    async def _read(self, tenant: str, channel: str, type: str) -> dict[str, dict[str, Parts]]:
        found: dict[str, dict[str, Parts]] = {}
        async with asking(self._pool) as connection:
            for row in await connection.fetch(_READ, tenant, channel, list(patterns_of(type))):
                parts = msgspec.json.decode(row["parts"], type=Parts)
                found.setdefault(row["type"], {})[row["locale"]] = parts
        return found
