"""What a gateway is told at start, out of the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import aiohttp

from engine.broker.jetstream import NatsSettings
from engine.channels.exchange import open_http
from engine.directory.sealing import PLAIN, Seal
from gateway.limits import (
    HELLO_SECONDS,
    PING_SECONDS,
    PONG_SECONDS,
    SESSIONS_PER_PROCESS,
    SESSIONS_PER_USER,
    STATE_SHARE_PERCENT,
)

PROVIDER_CONNECTIONS: Final = 4
"""To Amazon, for a certificate a year."""


def _provider_http() -> aiohttp.ClientSession:
    return open_http(connections_max=PROVIDER_CONNECTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Deadlines of a session, in seconds; what they mean and why is said in `gateway.limits`."""

    hello_seconds: float = HELLO_SECONDS
    ping_seconds: float = PING_SECONDS
    pong_seconds: float = PONG_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """Where its stores are and whom it believes.

    Attributes:
        nats: the broker.
        nats_monitor_urls: monitoring addresses of all its servers; they tell whether the servers can write.
        partitions: how many there must be; None: as the topology was made.
        postgres_url: the table of API keys; None: `POST /v1/events` is not served.
        redis_url: unread counts; None: no frame has one.
        jwt_secret: HS256 secret (development); exactly one of this and `jwks_url`.
        jwks_url: address of the key set.
        issuer, audience: what tokens must carry; None: not checked.
        origins: web origins that may open sessions.
        host: address to listen on.
        dev: serve the page and allow its own origin.
        dev_api_key: key of the page; None: it has no forms for what services do.
        dev_outbox_url: what the page links to as the outbox; None: it has no such link.
        sessions_per_user: bound of one user's sessions in this process.
        sessions_at_most: bound of all sessions in this process.
        handshakes_per_minute: bound for one address; 0: none.
        trusted_proxies: networks of proxies that are believed when they name the client's address.
        unsubscribe_secrets: of the links in mails and of what providers report about, the newest first; none: no link is served,
            and no report finds its notification.
        seal: of the secrets of webhooks in PostgreSQL.
        providers: the file whose table `callbacks` says who posts reports; None: nobody does.
        provider_http: makes what certificates are fetched by.
        tenant_state_percent: how much of each log a tenant's users may fill with read and archive records.
        trace_url: where a trace can be looked at, with `{trace_id}` in it; None: proofs have no link.
        times: deadlines of a session.
    """

    nats: NatsSettings
    nats_monitor_urls: tuple[str, ...] = ()
    partitions: int | None = None
    postgres_url: str | None = None
    redis_url: str | None = None
    jwt_secret: str | None = None
    jwks_url: str | None = None
    issuer: str | None = None
    audience: str | None = None
    origins: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    dev: bool = False
    dev_api_key: str | None = None
    dev_outbox_url: str | None = None
    dev_tenant: str = "default"
    sessions_per_user: int = SESSIONS_PER_USER
    sessions_at_most: int = SESSIONS_PER_PROCESS
    handshakes_per_minute: int = 0
    trusted_proxies: tuple[str, ...] = ()
    unsubscribe_secrets: tuple[str, ...] = ()
    seal: Seal = PLAIN
    providers: str | None = None
    provider_http: Callable[[], aiohttp.ClientSession] = _provider_http
    tenant_state_percent: float = STATE_SHARE_PERCENT
    trace_url: str | None = None
    times: Times = Times()
