"""Addresses of webhook endpoints: https only, and nothing that already reads like a machine of our own network.

Whoever may set an address could else have us ask servers that only we can reach (SSRF). A name can still lead anywhere: whoever
connects looks at what it resolves to, too. Here nothing is resolved.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

URL_CHARS_MAX: Final = 2048

# Not a parser of the library: two parsers that understand an odd address differently are how such checks are got past.
_URL: Final = re.compile(
    r"https://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(?P<port>[0-9]{1,5}))?(?:/[!$&-;=?-Z_a-z~%@\[\]]*|\?[!$&-;=?-Z_a-z~%@\[\]]*)?",
    re.ASCII,
)
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_NUMBER: Final = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.ASCII)
"""A last label that browsers and `inet_aton` take for a number: `127.1`, `0x7f000001` and `2130706433` are all this machine."""

_PRIVATE_ENDINGS: Final = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "private", "arpa", "onion",
                           "test", "invalid", "example")  # fmt: skip
"""Last labels that no public server has: of special use (RFC 6761, 6762, 8375), or kept for private networks by ICANN."""

_SPECIAL: Final = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
    "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    "224.0.0.0/4",  # multicast
    "168.63.129.16/32",  # Azure answers its own machines there: no registry tells
)))  # fmt: skip
"""The registries of IANA (iana-ipv4-special-registry, iana-ipv6-special-registry), since what Python's `is_global` says of some
of them differs between versions. Those that can be reached from everywhere are refused as well: they are of relays and name
servers, of which the nearest answers, which may be one of our own network."""

_GIVEN_OUT: Final = ipaddress.ip_network("2000::/3")
"""All addresses of IPv6 that are given to public servers. What is outside is private, local, multicast, written in place of one
of IPv4 (::ffff:0:0/96, 64:ff9b::/96), or nobody's."""

_ISATAP: Final = (0x0000_5EFE, 0x0200_5EFE)
"""The third quarter of an address that ends in one of IPv4 (RFC 5214)."""


def check_url(url: str) -> str:
    """`url` itself, if a webhook may have it.

    Raises:
        ValueError: with what is wrong. Credentials that stand in it are not repeated.
    """
    if len(url) > URL_CHARS_MAX:
        raise ValueError(f"`url` may have {URL_CHARS_MAX} characters")
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError(
            "`url` must be https://<host>[:<port>]/<path>, in ASCII (%XX for other bytes, xn-- for other letters of the host),"
            " without user, password or #fragment"
        )
    host, port = found["host"].lower(), found["port"]
    if port is not None and not 1 <= int(port) <= 65_535:
        raise ValueError("`url`: a port is 1 to 65535")
    _check_address(host[1:-1]) if host.startswith("[") else _check_name(host)
    return url


def _check_name(host: str) -> None:
    labels = host.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]) is not None:
        _check_address(host)
        return
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("`url`: the host is no name of a server")
    if len(labels) == 1 or labels[-1] in _PRIVATE_ENDINGS:
        raise ValueError("`url`: the host is a name of a private network; webhooks go to public servers only")


def _check_address(text: str) -> None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise ValueError("`url`: the host is no IP address as it is usually written") from error
    if not reachable_by_all(address):
        raise ValueError("`url`: the host is an address of a private network; webhooks go to public servers only")


def reachable_by_all(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address, and one of IPv4 that is written at its end, belongs to a public server."""
    if isinstance(address, ipaddress.IPv6Address):
        if address not in _GIVEN_OUT:
            return False
        if int(address) >> 32 & 0xFFFF_FFFF in _ISATAP:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
            if not reachable_by_all(inner):
                return False
    return not any(address in network for network in _SPECIAL)
