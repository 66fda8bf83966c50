"""What a worker makes of rows that say where a job goes."""

import pytest

from engine.worker.targets import Target, _token


@pytest.mark.parametrize(
    ("token", "key"),
    [
        ("https://Push.Example/x", "webpush/push.example"),
        ("https://", "webpush/"),
        ("https://[", "webpush/"),
        ("https://a]b/", "webpush/"),
    ],
)
def test_an_address_that_is_none_is_still_a_target_and_whoever_sends_says_what_is_wrong(token: str, key: str) -> None:
    """Whoever registers a subscription writes it; a job that nobody can decide about would be poison."""
    keys = '{"p256dh": "BA", "auth": "AA"}'
    row = {"token_id": "t", "platform": "webpush", "token": token, "app": "", "environment": "", "keys": keys}
    found = _token([row | {"token_hash": b"12345678"}])  # type: ignore[list-item]
    assert isinstance(found, Target)
    assert found.key == key
