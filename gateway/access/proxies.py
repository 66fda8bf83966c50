"""Which address a request counts for: the one of its connection or, behind trusted proxies, the one that they report."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp import web


class Proxies:
    """The proxies that are believed when they name the client of a request (`X-Forwarded-For`).

    Each proxy appends the address that connected to it. So the header is read from the right, past the addresses of trusted
    proxies: the first other address is the client's. The client itself may have written everything to the left of it.

    Args:
        trusted: addresses and networks, such as `10.0.0.0/8`.

    Raises:
        ValueError: for an entry that is neither.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = [ip_network(entry, strict=False) for entry in trusted]

    def client(self, request: web.BaseRequest) -> str:
        """The address that a bound counts this request for: an IPv4 address, or the /64 network of an IPv6 address.

        Whoever has one IPv6 address has a whole /64 network of them.
        """
        return self.counted(request.remote or "", request.headers.getall("X-Forwarded-For", ()))

    def counted(self, peer: str, forwarded_for: Iterable[str]) -> str:
        """The same for the address of the connection and the lines of the header."""
        client = _address(peer)
        if client is None:
            return peer
        hops = [hop.strip() for line in forwarded_for for hop in line.split(",")] if self._trusted else []
        while hops and self._is_trusted(client):
            # No trusted proxy writes anything but an address: whoever passed this on answers for it.
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
