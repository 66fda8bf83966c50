"""A worker put together: what it reads, what it decides with, and a desk and a queue for each of its channels."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, NamedTuple

from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.cancels import Cancels
from engine.channels.channel import Job
from engine.channels.email.unsubscribe import Tokens
from engine.channels.references import References
from engine.controls.watching import WatchedControls
from engine.directory.changing import Directory
from engine.directory.rules import Rules
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
from engine.postgres import Pool
from engine.profiles.cache import ProfileCache
from engine.profiles.reader import SharedReads
from engine.settings import Settings
from engine.tasks import Tasks
from engine.worker.caps import Caps
from engine.worker.contexts import Contexts, Links
from engine.worker.desk import Desk, Woken
from engine.worker.digest import Digests
from engine.worker.endpoints import Endpoints
from engine.worker.escalation import WOKEN, Noticed
from engine.worker.fallback import Fallback
from engine.worker.folded import Folded
from engine.worker.gates import Gates
from engine.worker.journal import WorkerJournal
from engine.worker.providers import Providers, read_providers
from engine.worker.targets import Targets
from engine.worker.texts import Texts
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


async def working(parts: Parts, channels: Sequence[Channel], held: AsyncExitStack) -> Coroutine[Any, Any, None]:
    """The work of a process, to be run until it is cancelled.

    Args:
        held: closes what the work needs.

    Raises:
        InvalidSetting: of the providers' file, or of links in mails.
    """
    partitions = await read_partitions(parts.broker, parts.settings.partitions)
    gates, tasks = Gates(parts.redis), Tasks()
    held.push_async_callback(gates.close)
    providers = Providers(read_providers(parts.settings.providers), channels, gates.forget)
    held.push_async_callback(providers.close)
    rules = Rules(parts.pool, parts.broker)
    rules.start()
    held.push_async_callback(rules.close)
    reads = SharedReads(parts.pool)
    held.push_async_callback(reads.close)
    profiles = ProfileCache(parts.redis, reads.read)
    held.push_async_callback(profiles.close)
    claims = RedisClaims(parts.redis)
    held.push_async_callback(claims.close)
    caps = Caps(parts.redis)
    held.push_async_callback(caps.close)
    unread = _Unread(parts.redis, partitions)
    held.push_async_callback(unread.reader.close)
    directory, queue, targets = Directory(parts.pool, profiles), JobsQueue(parts.broker), Targets(parts.pool)
    held.push_async_callback(targets.close)
    journal = WorkerJournal(parts.broker, partitions, directory, JobEnds(parts.pool, parts.broker, partitions))
    links, references = _links(parts.settings)
    contexts = Contexts(rules, Texts(parts.pool), unread=unread.of, links=links, references=references)
    fallback, endpoints = Fallback(rules, queue), Endpoints(parts.pool, directory, parts.broker)
    tables, clock = NoticedTables(parts.pool), _Clock()
    folded = Folded(parts.broker, tables, partitions)
    noticed = Noticed(folded, tables, clock)
    digests = Digests(folded, tables, rules, profiles, parts.controls, parts.cancels, journal.store, clock)
    tasks.begin(providers.watch(), "providers-watch")
    tasks.begin(Sweep(parts.pool, parts.broker, partitions).run(), "sweep")
    held.push_async_callback(tasks.end)

    def worker(channel: Channel) -> Worker:
        async def digest(job: Job) -> Send | Hold | Over | Split:
            return await digests.decide(job, desk.aim)

        stages: dict[str, Woken] = {**dict.fromkeys(WOKEN, noticed.facts), DIGEST: digest}
        desk: Desk = Desk(
            channel,
            functools.partial(providers.of, channel),
            gates,
            parts.controls,
            parts.cancels,
            rules,
            profiles,
            targets,
            contexts,
            caps=caps,
            stages=stages,
            fallback=fallback.wake if channel == "push" else None,
            noted=endpoints.note if channel == "webhook" else None,
        )
        handler = Handler(claims, queue, journal, desk, POLICIES[channel], clock)
        return Worker(parts.broker, channel, handler, desk.open)

    return _together([worker(channel) for channel in channels])


async def _together(workers: Sequence[Worker]) -> None:
    """All channels, of which the first to fail ends the others."""
    async with asyncio.TaskGroup() as running:
        for one in workers:
            running.create_task(one.run(), name=f"worker-{one.channel}")


class _Unread:
    """Unread counts of single users."""

    def __init__(self, redis: Redis, partitions: int) -> None:
        self.reader = UnreadReader(redis)
        self._partitions = partitions

    async def of(self, tenant: str, user: str) -> int | None:
        """How many notifications are unread; None: that is not known. Raises StoreUnavailable."""
        tokens = encode_token(tenant), encode_user(user)
        found = await self.reader.unread_of(partition_of(*tokens, self._partitions), [".".join(tokens)])
        return found[0].count if found else None


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
