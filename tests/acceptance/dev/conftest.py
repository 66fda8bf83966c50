"""Stacks of `seamark dev` for the tests of this folder, started once for each module."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.devstack import Stack


@contextmanager
def _running(folder: Path, data: str = ".seamark", **env: str) -> Iterator[Stack]:
    stack = Stack(folder, data, **env)
    stack.start()
    yield stack
    if stack.process is not None and stack.process.poll() is None:
        stack.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that several tests use, each as a user of its own."""
    with _running(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that several tests hurt and end and that has to get over it, each with a user of its own."""
    with _running(tmp_path_factory.mktemp("battered")) as running:
        yield running


@pytest.fixture(scope="module")
def peculiar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack in a folder of another name, started from a shell in which settings of another one were left."""
    folder = tmp_path_factory.mktemp("peculiar")
    (folder / "settings.toml").write_text('jwt_issuer = "https://issuer"\npartitions = 8\n')
    left = {
        "SEAMARK_SETTINGS": str(folder / "settings.toml"),
        "SEAMARK_HEALTH_PORT": "9100",
        "SEAMARK_JWT_AUDIENCE": "audience",
        "SEAMARK_POSTGRES_URL": "",
    }
    with _running(folder, data="data here", **left) as running:
        yield running
