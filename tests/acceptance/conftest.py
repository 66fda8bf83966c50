"""A running stack, as `make run` starts it, for the tests of the documentation and for those of the commands.

One for each module: with traffic on it, it must not go on beside other tests.
"""

from collections.abc import Iterator

import pytest

from tests.support.manual import Manual, manual


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manual]:
    """Whoever types what the documentation says, beside a running stack with traffic."""
    with manual(tmp_path_factory.mktemp("manual")) as made:
        yield made
        made.traffic.check()
