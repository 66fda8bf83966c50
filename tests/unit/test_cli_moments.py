"""Moments that people type into commands: what is none is refused with what to write."""

from datetime import UTC, datetime, timedelta

import pytest

from engine.errors import InvalidSetting
from ops.cli.moments import time_of


def test_a_time_is_so_long_ago_or_written_with_an_offset() -> None:
    assert time_of("--since", "2026-01-31T12:00:00+02:00") == datetime(2026, 1, 31, 10, tzinfo=UTC)
    now, at = datetime.now(UTC), time_of("--since", "2h")
    assert abs(now - timedelta(hours=2) - at) < timedelta(hours=1)


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "0d", "2026-01-31T12:00:00", "999999d", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"],
)
def test_what_is_no_time_is_refused_with_the_option_and_the_remedy(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"--since: .* write 90m, 2h or 3d ago"):
        time_of("--since", text)
