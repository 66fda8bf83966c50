"""A role as a process: what its health port says, how it ends, what its exit code means."""

import json
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ops.dev.child import free_port

ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio, sys
from engine.errors import TopologyError, Unavailable
from engine.settings import load_settings
from ops.process import run_role

{work}

sys.exit(run_role("tested", load_settings(), work, stop_seconds_max={stop_seconds}))
"""

SERVES = """
    async def work(stop, health):
        health.not_ready = lambda: []
        await stop.wait()
"""


class Role:
    """A running role and the lines it has logged."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, object]] = []

    def said(self, event: str) -> dict[str, object]:
        """Read the log until this happening."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"] == event:
                    return self.lines[-1]
        raise AssertionError(f"{event} was never logged: {self.lines}")

    def get(self, path: str) -> tuple[int, str]:
        port = next(line["health_port"] for line in self.lines if line["event"] == "role_starting")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@contextmanager
def role(work: str, *, stop_seconds: float = 60, **env: str) -> Iterator[Role]:
    program = PROGRAM.format(work=textwrap.dedent(work), stop_seconds=stop_seconds)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield Role(process)
        finally:
            process.kill()


def test_a_role_is_alive_at_once_and_ready_when_it_says_so() -> None:
    work = """
        async def work(stop, health):
            await stop.wait()
    """
    with role(work) as running:
        running.said("role_starting")
        assert running.get("/healthz")[0] == 200
        assert running.get("/readyz") == (503, '{"status": "not ready", "reasons": ["starting"]}')
        assert "process_resident_memory_bytes" in running.get("/metrics")[1]
    with role(SERVES) as running:
        running.said("role_starting")
        deadline = time.monotonic() + 30
        while running.get("/readyz")[0] != 200:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_role_end_its_work_and_is_no_failure(signum: signal.Signals) -> None:
    with role(SERVES) as running:
        running.said("role_starting")
        running.process.send_signal(signum)
        running.said("role_stopped")
        assert running.process.wait(30) == 0


def test_a_role_that_does_not_end_in_time_is_cut_off() -> None:
    work = """
        async def work(stop, health):
            await asyncio.Event().wait()
    """
    with role(work, stop_seconds=0.3) as running:
        running.said("role_starting")
        running.process.send_signal(signal.SIGTERM)
        running.said("role_cut_off")
        assert running.process.wait(30) == 1


def test_the_first_task_that_fails_ends_the_role_with_one_line_and_code_1() -> None:
    work = """
        async def fail():
            raise RuntimeError("broken")

        async def work(stop, health):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stop.wait(), name="waits")
                tasks.create_task(fail(), name="fails")
    """
    with role(work) as running:
        assert running.said("role_failed")["why"] == "RuntimeError('broken')"
        assert running.process.stdout is not None
        left = [json.loads(line)["event"] for line in running.process.stdout]
        assert set(left) <= {"role_left_tasks_behind"}, "which a process says whose end takes long"
        assert running.process.wait(30) == 1


def test_work_that_ends_unasked_is_a_failure() -> None:
    work = """
        async def work(stop, health):
            return
    """
    with role(work) as running:
        running.said("role_ended")
        assert running.process.wait(30) == 1


def test_what_only_an_operator_can_mend_has_an_exit_code_of_its_own() -> None:
    work = """
        async def work(stop, health):
            raise TopologyError("four partitions, not eight", "Change SEAMARK_PARTITIONS.")
    """
    with role(work) as running:
        assert "SEAMARK_PARTITIONS" in str(running.said("cannot_go_on")["why"])
        assert running.process.wait(30) == 78


def test_a_health_port_that_is_taken_is_said() -> None:
    port = str(free_port())
    with role(SERVES, SEAMARK_HEALTH_PORT=port) as first:
        first.said("role_starting")
        with role(SERVES, SEAMARK_HEALTH_PORT=port) as second:
            why = str(second.said("cannot_start")["why"])
            assert port in why
            assert "SEAMARK_HEALTH_PORT" in why
            assert second.process.wait(30) == 78


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_ends_no_role() -> None:
    port = free_port()
    program = PROGRAM.format(work=textwrap.dedent(SERVES), stop_seconds=60)
    env = {"PYTHONPATH": str(ROOT), "SEAMARK_HEALTH_PORT": str(port)}
    with Path("/dev/full").open("wb") as full:
        process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=full, stderr=subprocess.PIPE)
    with process:
        try:
            until_ready(port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_log_whose_reader_has_gone_ends_no_role() -> None:
    port = free_port()
    with role(SERVES, SEAMARK_HEALTH_PORT=str(port)) as running:
        assert running.process.stdout is not None
        running.process.stdout.close()
        until_ready(port)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0


def until_ready(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_tracebacks_of_libraries_reach_the_log_as_data_and_show_no_values() -> None:
    work = """
        import logging

        async def work(stop, health):
            try:
                payload = "hidden"
                raise RuntimeError("broken")
            except RuntimeError:
                logging.getLogger("a.library").exception("it failed")
            await stop.wait()
    """
    with role(work) as running:
        line = running.said("it failed")
        assert line["exception"][0]["exc_value"] == "broken"
        assert line["exception"][0]["frames"][-1]["name"] == "work"
        assert "exc_info" not in line
        assert "hidden" not in json.dumps(line)


def test_people_see_tracebacks_without_the_values_of_variables() -> None:
    work = """
        import structlog

        async def work(stop, health):
            payload = "hid" + "den"
            raise RuntimeError("broken")
    """
    with role(work, SEAMARK_LOG_FORMAT="console") as running:
        shown, _ = running.process.communicate(timeout=30)
    assert "RuntimeError: broken" in shown
    assert "hidden" not in shown


def test_a_task_that_does_not_end_does_not_keep_the_process() -> None:
    work = """
        async def stubborn():
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass

        async def work(stop, health):
            left = asyncio.create_task(stubborn())
            await stop.wait()
    """
    with role(work) as running:
        running.said("role_starting")
        running.process.send_signal(signal.SIGTERM)
        running.said("role_stopped")
        assert running.process.wait(30) == 0
