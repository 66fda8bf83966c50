"""What every session of a process leans on, made once at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from engine.broker.health import BrokerHealth
from engine.broker.jetstream import Broker
from engine.buckets import Buckets
from engine.cancels import Cancels
from engine.channels.email.unsubscribe import Tokens
from engine.channels.references import References
from engine.controls.watching import WatchedControls
from engine.directory.changing import Directory
from engine.directory.rules import Rules
from engine.directory.sealing import PLAIN, Seal
from engine.jobs.claims import Claims
from engine.letters.replaying import Replays
from engine.profiles.cache import ProfileCache
from engine.tasks import Tasks
from gateway.access.api_keys import ApiKeys
from gateway.access.auth import Verifier
from gateway.access.origins import Origins
from gateway.access.proxies import Proxies
from gateway.access.sign_outs import SignOuts
from gateway.access.throttles import Throttles
from gateway.descriptors import Descriptors
from gateway.http.idempotency import IdempotencyKeys
from gateway.join.port import FeedCounters
from gateway.limits import BROADCAST_BURST, BROADCASTS_PER_MINUTE, CANCELS_PER_MINUTE, REQUESTS_PER_MINUTE
from gateway.log.partition import Partition
from gateway.options import Times
from gateway.presence.gateways import Gateways
from gateway.presence.limits import QUESTIONS_PER_MINUTE
from gateway.providers.settings import Sources
from gateway.session.outlet import Flusher
from gateway.session.receipts import Receipts
from gateway.session.registry import Sessions
from gateway.session.state_records import StateRecords
from gateway.session.traces import RecentTraces
from gateway.session.wheel import Wheel
from gateway.stores.tables import Tables
from seamark.protocol.subjects import encode_token, partition_of


@dataclass(slots=True)
class Context:
    """The collaborators of a session. `tasks`: what runs beside the sessions that asked for it; draining waits for it."""

    broker: Broker
    broker_health: BrokerHealth
    controls: WatchedControls
    throttles: Throttles
    sign_outs: SignOuts
    gateways: Gateways
    verifier: Verifier
    origins: Origins
    sessions: Sessions
    receipts: Receipts
    state_records: StateRecords
    partitions: list[Partition]
    wheel: Wheel
    flusher: Flusher
    handshakes: Buckets
    times: Times
    tables: Tables | None = None
    directory: Directory | None = None
    profiles: ProfileCache | None = None
    rules: Rules | None = None
    api_keys: ApiKeys | None = None
    idempotency_keys: IdempotencyKeys | None = None
    descriptors: Descriptors = field(default_factory=Descriptors)
    questions: Buckets = field(default_factory=lambda: Buckets(QUESTIONS_PER_MINUTE))
    requests: Buckets = field(default_factory=lambda: Buckets(REQUESTS_PER_MINUTE))
    proxies: Proxies = field(default_factory=Proxies)
    cancels: Cancels | None = None
    unsubscribing: Tokens | None = None
    references: References | None = None
    seal: Seal = PLAIN
    sources: Sources | None = None
    broadcast_rate: Buckets = field(default_factory=lambda: Buckets(BROADCASTS_PER_MINUTE, burst=BROADCAST_BURST))
    cancel_rate: Buckets = field(default_factory=lambda: Buckets(CANCELS_PER_MINUTE))
    counters: FeedCounters = field(default_factory=FeedCounters)
    tasks: Tasks = field(default_factory=Tasks)
    recent_traces: RecentTraces = field(default_factory=RecentTraces)
    trace_url: str | None = None
    replays: Replays | None = None
    claims: Claims | None = None
    draining: bool = False

    def partition(self, tenant: str, user: str) -> Partition:
        """The partition that holds the user's log."""
        number = partition_of(encode_token(tenant), encode_token(user), len(self.partitions))
        return self.partitions[number]


CONTEXT: Final = web.AppKey("context", Context)
"""Where handlers find it."""
