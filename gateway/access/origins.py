"""Which web pages may open a session: an exact list of origins (cross-site WebSocket hijacking guard)."""

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit


class Origins:
    """An exact allow list. A request without `Origin` is no browser's and is let through: its token decides.

    Args:
        allowed: origins as a browser sends them, `https://app.example.com` or `http://localhost:8080`.
        same_origin: allow the page that this very server serves (development), but only where `allowed` names nothing.

    Raises:
        ValueError: for an entry that is not an origin (a path, a wildcard, no scheme).
    """

    __slots__ = ("_allowed", "_same_origin")

    def __init__(self, allowed: Iterable[str] = (), *, same_origin: bool = False) -> None:
        self._allowed = frozenset(_checked(origin) for origin in allowed)
        self._same_origin = same_origin and not self._allowed

    def allows(self, origin: str | None, host: str | None = None) -> bool:
        """Whether a request with this `Origin` (and `Host`) may go on. Compared byte for byte, never by suffix."""
        if origin is None:
            return True
        if origin in self._allowed:
            return True
        return self._same_origin and host is not None and origin == f"http://{host}" and _is_this_machine(host)


def _checked(origin: str) -> str:
    parts = urlsplit(origin)
    plain = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme not in ("http", "https") or not parts.netloc or "*" in origin or origin != plain:
        raise ValueError(f"{origin!r} is not an origin: write scheme://host[:port] without a path or wildcard")
    return origin


def _is_this_machine(host: str) -> bool:
    """Whether `Host` is `localhost` or an address.

    A stranger's page can make any other name, its own, resolve to this machine (DNS rebinding). Then `Origin` and `Host`
    agree and prove nothing.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ip_address(name))
    except ValueError:
        return False
