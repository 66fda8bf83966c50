"""What every session of a process leans on, made once at start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from aiohttp import web

from engine.broker.health import BrokerHealth
from engine.broker.jetstream import Broker
from gateway.access.api_keys import ApiKeys
from gateway.access.auth import Verifier
from gateway.access.buckets import Buckets
from gateway.access.origins import Origins
from gateway.access.proxies import Proxies
from gateway.descriptors import Descriptors
from gateway.join.port import FeedCounters, Snapshot
from gateway.limits import REQUESTS_PER_MINUTE
from gateway.log.live import Live
from gateway.log.partition import Partition
from gateway.options import Times
from gateway.session.outlet import Flusher
from gateway.session.receipts import Receipts
from gateway.session.registry import Sessions
from gateway.session.state_records import StateRecords
from gateway.session.wheel import Wheel
from gateway.stores.tables import Tables
from seamark.protocol.subjects import encode_token, partition_of

_log = structlog.get_logger("seamark.context")

Snapshots = Callable[[str, str, Callable[[Snapshot | None], None]], None]
"""`snapshots(tenant, user, answer)` asks the projections; `answer` is called once, later; None means that too many are asking."""


@dataclass(slots=True)
class Context:
    """The collaborators of a session."""

    broker: Broker
    broker_health: BrokerHealth
    verifier: Verifier
    origins: Origins
    sessions: Sessions
    live: Live
    receipts: Receipts
    state_records: StateRecords
    partitions: list[Partition]
    wheel: Wheel
    flusher: Flusher
    snapshots: Snapshots
    handshakes: Buckets
    times: Times
    tables: Tables | None = None
    api_keys: ApiKeys | None = None
    descriptors: Descriptors = field(default_factory=Descriptors)
    requests: Buckets = field(default_factory=lambda: Buckets(REQUESTS_PER_MINUTE))
    proxies: Proxies = field(default_factory=Proxies)
    counters: FeedCounters = field(default_factory=FeedCounters)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    draining: bool = False

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` beside the session that asked for it; draining waits for it."""
        task = asyncio.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("work_failed", task=task.get_name(), exc_info=task.exception())

    def partition(self, tenant: str, user: str) -> Partition:
        """The partition that holds the user's log."""
        number = partition_of(encode_token(tenant), encode_token(user), len(self.partitions))
        return self.partitions[number]


CONTEXT: Final = web.AppKey("context", Context)
"""Where handlers find it."""
