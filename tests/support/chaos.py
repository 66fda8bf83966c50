"""A failure scenario: its seed, its ledger, and the judgement at the end."""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.checker import Violation, check
from chaos.ledger import Ledger
from chaos.load import Load, drained, look, look_at_head
from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from tests.support.devices import Device, caught_up
from tests.support.logs import eventually

PARTITIONS = 4
SECONDS = float(os.environ.get("SEAMARK_CHAOS_SECONDS") or 0)
"""How much longer than usual random parts go on."""

TIMEOUT = 500 + 5 * SECONDS
"""Of a scenario with a random part, in seconds."""

SETTLED_SECONDS = 80.0
"""For what must come, on a machine however slow; nobody waits for it where it does."""


@dataclass
class Chaos:
    """One scenario: its seed, its ledger, and the judgement at the end."""

    seed: int = field(default_factory=lambda: int(os.environ.get("SEAMARK_CHAOS_SEED") or random.randrange(1 << 32)))
    seconds: float = SECONDS
    users: list[str] = field(default_factory=lambda: [f"user{i}" for i in range(40)])

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.ledger = Ledger()
        print(f"SEAMARK_CHAOS_SEED={self.seed}")

    def load(self, broker: Broker, **options: Any) -> Load:
        """Publishers for this scenario's users that write into its ledger; `options` as for `Load`."""
        return Load(broker, self.ledger, self.rng, self.users, **options)

    @contextlib.asynccontextmanager
    async def under_load(self, broker: Broker, **options: Any) -> AsyncIterator[Load]:
        """Such publishers at work; at the end all their answers are in the ledger."""
        load = self.load(broker, **options)
        running = asyncio.create_task(load.run(), name="load")
        try:
            yield load
        finally:
            load.stop()
            await running

    async def settled(self, broker: Broker, *, seconds: float = SETTLED_SECONDS) -> None:
        """Wait until every event is applied."""

        async def all_applied() -> bool:
            try:
                return await drained(broker, PARTITIONS)
            except BrokerError:
                return False

        await eventually(all_applied, seconds=seconds, every_seconds=0.1)

    async def judge(self, broker: Broker, *, seconds: float = SETTLED_SECONDS) -> int:
        """Wait until every event is applied and check the whole history; the number of records."""
        await self.settled(broker, seconds=seconds)
        records = await look(broker, self.ledger, PARTITIONS)
        self.verdict()
        return records

    async def judge_devices(self, broker: Broker, found: Sequence[Device], *, seconds: float = SETTLED_SECONDS) -> int:
        """As `judge`, once every device has got and acknowledged the last record of its log; the number of records."""
        await self.settled(broker)
        records = await look(broker, self.ledger, PARTITIONS)
        lasts: dict[str, int] = {}
        for line in self.ledger.lines:
            if line.op == "record":
                lasts[line.facts["user"]] = max(lasts.get(line.facts["user"], 0), line.facts["seq"])
        await eventually(lambda: caught_up(found, lasts), seconds=seconds)
        for device in found:
            device.settle()
        for partition in range(PARTITIONS):  # positions that devices were told since then lie beyond what was read
            await look_at_head(broker, self.ledger, partition)
        self.verdict()
        return records

    async def violations(self, broker: Broker) -> list[Violation]:
        """What is wrong with what the logs hold now."""
        seen = Ledger(self.ledger.lines)
        await look(broker, seen, PARTITIONS)
        return check(seen.lines)

    def verdict(self) -> None:
        """Something was promised, and no promise was broken."""
        assert self._seen("publish"), f"seed {self.seed}: no publication was acknowledged"
        assert self._seen("record"), f"seed {self.seed}: no log holds a record"
        violations = check(self.ledger.lines)
        assert violations == [], f"seed {self.seed}: {len(violations)} violations, the first: {violations[:5]}"

    def _seen(self, op: str) -> int:
        return sum((line.op, line.phase) == (op, "ok") for line in self.ledger.lines)
