"""One running stack, as `make run` starts it, for all tests of the documentation and of the commands."""

from collections.abc import Iterator

import pytest

from tests.support.manual import Manual, manual


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manual]:
    """Whoever types what the documentation says, beside a running stack with traffic."""
    with manual(tmp_path_factory.mktemp("manual")) as made:
        yield made
        made.traffic.check()
