"""A worker put together: what it reads, what it decides with, and a desk and a queue for each of its channels."""

from __future__ import annotations

import functools
from collections.abc import Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.cancels import Cancels
from engine.channels.channel import Job
from engine.channels.email.unsubscribe import Tokens
from engine.channels.references import References
from engine.closing import Held
from engine.controls.watching import WatchedControls
from engine.directory.changing import Directory
from engine.directory.rules import Rules
from engine.directory.sealing import seal_of
from engine.errors import InvalidSetting
from engine.jobs.desk import Hold, Over, Send, Split
from engine.jobs.digests import STAGE as DIGEST
from engine.jobs.handling import Handler
from engine.jobs.queue import JobsQueue
from engine.jobs.redisclaims import RedisClaims
from engine.jobs.retry import POLICIES
from engine.jobs.worker import Worker
from engine.log.incarnations import read_partitions
from engine.plan.rules import Channel
from engine.planner.shares import Shares
from engine.postgres import Pool
from engine.profiles.cache import ProfileCache
from engine.profiles.reader import SharedReads
from engine.settings import Settings
from engine.tasks import Tasks, together
from engine.worker.breakerlog import BreakerLog
from engine.worker.caps import Caps
from engine.worker.caughtup import CaughtUp
from engine.worker.contexts import Contexts, Links
from engine.worker.desk import AskWoken, WorkerDesk
from engine.worker.digest import Digests
from engine.worker.endpoints import Endpoints
from engine.worker.fallback import Fallback
from engine.worker.gates import Gates
from engine.worker.journal import WorkerJournal
from engine.worker.noticed import WOKEN, Noticed
from engine.worker.providers import Providers, read_providers
from engine.worker.targets import Targets
from engine.worker.templates import ActiveTemplates
from projections.deliveries.ends import JobEnds
from projections.deliveries.noticed import NoticedTables
from projections.deliveries.sweep import Sweep
from projections.unread.reader import UnreadReader
from seamark.protocol.subjects import encode_token, encode_user, partition_of


class Parts(NamedTuple):
    """What a worker is connected to."""

    settings: Settings
    broker: Broker
    redis: Redis
    pool: Pool
    controls: WatchedControls
    cancels: Cancels


class _Clock:
    def now(self) -> datetime:
        return datetime.now(UTC)


class _Shared(NamedTuple):
    """What the channels of a process have in common."""

    parts: Parts
    gates: Gates
    providers: Providers
    rules: Rules
    profiles: ProfileCache
    claims: RedisClaims
    caps: Caps
    shares: Shares
    targets: Targets
    contexts: Contexts
    queue: JobsQueue
    journal: WorkerJournal
    fallback: Fallback
    endpoints: Endpoints
    noticed: Noticed
    digests: Digests
    clock: _Clock

    def worker(self, channel: Channel) -> Worker:
        """The worker of a channel."""

        async def digest(job: Job) -> Send | Hold | Over | Split:
            return await self.digests.decide(job, desk.aim)

        stages: dict[str, AskWoken] = {**dict.fromkeys(WOKEN, self.noticed.facts), DIGEST: digest}
        desk: WorkerDesk = WorkerDesk(
            channel,
            functools.partial(self.providers.of, channel),
            self.gates,
            self.parts.controls,
            self.parts.cancels,
            self.rules,
            self.profiles,
            self.targets,
            self.contexts,
            caps=self.caps,
            stages=stages,
            shares=self.shares,
            fallback=self.fallback.wake if channel == "push" else None,
            noted=self.endpoints.note if channel == "webhook" else None,
        )
        handler = Handler(self.claims, self.queue, self.journal, desk, POLICIES[channel], self.clock)
        return Worker(self.parts.broker, channel, handler, desk.open)


async def working(parts: Parts, channels: Sequence[Channel], held: Held) -> Coroutine[Any, Any, None]:
    """The work of a process, to be run until it is cancelled: all channels, of which the first to fail ends the others.

    Args:
        held: closes what the work needs.

    Raises:
        InvalidSetting: of the providers' file, or of links in mails.
    """
    shared = await _shared(parts, channels, held)
    return together({f"worker-{channel}": shared.worker(channel).run() for channel in channels})


async def _shared(parts: Parts, channels: Sequence[Channel], held: Held) -> _Shared:
    partitions = await read_partitions(parts.broker, parts.settings.partitions)
    breakers = BreakerLog(parts.pool)
    gates, tasks, clock = held.keep(Gates(parts.redis, breakers.note)), Tasks(), _Clock()
    providers = held.keep(Providers(read_providers(parts.settings.providers), channels, gates.forget))
    rules = held.keep(Rules(parts.pool, parts.broker))
    rules.start()
    profiles = held.keep(ProfileCache(parts.redis, held.keep(SharedReads(parts.pool)).read))
    claims, caps = held.keep(RedisClaims(parts.redis)), held.keep(Caps(parts.redis))
    unread = held.keep(_Unread(parts.redis, partitions))
    targets = held.keep(Targets(parts.pool, seal_of(parts.settings)))
    queue, tables = JobsQueue(parts.broker), NoticedTables(parts.pool)
    directory = Directory(parts.pool, profiles)
    ends = JobEnds(parts.pool, parts.broker, partitions)
    journal = held.keep(WorkerJournal(parts.broker, partitions, directory, ends))
    links, references = _links(parts.settings)
    caught_up = CaughtUp(parts.broker, tables, partitions)
    tasks.begin(providers.watch(), "providers-watch")
    tasks.begin(breakers.run(), "breaker-log")
    tasks.begin(Sweep(parts.pool, parts.broker, partitions, rules).run(), "sweep")
    held.push_async_callback(tasks.end)
    return _Shared(
        parts=parts,
        gates=gates,
        providers=providers,
        rules=rules,
        profiles=profiles,
        claims=claims,
        caps=caps,
        shares=Shares(parts.broker),
        targets=targets,
        contexts=Contexts(rules, ActiveTemplates(parts.pool), unread=unread.of, links=links, references=references),
        queue=queue,
        journal=journal,
        fallback=Fallback(rules, queue),
        endpoints=Endpoints(parts.pool, directory, parts.broker),
        noticed=Noticed(caught_up, tables, clock),
        digests=Digests(caught_up, tables, rules, profiles, parts.controls, parts.cancels, journal.store, clock, caps),
        clock=clock,
    )


class _Unread:
    """Unread counts of single users."""

    def __init__(self, redis: Redis, partitions: int) -> None:
        self._reader = UnreadReader(redis)
        self._partitions = partitions

    async def of(self, tenant: str, user: str) -> int | None:
        """How many notifications are unread; None: that is not known. Raises StoreUnavailable."""
        tokens = encode_token(tenant), encode_user(user)
        found = await self._reader.unread_of(partition_of(*tokens, self._partitions), [".".join(tokens)])
        return found[0].count if found else None

    async def close(self) -> None:
        """Close the reader."""
        await self._reader.close()


def unset(settings: Settings, channels: Sequence[Channel]) -> Iterator[tuple[str, str]]:
    """The variables that are not set although one of these channels needs them, and what is missing in its messages."""
    no_links = "mails have no links by which people unsubscribe"
    if settings.public_url is None and "email" in channels:
        yield "SEAMARK_PUBLIC_URL", no_links
    if settings.unsubscribe_secrets is None and "email" in channels:
        yield "SEAMARK_UNSUBSCRIBE_SECRETS", f"{no_links}, and what providers report of mails is passed over"
    elif settings.unsubscribe_secrets is None and "sms" in channels:
        yield "SEAMARK_UNSUBSCRIBE_SECRETS", "what providers report of texts is passed over"
    if settings.storage_keys is None and "webhook" in channels:
        yield "SEAMARK_STORAGE_KEYS", "secrets of webhooks are stored as they are"


def _links(settings: Settings) -> tuple[Links | None, References | None]:
    """The links in mails, where they lead somewhere; what providers give back with their reports."""
    if settings.unsubscribe_secrets is None:
        return None, None
    try:
        secrets = tuple(settings.unsubscribe_secrets.reveal().split())
        links = None if settings.public_url is None else Links(settings.public_url, Tokens(secrets))
        return links, References(secrets)
    except ValueError as error:
        raise InvalidSetting(f"SEAMARK_UNSUBSCRIBE_SECRETS: {error}") from error
