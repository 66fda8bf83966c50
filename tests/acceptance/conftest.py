"""What acceptance tests share: a browser, and a running stack as `make run` starts it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.chromium import Chromium, chromium, chromium_process
from tests.support.manual import Manual, manual


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manual]:
    """Whoever types what the documentation says, beside a running stack with traffic.

    One for each module: with traffic on it, it must not go on beside other tests.
    """
    with manual(tmp_path_factory.mktemp("manual")) as made:
        yield made
        made.traffic.check()


@pytest.fixture(scope="session")
def chromium_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the browser that all tests of a session share speaks its protocol. Tests want `browser` instead."""
    with chromium_process(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def browser(chromium_address: str) -> AsyncIterator[Chromium]:
    """A browser in which nobody has been before."""
    async with chromium(chromium_address) as running:
        yield running
