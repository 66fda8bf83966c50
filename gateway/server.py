"""A gateway process: made, served, drained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import structlog
from aiohttp import web
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from engine.broker.health import BrokerHealth, watched
from engine.broker.jetstream import Broker, StreamState, connect
from engine.buckets import Buckets
from engine.cancels import Cancels, watching
from engine.channels.email.unsubscribe import Tokens
from engine.channels.references import References
from engine.closing import Held
from engine.controls.watching import WatchedControls
from engine.directory.changing import Directory
from engine.directory.rules import Rules
from engine.dispatch.claims import release
from engine.errors import InvalidSetting, TopologyError
from engine.jobs.redisclaims import RedisClaims
from engine.letters.replaying import Replays
from engine.log.incarnations import epoch_of, read_partitions, stream_of
from engine.postgres import lazy_pool
from engine.profiles.cache import ProfileCache
from engine.profiles.reader import read_profile
from engine.settings import cannot_listen
from engine.topology.check import report_start
from gateway.access.allowances import Allowances, tenant_allowance, user_allowance
from gateway.access.api_keys import ApiKeys, postgres_keys
from gateway.access.auth import Verifier
from gateway.access.jwks import Keys, KeySet, SharedSecret
from gateway.access.origins import Origins
from gateway.access.proxies import Proxies
from gateway.access.sign_outs import SignOuts
from gateway.access.throttles import Throttles
from gateway.api.dev_page import dev_routes
from gateway.api.endpoints import ENDPOINTS
from gateway.api.events import PUBLISHING, Publishing
from gateway.carriers.connection import Runner
from gateway.context import CONTEXT, Context
from gateway.descriptors import sessions_within_limit
from gateway.drain import drain
from gateway.http import cors
from gateway.http.idempotency import IdempotencyKeys
from gateway.http.problems import as_problems
from gateway.limits import (
    ACCEPT_BACKLOG,
    API_KEY_GUESSES_PER_MINUTE,
    COUNT_SECONDS,
    DIRECTORY_CONNECT_SECONDS,
    DIRECTORY_CONNECTIONS,
    DRAIN_CLOSE_SECONDS,
)
from gateway.log.live import Live
from gateway.log.partition import Partition
from gateway.metrics import FeedCollector
from gateway.obeying import obey
from gateway.options import GatewayOptions
from gateway.presence.gateways import Gateways
from gateway.providers.certificates import Certificates
from gateway.providers.settings import Sources
from gateway.session.broadcasts import Broadcasts
from gateway.session.outlet import Flusher
from gateway.session.receipts import Receipts
from gateway.session.registry import Sessions
from gateway.session.state_records import StateRecords
from gateway.session.wheel import Wheel
from gateway.stores.tables import Tables, open_tables
from projections.deliveries.ends import JobEnds
from projections.unread.reader import UnreadReader
from seamark.protocol.subjects import log_stream

_log = structlog.get_logger("seamark.gateway")


async def run(
    options: GatewayOptions,
    *,
    stop: asyncio.Event,
    port: int,
    reuse_port: bool = False,
    started: Callable[[int, Context], None] | None = None,
) -> None:
    """Serve until `stop` is set, then drain.

    Args:
        options: stores and keys.
        stop: set by whoever got the signal.
        port: to listen on; 0 lets the system choose.
        reuse_port: share the port with other processes (SO_REUSEPORT).
        started: called with the port once clients are taken.

    Raises:
        Unavailable: no broker. TopologyError, InvalidSetting: with the remedy; the latter also where the port is taken.
    """
    keys = _keys(options)
    broker = await connect(options.nats)
    try:
        async with (
            watched(broker, options.nats_monitor_urls) as broker_health,
            watching(broker) as cancels,
            _context(options, broker, broker_health, keys, cancels) as context,
        ):
            direct = {one.path: one.directly(context) for one in ENDPOINTS if one.status == 101}
            runner = Runner(create_app(context, options), direct=direct, shutdown_timeout=DRAIN_CLOSE_SECONDS)
            await runner.setup()
            site = web.TCPSite(runner, options.host, port, backlog=ACCEPT_BACKLOG, reuse_port=reuse_port or None)
            try:
                await _open(site, options.host, port)
                _log.info("gateway_started", host=options.host, port=site.port, partitions=len(context.partitions))
                if started is not None:
                    started(site.port, context)
                await stop.wait()
                await site.stop()
                await drain(context)
            finally:
                await runner.cleanup()
    finally:
        await keys.close()
        await broker.close()


async def _open(site: web.TCPSite, host: str, port: int) -> None:
    try:
        await site.start()
    except OSError as error:
        raise cannot_listen("gateway", host, port, error) from error


def create_app(context: Context, options: GatewayOptions) -> web.Application:
    """The application; it runs under `gateway.carriers.connection.Runner`."""
    app = web.Application(middlewares=[as_problems])
    app[CONTEXT] = context
    app[PUBLISHING] = Publishing(context.broker, context.throttles)
    app.add_routes(one.route() for one in ENDPOINTS if one.status != 101)
    app.add_routes([*cors.preflights(ENDPOINTS), *dev_routes(options)])
    app.on_response_prepare.append(cors.allow)
    return app


def _keys(options: GatewayOptions) -> Keys:
    if options.jwks_url is not None and options.jwt_secret is None:
        if not options.dev and not options.jwks_url.startswith("https://"):
            raise InvalidSetting("SEAMARK_JWKS_URL must be https: whoever can change the keys can be any user")
        return KeySet(options.jwks_url)
    if options.jwt_secret is not None and options.jwks_url is None:
        if not options.dev:
            _log.warning("shared_jwt_secret", remedy="use SEAMARK_JWKS_URL: whoever can check a token can make one")
        try:
            return SharedSecret(options.jwt_secret)
        except ValueError as error:
            raise InvalidSetting(f"SEAMARK_JWT_SECRET: {error}") from error
    raise InvalidSetting("set exactly one of SEAMARK_JWT_SECRET (development) and SEAMARK_JWKS_URL")


def _tokens(options: GatewayOptions) -> tuple[Tokens, References] | tuple[None, None]:
    secrets = options.unsubscribe_secrets
    try:
        return (Tokens(secrets), References(secrets)) if secrets else (None, None)
    except ValueError as error:
        raise InvalidSetting(f"SEAMARK_UNSUBSCRIBE_SECRETS: {error}") from error


async def _api_keys(options: GatewayOptions, url: str) -> ApiKeys:
    addresses_differ = options.handshakes_per_minute > 0 or options.trusted_proxies
    guesses = API_KEY_GUESSES_PER_MINUTE if addresses_differ else 0
    return ApiKeys(await postgres_keys(url), guesses_per_minute=guesses)


class _Stores(NamedTuple):
    """What a gateway has beside the broker: what no setting names is None, and the gateway goes on without it."""

    redis: Redis | None = None
    counts: UnreadReader | None = None
    idempotency_keys: IdempotencyKeys | None = None
    tables: Tables | None = None
    directory: Directory | None = None
    profiles: ProfileCache | None = None
    rules: Rules | None = None
    api_keys: ApiKeys | None = None
    replays: Replays | None = None
    claims: RedisClaims | None = None


async def _stores(options: GatewayOptions, broker: Broker, partitions: int, held: Held) -> _Stores:
    """Redis and PostgreSQL; `held` closes them. Both connect when first asked, so that a gateway starts without them."""
    found = _Stores()
    if options.redis_url is not None:
        redis = Redis.from_url(options.redis_url, socket_connect_timeout=COUNT_SECONDS, socket_timeout=None)
        held.push_async_callback(redis.aclose)
        counts, keys = held.keep(UnreadReader(redis)), held.keep(IdempotencyKeys(redis))
        claims = held.keep(RedisClaims(redis))
        found = found._replace(redis=redis, counts=counts, idempotency_keys=keys, claims=claims)
    if options.postgres_url is not None:
        tables = held.keep(await open_tables(options.postgres_url, partitions))
        api_keys = held.keep(await _api_keys(options, options.postgres_url))
        pool = await lazy_pool(options.postgres_url, DIRECTORY_CONNECTIONS, connect_seconds=DIRECTORY_CONNECT_SECONDS)
        profiles = None if found.redis is None else ProfileCache(found.redis, partial(read_profile, pool))
        directory = held.keep(Directory(pool, profiles))
        if profiles is not None:
            held.keep(profiles)
        rules = held.keep(Rules(pool, broker))
        rules.start()
        if found.redis is not None and found.claims is not None:
            ends = JobEnds(pool, broker, partitions)
            found = found._replace(replays=Replays(broker, ends, found.claims, partial(release, found.redis)))
        found = found._replace(tables=tables, api_keys=api_keys, directory=directory, profiles=profiles, rules=rules)
    return found


@asynccontextmanager
async def _context(
    options: GatewayOptions, broker: Broker, broker_health: BrokerHealth, keys: Keys, cancels: Cancels
) -> AsyncIterator[Context]:
    """Everything sessions share, started; stopped again at the end."""
    origins, proxies = _trusted(options)
    logs = await _logs(broker, options.partitions)
    await report_start(broker, "dev" if options.dev else "production")
    links, references = _tokens(options)
    async with Held() as held:
        certificates = held.keep(Certificates(options.provider_http()))
        sources = held.keep(Sources(options.providers, certificates))
        sources.start()
        stores = await _stores(options, broker, len(logs), held)
        live, controls, sign_outs = Live(broker), WatchedControls(broker), SignOuts(broker)
        sessions = Sessions(per_user=options.sessions_per_user, at_most=sessions_within_limit(options.sessions_at_most))
        context = Context(
            broker=broker,
            broker_health=broker_health,
            controls=controls,
            throttles=Throttles(stores.redis, controls),
            sign_outs=sign_outs,
            gateways=Gateways(broker, sessions, sign_outs),
            verifier=Verifier(keys, issuer=options.issuer, audience=options.audience, sign_outs=sign_outs),
            origins=origins,
            sessions=sessions,
            receipts=Receipts(broker),
            state_records=StateRecords(broker, _allowances(stores.redis, logs, options.tenant_state_percent)),
            partitions=[Partition(broker, number, live, stores.counts) for number in range(len(logs))],
            wheel=Wheel(),
            flusher=Flusher(),
            handshakes=Buckets(options.handshakes_per_minute),
            times=options.times,
            tables=stores.tables,
            directory=stores.directory,
            replays=stores.replays,
            claims=stores.claims,
            profiles=stores.profiles,
            rules=stores.rules,
            api_keys=stores.api_keys,
            idempotency_keys=stores.idempotency_keys,
            proxies=proxies,
            cancels=cancels,
            trace_url=options.trace_url,
            unsubscribing=links,
            references=references,
            seal=options.seal,
            sources=sources,
        )
        async with _working(context, live, options):
            yield context


@asynccontextmanager
async def _working(context: Context, live: Live, options: GatewayOptions) -> AsyncIterator[None]:
    """The tasks that sessions rely on, at work for as long as the block runs."""
    collector, broadcasts = FeedCollector(context.counters), Broadcasts(context.broker, context.sessions)
    REGISTRY.register(collector)
    _listen(context.broker, context.partitions)
    for partition in context.partitions:
        partition.start()
    context.receipts.start()
    obeying = obey(context, options.postgres_url)
    context.gateways.start()
    await context.sign_outs.start()
    context.descriptors.start()
    broadcasts.start()
    try:
        yield
    finally:
        REGISTRY.unregister(collector)
        await obeying.end()
        await context.gateways.close()
        await context.sign_outs.close()
        await broadcasts.close()
        await context.descriptors.close()
        await context.state_records.close()
        await live.close()
        await asyncio.gather(*(partition.close() for partition in context.partitions))
        context.wheel.close()


def _trusted(options: GatewayOptions) -> tuple[Origins, Proxies]:
    """The web pages and the proxies that the settings trust.

    Raises:
        InvalidSetting: an entry is no origin, or no network.
    """
    try:
        origins = Origins(options.origins, same_origin=options.dev)
    except ValueError as error:
        raise InvalidSetting(f"SEAMARK_ORIGINS: {error}") from error
    try:
        proxies = Proxies(options.trusted_proxies)
    except ValueError as error:
        raise InvalidSetting(f"SEAMARK_TRUSTED_PROXIES: {error}: write addresses or networks, as 10.0.0.0/8") from error
    return origins, proxies


def _allowances(redis: Redis | None, logs: list[StreamState], tenant_percent: float) -> Allowances:
    return Allowances(redis, user_allowance(), [tenant_allowance(log, tenant_percent) for log in logs])


async def _logs(broker: Broker, expected: int | None) -> list[StreamState]:
    """The log of each partition; every one must agree on how many there are, and have an epoch.

    Raises:
        TopologyError: streams are missing or not as `seamark topology apply` leaves them.
    """
    count = await read_partitions(broker, expected)
    logs = [await stream_of(broker, log_stream(number)) for number in range(count)]
    for state in logs:
        epoch_of(state)
        if state.partitions != count:
            detail = f"{state.name} was made for {state.partitions} partitions, EVENTS for {count}"
            raise TopologyError(detail, "Run `seamark topology apply`.")
    return logs


def _listen(broker: Broker, partitions: Sequence[Partition]) -> None:
    """Whatever may have cost live copies makes every feed compare with the head of its log."""

    def suspect() -> None:
        for partition in partitions:
            partition.suspect()

    def leader_changed(stream: str, consumer: str) -> None:
        for partition in partitions:
            if partition.stream == stream and not consumer:
                partition.suspect()

    broker.on_reconnect.append(suspect)
    broker.on_doubt.append(suspect)
    broker.on_leader_change.append(leader_changed)
