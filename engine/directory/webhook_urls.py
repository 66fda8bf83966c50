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

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")

_NOT_GLOBAL: Final = (
    ipaddress.ip_network("192.88.99.0/24"),  # whoever relays 6to4 (RFC 7526 ended it)
    ipaddress.ip_network("fec0::/10"),  # private networks before fc00::/7 (RFC 3879)
    ipaddress.ip_network("64:ff9b:1::/48"),  # NAT64 of a private network (RFC 8215)
    ipaddress.ip_network("::ffff:0:0:0/96"),  # IPv4 translated (RFC 2765)
)
"""`is_global` is true of some of these in some versions of Python."""

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
    """Whether an address, and every one that is written inside it, belongs to a public server."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        isatap = int(address) >> 32 & 0xFFFF_FFFF in _ISATAP
        if isatap or address in _NAT64 or int(address) >> 32 == 0:  # ::1.2.3.4 is the former way to write ::ffff:1.2.3.4
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        if not all(one is None or reachable_by_all(one) for one in inner):
            return False
    if any(address in network for network in _NOT_GLOBAL):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved
