"""A gateway process: made, served, drained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import structlog
from aiohttp import web
from msgspec import Raw
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from engine.broker.health import BrokerHealth, watched
from engine.broker.jetstream import Broker, StreamState, connect
from engine.errors import ApiError, InvalidSetting, TopologyError
from engine.settings import cannot_listen
from engine.topology.check import report_start
from gateway.access.allowances import Allowances, tenant_allowance, user_allowance
from gateway.access.api_keys import ApiKeys, postgres_keys
from gateway.access.auth import Verifier
from gateway.access.buckets import Buckets
from gateway.access.jwks import Keys, KeySet, SharedSecret
from gateway.access.origins import Origins
from gateway.access.proxies import Proxies
from gateway.api.dev_page import dev_routes
from gateway.api.endpoints import ENDPOINTS
from gateway.api.events import PUBLISHING, Publishing
from gateway.carriers.connection import Runner
from gateway.context import CONTEXT, Context
from gateway.descriptors import sessions_within_limit
from gateway.drain import CLOSE_SECONDS, drain
from gateway.http import cors
from gateway.http.problems import as_problems
from gateway.join.counters import FeedCollector
from gateway.join.port import Snapshot
from gateway.limits import ACCEPT_BACKLOG, API_KEY_GUESSES_PER_MINUTE, COUNT_SECONDS, SNAPSHOT_BYTES
from gateway.log.live import Live
from gateway.log.partition import Partition
from gateway.options import GatewayOptions
from gateway.session.outlet import Flusher
from gateway.session.receipts import Receipts
from gateway.session.registry import Sessions
from gateway.session.state_records import StateRecords
from gateway.session.wheel import Wheel
from gateway.stores.tables import NotRead, open_tables
from projections.inbox.queries import Page
from projections.queries import Queries
from seamark.protocol.cursor import Cursor
from seamark.protocol.subjects import EVENTS_STREAM, encode_token, log_stream

_NO_SUCH_STREAM = 10059

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
            _context(options, broker, broker_health, keys) as context,
        ):
            direct = {one.path: one.directly(context) for one in ENDPOINTS if one.status == 101}
            runner = Runner(create_app(context, options), direct=direct, shutdown_timeout=CLOSE_SECONDS)
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
    app[PUBLISHING] = Publishing(context.broker)
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


async def _api_keys(options: GatewayOptions) -> ApiKeys | None:
    if options.postgres_url is None:
        return None
    addresses_differ = options.handshakes_per_minute > 0 or options.trusted_proxies
    guesses = API_KEY_GUESSES_PER_MINUTE if addresses_differ else 0
    return ApiKeys(await postgres_keys(options.postgres_url), guesses_per_minute=guesses)


@asynccontextmanager
async def _context(
    options: GatewayOptions, broker: Broker, broker_health: BrokerHealth, keys: Keys
) -> AsyncIterator[Context]:
    """Everything sessions share, started; stopped again at the end."""
    origins, proxies = _trusted(options)
    logs = await _logs(broker, options.partitions)
    count = len(logs)
    await report_start(broker, "dev" if options.dev else "production")
    tables = None if options.postgres_url is None else await open_tables(options.postgres_url, count)
    redis = (
        None
        if options.redis_url is None
        else Redis.from_url(options.redis_url, socket_connect_timeout=COUNT_SECONDS, socket_timeout=None)
    )
    queries = None if redis is None else Queries(redis, count)
    partitions = [Partition(broker, number, queries) for number in range(count)]
    context = Context(
        broker=broker,
        broker_health=broker_health,
        verifier=Verifier(keys, issuer=options.issuer, audience=options.audience),
        origins=origins,
        sessions=Sessions(per_user=options.sessions_per_user, at_most=sessions_within_limit(options.sessions_at_most)),
        live=Live(broker),
        receipts=Receipts(broker),
        state_records=StateRecords(broker, _allowances(redis, logs, options.tenant_state_percent)),
        partitions=partitions,
        wheel=Wheel(),
        flusher=Flusher(),
        snapshots=lambda tenant, user, answer: _snapshot(context, tenant, user, answer),
        handshakes=Buckets(options.handshakes_per_minute),
        times=options.times,
        tables=tables,
        api_keys=await _api_keys(options),
        proxies=proxies,
    )
    collector = FeedCollector(context.counters)
    REGISTRY.register(collector)
    _listen(broker, context)
    for partition in context.partitions:
        partition.start()
    context.receipts.start()
    context.descriptors.start()
    try:
        yield context
    finally:
        REGISTRY.unregister(collector)
        await context.descriptors.close()
        await context.state_records.close()
        await context.live.close()
        closing: list[Awaitable[None]] = [partition.close() for partition in context.partitions]
        await asyncio.gather(*closing)
        context.wheel.close()
        if tables is not None:
            await tables.close()
        if context.api_keys is not None:
            await context.api_keys.close()
        if queries is not None:
            await queries.close()
        if redis is not None:
            await redis.aclose()


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
    remedy = "Run `seamark topology apply`."
    count = (await _stream(broker, EVENTS_STREAM)).partitions
    if not count:
        raise TopologyError(f"{EVENTS_STREAM} does not say how many partitions there are", remedy)
    if expected is not None and expected != count:
        raise TopologyError(
            f"SEAMARK_PARTITIONS is {expected}, the streams were made for {count}",
            "Unset it, or connect to the servers it was meant for.",
        )
    logs = [await _stream(broker, log_stream(number)) for number in range(count)]
    for state in logs:
        if state.partitions != count:
            raise TopologyError(f"{state.name} was made for {state.partitions} partitions, EVENTS for {count}", remedy)
        if state.epoch is None:
            raise TopologyError(f"{state.name} has no epoch", remedy)
    return logs


async def _stream(broker: Broker, name: str) -> StreamState:
    try:
        return await broker.stream(name)
    except ApiError as error:
        if error.err_code != _NO_SUCH_STREAM:
            raise
        raise TopologyError(f"there is no stream {name}", "Run `seamark topology apply`.") from error


def _listen(broker: Broker, context: Context) -> None:
    """Whatever may have cost live copies makes every feed compare with the head of its log."""

    def suspect() -> None:
        for partition in context.partitions:
            partition.suspect()

    def leader_changed(stream: str, consumer: str) -> None:
        for partition in context.partitions:
            if partition.stream == stream and not consumer:
                partition.suspect()

    broker.on_reconnect.append(suspect)
    broker.on_doubt.append(suspect)
    broker.on_leader_change.append(leader_changed)


def _snapshot(context: Context, tenant: str, user: str, answer: Callable[[Snapshot | None], None]) -> None:
    """Answer with what the projections hold of a user; None if too many are asking."""
    user_tokens = f"{encode_token(tenant)}.{encode_token(user)}"
    tables = context.tables

    def counted(count: dict[str, Any] | None) -> None:
        if tables is None:
            together(count, NotRead.AWAY)
        else:
            tables.snapshot(tenant, user, lambda page: together(count, page))

    def together(count: dict[str, Any] | None, page: Page | NotRead) -> None:
        if page is NotRead.TOO_MANY:
            answer(None)
        elif isinstance(page, Page) and page.checkpoint is not None:
            answer(Snapshot(Cursor(*page.checkpoint), inbox=_newest(page.rows, SNAPSHOT_BYTES), unread=count))
        else:
            answer(Snapshot(None, unread=count))

    context.partition(tenant, user).counts.ask(user_tokens, counted)


def _newest(rows: Sequence[Raw], most_bytes: int) -> Sequence[Raw]:
    """As many of the first `rows` as fit into `most_bytes`, but at least one."""
    left = most_bytes
    for index, row in enumerate(rows):
        left -= memoryview(row).nbytes
        if left < 0:
            return rows[: max(1, index)]
    return rows
