"""One HTTP request to a provider, of which every end is a value: an answer, or why there is none.

What is sent twice by mistake costs money and trust. So an exchange says whether the request had begun to leave: what had not may
be sent again anywhere, what had may have been taken. It follows no redirects, which would carry a text or a secret to a server
that nobody chose; it keeps no cookies, which one tenant's endpoint could set for another's; it knows no proxies of the
environment.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Final, Literal

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver
from aiohttp.connector import SocketFactoryType

from engine.channels.retry_after import retry_after

BODY_BYTES_MAX: Final = 64 << 10
"""What is read of an answer's body. Providers' answers have some 2 KiB; whoever sends more is not listened to."""

BODY_SECONDS_MAX: Final = 2.0
"""How long a body is waited for, once the status has said what happened: a slow one must not hold the sender."""

CONNECT_SECONDS_MAX: Final = 10.0
"""From the wait for a free connection to the end of TLS: three lost packets in a row still fit (RFC 6298: 1 + 2 + 4 s)."""

KEEP_ALIVE_SECONDS: Final = 4.0
"""How long an idle connection is kept: less than servers do (nginx 75 s, Node.js 5 s). One that its server closes just when a
request leaves would make that request ambiguous."""

Why = Literal["blocked", "dns", "connect", "tls", "timeout", "reset", "malformed"]


class Blocked(OSError):
    """The address belongs to a network that nothing may be sent to. Resolvers and socket factories of a session raise it."""


class Answer(msgspec.Struct, frozen=True):
    """What came back. `body` is what could be read of it in time, at most BODY_BYTES_MAX."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def retry_after_seconds(self) -> float | None:
        """How long it asks us to wait, from now; None: it does not say."""
        return retry_after(self.headers.get("Retry-After"), datetime.now(UTC))


class Silence(msgspec.Struct, frozen=True):
    """Nothing came back. `left`: the request had begun to leave, so it may have been obeyed."""

    why: Why
    left: bool


def open_http(
    *,
    connections_max: int,
    connections_per_host_max: int = 0,
    resolver: AbstractResolver | None = None,
    socket_factory: SocketFactoryType | None = None,
    tls: ssl.SSLContext | None = None,
) -> aiohttp.ClientSession:
    """A session for `exchange`; its owner closes it.

    Args:
        connections_max: at once; further requests wait, at most CONNECT_SECONDS_MAX.
        connections_per_host_max: the same to one host; 0: as many as to all.
        resolver: finds addresses; it may raise Blocked.
        socket_factory: makes the socket for an address, or raises Blocked.
        tls: whom to trust; none: the authorities of the system.
    """
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_note_left)
    connector = aiohttp.TCPConnector(
        limit=connections_max,
        limit_per_host=connections_per_host_max,
        use_dns_cache=False,  # a name is looked up for each connection, and the guard sees what that connection goes to
        resolver=resolver,
        socket_factory=socket_factory,
        ssl=tls or True,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,  # 64 KiB of gzip may be 64 MiB of text
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS_MAX),
        trace_configs=[trace],
    )


async def exchange(
    http: aiohttp.ClientSession, url: str, *, headers: Mapping[str, str], body: bytes, deadline_seconds: float
) -> Answer | Silence:
    """POST `body` to `url`. It raises nothing of what the other side does, and ends within the deadline.

    Args:
        http: of `open_http`.
        deadline_seconds: from now to the status and headers of the answer, and its body.
    """
    way = SimpleNamespace(left=False)
    try:
        async with asyncio.timeout(deadline_seconds) as bound:
            response = await http.post(url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=way)
            until = bound.when()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return Silence(_why(error), way.left)
    now = asyncio.get_running_loop().time()
    seconds = min(BODY_SECONDS_MAX, max(0.0, (until or now) - now))
    return Answer(response.status, response.headers, await _read(response, seconds))


async def _read(response: aiohttp.ClientResponse, seconds: float) -> bytes:
    """What comes of the body in time. The connection is used again only if all of it came."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while len(body) < BODY_BYTES_MAX and (part := await response.content.readany()):
                body += part
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass
    finally:
        if response.content.at_eof():
            response.release()
        else:
            response.close()
    return bytes(body[:BODY_BYTES_MAX])


async def _note_left(_session: aiohttp.ClientSession, context: Any, _params: Any) -> None:
    context.trace_request_ctx.left = True  # called just before the first byte is written: never too late


def _why(error: Exception) -> Why:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, Blocked):
        return "blocked"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns"
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError | ssl.CertificateError):
        return "tls"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "connect"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    return "malformed" if isinstance(error, aiohttp.ClientResponseError | aiohttp.InvalidURL) else "reset"
