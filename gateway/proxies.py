"""Whose address counts: that of the connection, or, behind proxies one trusts, the one that they have seen."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp import web


class Proxies:
    """The proxies that are believed when they say for whom they ask (`X-Forwarded-For`).

    Each proxy adds the address it was asked from at the right. So what stands there is read from the right, past the
    addresses of trusted proxies: the first other one is the client's. What stands left of it was written by the client.

    Args:
        trusted: addresses and networks, such as `10.0.0.0/8`.

    Raises:
        ValueError: for an entry that is neither.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = [ip_network(entry, strict=False) for entry in trusted]

    def client(self, request: web.BaseRequest) -> str:
        """What a bound by address counts for a request: an IPv4 address, or the /64 of an IPv6 one.

        Whoever has an IPv6 address has a /64 of them.
        """
        return self.counted(request.remote or "", request.headers.getall("X-Forwarded-For", ()))

    def counted(self, peer: str, forwarded_for: Iterable[str]) -> str:
        """The same for the address of the connection and the lines of the header."""
        client = _address(peer)
        if client is None:
            return peer
        hops = [hop.strip() for line in forwarded_for for hop in line.split(",")] if self._trusted else []
        while hops and self._is_trusted(client):
            # What is no address was written by nobody we trust: the one who passed it on answers for it.
            if (before := _address(hops.pop())) is None:
                break
            client = before
        return str(client) if client.version == 4 else str(ip_network((client, 64), strict=False))

    def _is_trusted(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._trusted)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address in any of the forms that proxies write: with a port, in brackets, IPv4 as IPv6."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found
