"""Keeps webhooks out of our own network: whoever names an endpoint could else have us ask servers that only we can reach (SSRF).

`engine.directory.webhook_urls` looks at what is written. Here the addresses are looked at that a connection really goes to: a
name may lead somewhere else each time it is asked for, so to look first and connect by name afterwards would protect nothing. The
socket factory sees each address just before it is connected to, literals included, which no resolver sees; the resolver refuses a
name as soon as one of its addresses is private.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import AddrInfoType

from engine.channels.exchange import CONNECT_SECONDS_MAX, Blocked
from engine.directory.webhook_urls import reachable_by_all

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOKUPS_MAX: Final = 64
"""Names looked up at once, in threads of their own, each name by one. A stranger's name server may not answer for 20 s, and
nothing can end such a look-up: the threads that everybody shares must not be taken by them. Webhooks wait for a free one within
their deadlines."""

SLOW_SECONDS: Final = CONNECT_SECONDS_MAX
"""A look-up that took so long was of use to nobody: whoever had asked for it has given up."""

SLOW_KEPT_SECONDS: Final = 120.0
"""So long the name is then not looked up: the names of one tenant's hundred endpoints would else take all threads from others."""

SLOW_NAMES_MAX: Final = 10_000

Server = tuple[str, int]
"""An address and a port."""

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a name, or OSError. A port is passed on to the resolver of the system, which wants one."""


class Guard:
    """Which addresses may be connected to: those of public servers.

    Args:
        exempt: networks that may be, too, by an operator's word.
        servers: single servers that may be, too: those that names of his lead to. No other port of theirs is opened by it.
    """

    def __init__(self, exempt: Sequence[Network] = (), servers: Sequence[Server] = ()) -> None:
        self._exempt = tuple(exempt)
        self._servers = frozenset(servers)

    def check(self, text: str) -> None:
        """Raise Blocked, which does not repeat the address: its text may be shown to whoever named the endpoint."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise Blocked("no IP address") from error
        if not any(address in network for network in self._exempt) and not reachable_by_all(address):
            raise Blocked("an address of a private network")

    def socket(self, found: AddrInfoType) -> socket.socket:
        """A socket for this address: the last moment before a connection is made."""
        family, kind, protocol, _, where = found
        if (where[0], where[1]) not in self._servers:
            self.check(str(where[0]))
        return socket.socket(family, kind, protocol)


class GuardedResolver(AbstractResolver):
    """Looks names up for a session, and refuses those that lead into a private network, even with one of their addresses.

    Args:
        guard: says which do.
        lookup: finds addresses; none: the system does.
        hosts: names that lead to a server of the operator's choice, whatever port is asked for; nobody else is asked about them.
    """

    def __init__(self, guard: Guard, lookup: Lookup | None = None, hosts: Mapping[str, Server] | None = None) -> None:
        self._guard = guard
        self._hosts = dict(hosts or {})
        self._threads = ThreadPoolExecutor(LOOKUPS_MAX, thread_name_prefix="webhook-lookup")
        self._asked: dict[str, asyncio.Future[tuple[list[str] | OSError, float]]] = {}
        self._slow_until: dict[str, float] = {}
        self._lookup = lookup or self._ask_system

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of `host`.

        Raises:
            Blocked: one of them may not be connected to.
            OSError: there are none.
        """
        if (server := self._hosts.get(host.lower())) is not None:
            return [_result(host, server[1], server[0])]
        addresses = await self._lookup(host, port)
        if not addresses:
            raise OSError("the name has no address")
        for address in addresses:
            self._guard.check(address)
        return [_result(host, port, address) for address in addresses]

    async def close(self) -> None:
        """Begin no further look-up. Those under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        if self._slow_until.get(host, 0.0) > time.monotonic():
            raise OSError("its name server did not answer a moment ago")
        asked = self._asked.get(host)
        if asked is None:
            asked = asyncio.get_running_loop().run_in_executor(self._threads, _addresses, host, port)
            self._asked[host] = asked
            asked.add_done_callback(partial(self._answered, host))
        # Whoever gives up must not take the answer from the others who wait for it.
        found, _ = await asyncio.shield(asked)
        if isinstance(found, OSError):
            raise OSError(*found.args)
        return found

    def _answered(self, host: str, asked: asyncio.Future[tuple[list[str] | OSError, float]]) -> None:
        del self._asked[host]
        self._slow_until.pop(host, None)
        if not asked.cancelled() and asked.exception() is None and asked.result()[1] >= SLOW_SECONDS:
            self._slow_until[host] = time.monotonic() + SLOW_KEPT_SECONDS
            while len(self._slow_until) > SLOW_NAMES_MAX:
                del self._slow_until[next(iter(self._slow_until))]


def _addresses(host: str, port: int) -> tuple[list[str] | OSError, float]:
    """The addresses of a name, or why there are none; and how long it took to know."""
    began = time.monotonic()
    try:
        found = [str(where[0]) for *_, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        return error, time.monotonic() - began
    return list(dict.fromkeys(found)), time.monotonic() - began


def _result(host: str, port: int, address: str) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=flags)
