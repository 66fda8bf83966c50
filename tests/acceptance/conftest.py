"""What acceptance tests share: a browser, and a running stack as `make run` starts it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.charts import SETS, Object, objects
from tests.support.chromium import Chromium, chromium, chromium_process
from tests.support.gatewaysim import SimGateway, sim_gateway
from tests.support.manual import Manual, manual

pytest.register_assert_rewrite("tests.support.commandchecks")


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


@pytest.fixture
async def gateway() -> AsyncIterator[SimGateway]:
    """A simulated gateway, which does what a real one cannot be made to do on request."""
    async with sim_gateway() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where helm works on the chart."""
    return tmp_path_factory.mktemp("chart")


@pytest.fixture(scope="module", params=SETS)
def rendered(request: pytest.FixtureRequest, folder: Path) -> list[Object]:
    """The chart as each of its sets of values makes it."""
    return objects(folder, request.param)


@pytest.fixture(scope="module")
def startup(folder: Path) -> list[Object]:
    """The chart as its set `startup` makes it."""
    return objects(folder)
