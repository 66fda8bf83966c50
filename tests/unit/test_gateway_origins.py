"""Origins: which pages may open a session."""

import pytest

from gateway.access.origins import Origins


@pytest.mark.parametrize(("origin", "allowed"), [
    ("https://app.example", True), ("https://app.example:443", False), ("http://app.example", False),
    ("https://app.example.evil", False), ("https://evil-app.example", False), ("https://sub.app.example", False),
    ("null", False), ("", False), (None, True),
])  # fmt: skip
def test_an_origin_is_compared_exactly(origin: str | None, allowed: bool) -> None:
    assert Origins(["https://app.example"]).allows(origin, "app.example") is allowed


@pytest.mark.parametrize(("origin", "host", "allowed"), [
    ("http://127.0.0.1:8080", "127.0.0.1:8080", True), ("http://localhost:8080", "localhost:8080", True),
    ("http://[::1]:8080", "[::1]:8080", True), ("http://192.168.1.5", "192.168.1.5", True),
    ("http://127.0.0.1:9090", "127.0.0.1:8080", False), ("https://127.0.0.1:8080", "127.0.0.1:8080", False),
    ("http://evil.example:8080", "evil.example:8080", False), ("http://[:8080", "[:8080", False), ("http://", "", False),
])  # fmt: skip
def test_the_development_page_may_connect_to_its_own_server_under_no_name_that_others_can_give(
    origin: str, host: str, allowed: bool
) -> None:
    assert Origins(same_origin=True).allows(origin, host) is allowed
    assert not Origins().allows(origin, host)


def test_where_origins_are_configured_no_other_is_allowed() -> None:
    origins = Origins(["https://app.example"], same_origin=True)
    assert origins.allows("https://app.example", "127.0.0.1:8080")
    assert not origins.allows("http://127.0.0.1:8080", "127.0.0.1:8080")


@pytest.mark.parametrize("entry", ["*", "https://*.example", "https://app.example/", "app.example", "https://", ""])
def test_an_entry_that_is_no_origin_is_refused_at_start(entry: str) -> None:
    with pytest.raises(ValueError, match="not an origin"):
        Origins([entry])
