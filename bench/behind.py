"""How far projections lie behind what is stored, for `sustained`."""

import asyncio
import time

import asyncpg
from redis.asyncio import Redis

from bench.load import PARTITIONS
from bench.stack import Stack
from projections.unread.store import FIRST_VERSION, meta_key
from seamark.protocol.subjects import RECEIPTS_STREAM, log_stream

_POSITIONS = "SELECT projection, partition, seq FROM projection_checkpoints"


class Behind:
    """How many sequences lay beyond the position of each projection's slowest partition, at worst.

    RECEIPTS is one stream of all partitions, whose users, and so receipts, are spread evenly.
    """

    def __init__(self, bench: Stack) -> None:
        self._bench = bench
        self.highest = {"unread": 0, "inbox": 0, "deliveries": 0}

    async def look(self) -> dict[str, int]:
        """The state of now; it is kept if it is the worst."""
        positions = await self._positions()  # first: what is stored meanwhile counts as behind
        logs = await self._heads("log")
        receipts = await self._heads("rcpt")
        now = dict.fromkeys(self.highest, 0)
        for p in range(PARTITIONS):
            now["unread"] = max(now["unread"], logs[p] - positions.get(("unread", p), 0))
            now["inbox"] = max(now["inbox"], logs[p] - positions.get(("inbox", p), 0))
            now["deliveries"] = max(
                now["deliveries"], (receipts[p] - positions.get(("deliveries", p), 0)) // PARTITIONS
            )
        self.highest = {name: max(highest, now[name]) for name, highest in self.highest.items()}
        return now

    async def over(self, within_seconds: float) -> float | None:
        """Seconds until nothing is behind; None when that took too long."""
        started = time.monotonic()
        while any((await self.look()).values()):
            if time.monotonic() - started > within_seconds:
                return None
            await asyncio.sleep(0.2)
        return round(time.monotonic() - started, 1)

    async def _heads(self, kind: str) -> list[int]:
        broker = self._bench.broker
        names = [log_stream(p) if kind == "log" else RECEIPTS_STREAM for p in range(PARTITIONS)]
        found = [await broker.leader_last(name, f"{kind}.{p}.>") for p, name in enumerate(names)]
        return [newest.seq if newest is not None else 0 for newest in found]

    async def _positions(self) -> dict[tuple[str, int], int]:
        async with Redis.from_url(self._bench.valkey.url) as redis:
            values = [await redis.hget(meta_key(p, FIRST_VERSION), "seq") for p in range(PARTITIONS)]
        found = {("unread", p): int(value or 0) for p, value in enumerate(values)}
        assert self._bench.postgres is not None, "projections are measured with their tables"
        connection = await asyncpg.connect(self._bench.postgres.url, timeout=10)
        try:
            rows = await connection.fetch(_POSITIONS, timeout=10)
        finally:
            await connection.close(timeout=10)
        return found | {(row["projection"], row["partition"]): row["seq"] for row in rows}
