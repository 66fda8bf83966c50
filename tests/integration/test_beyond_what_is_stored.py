"""Versions and moments that PostgreSQL cannot hold are refused at the door, over HTTP."""

from typing import Any

from tests.integration.test_directory_api import all_of, ask, done, gateway
from tests.support.gateways import TestGateway

__all__ = ["gateway"]

EARLY, LATE = "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"
"""Moments that lie outside the years 1 to 9999 in UTC."""

_NEW: dict[str, Any] = {"channel": "email", "address": "a@example.com", "reason": "hard_bounce"}
_AT = "templates/a.b/push/de"

BEYOND_WHAT_IS_STORED: tuple[tuple[str, str, Any, str], ...] = (
    *(
        (method, f"{path}?version={version}", body, "version")
        for version in (2**63, 10**19, 10**30)
        for method, path, body in (
            ("GET", _AT, None), ("PUT", _AT, {"parts": {"body": "x"}}), ("DELETE", _AT, None),
            ("PUT", f"{_AT}/active", {"version": 1}), ("PUT", "types/a.b", {}), ("PUT", "tenant/defaults", {}),
            ("DELETE", f"webhooks/wh_{'0' * 24}", None),
        )
    ),
    *(("PUT", f"{_AT}/active", {"version": version}, "version") for version in (2**63, 10**19, 10**30)),
    *(
        ("POST", "suppressions", {"suppressions": [_NEW, _NEW | {"expires_at": at}]}, "suppressions[1].expires_at")
        for at in (EARLY, LATE, "2026-01-31T12:00:00")
    ),
    *(
        ("POST", "suppressions/lift", {"reason": "bounce", name: at}, name)
        for name in ("since", "until")
        for at in (EARLY, LATE, "2026-01-31T12:00:00")
    ),
)  # fmt: skip


async def test_versions_and_moments_that_cannot_be_stored_are_refused_with_the_field_and_the_remedy(
    gateway: TestGateway,
) -> None:
    await done(gateway, "PUT", _AT, {"parts": {"body": "x"}})
    for method, path, body, field in BEYOND_WHAT_IS_STORED:
        status, problem = await ask(gateway, method, path, body)
        assert (status, problem["field"]) == (400, field), (method, path, body, problem)
        remedy = "9223372036854775807" if field == "version" else "2026-01-31T12:00:00Z"
        assert remedy in problem["detail"]
    assert await all_of(gateway, "suppressions") == []
    assert (await ask(gateway, "GET", _AT, version=2**63 - 1))[0] == 404
    assert (await ask(gateway, "PUT", f"{_AT}/active", {"version": 2**63 - 1}))[0] == 404
    for at in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"):
        await done(gateway, "POST", "suppressions", {"suppressions": [_NEW | {"expires_at": at}]})
        for name in ("since", "until"):
            await done(gateway, "POST", "suppressions/lift", {"reason": "bounce", name: at})
