"""What every test has at hand: servers, and a loop of the kind that production runs on."""

import asyncio
import functools
import inspect
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import hypothesis
import pytest
import uvloop
from xdist.scheduler import LoadScopeScheduling

from tests.support.memory import keep_files_in_memory
from tests.support.patience import patient
from tests.support.servers import (
    AT_THE_END,
    empty_postgres,
    fresh_nats_server,
    nats_cluster,
    nats_server,
    pool,
    postgres,
    postgres_server,
    postgres_template,
    valkey,
)

__all__ = [
    "empty_postgres",
    "fresh_nats_server",
    "nats_cluster",
    "nats_server",
    "patient",
    "pool",
    "postgres",
    "postgres_server",
    "postgres_template",
    "valkey",
]

# Where Python may not keep what it has compiled, each of the hundreds of processes that tests start compiles 200 modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

keep_files_in_memory()

IN_CI = os.environ.get("SEAMARK_CI") == "1"

# A gate answers the same question each time: examples there are the same in every run. Elsewhere they are new ones.
# How long examples take says more about the machine than about the code; pytest's own time-out catches what hangs.
UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", **UNTIMED)
hypothesis.settings.register_profile("ci", **UNTIMED, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")
if IN_CI:
    hypothesis.settings.load_profile("ci")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on uvloop, as the roles do; SEAMARK_TEST_LOOP=asyncio runs them on the standard loop."""
    if os.environ.get("SEAMARK_TEST_LOOP") == "asyncio":
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    """What a run in the background starts can be ended by Ctrl-C, too."""
    # A run in the background is begun with SIGINT ignored, which every process it starts would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "overlay(changes): what `nats_server` has otherwise than shipped")


ASYNC_SHARE = 0.9
"""How much of a test's time its coroutine may take before it fails by itself, so that fixtures end and the run goes on.
pytest-timeout, behind it, can only end the whole run: on uvloop no signal reaches a test that waits."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every coroutine a deadline of its own, shorter than pytest-timeout's; what takes long goes first.

    A run in several processes ends with its last test: one that takes minutes must not begin there.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_seconds, reverse=True)
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            marker = item.get_closest_marker("timeout")
            given = (*marker.args, marker.kwargs.get("timeout"))[0] if marker else None
            item.obj = _within(float(given or config.getini("timeout")) * ASYNC_SHARE, item.obj)


class ByFile(LoadScopeScheduling):
    """Hands a file to one process, which makes once what its tests share: a stack is nine processes, and takes 10 s of CPU.

    Failure scenarios share nothing and take long: each of them goes to whichever process is free.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith("tests/failure/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Files in the order in which they were collected, with what takes long at the beginning."""
    config.option.loadscopereorder = False
    return ByFile(config, log)


def _seconds(item: pytest.Item) -> float:
    """How long a failure scenario takes, roughly, as its mark says; 0 for everything else."""
    marker = item.get_closest_marker("chaos")
    return 0.0 if marker is None else float(marker.kwargs.get("takes_seconds", 10.0))


def _within(seconds: float, test: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(test)
    async def limited(*args: Any, **kwargs: Any) -> Any:
        async with asyncio.timeout(seconds):
            return await test(*args, **kwargs)

    return limited


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what all tests shared. In CI nothing may be skipped: what a bare machine lacks, `.ci/run` installs."""
    AT_THE_END.close()
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if IN_CI and reporter is not None and reporter.stats.get("skipped") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which skips failed the run."""
    if IN_CI:
        for report in terminalreporter.stats.get("skipped", []):
            terminalreporter.write_line(f"SKIPPED, which counts as failed here: {report.nodeid}")
