"""Processes side by side under one parent: who is replaced, what ends all, what the parent's exit code says."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]

PARENT = """
import os, sys
from engine.telemetry import configure_logging
from ops import siblings

configure_logging("tested")
siblings.RESTART_SECONDS_MIN, siblings.STOP_SECONDS_MAX = 0.1, float(os.environ.get("STOP_SECONDS", "30"))
environments = [{**os.environ, "NUMBER": str(number)} for number in range(2)]
sys.exit(siblings.run_siblings("tested", [sys.executable, "-c", sys.argv[1]], environments))
"""

CHILD = """
import os, signal, sys, time
from pathlib import Path
from ops.siblings import say_up

number, folder = os.environ["NUMBER"], Path(os.environ["FOLDER"])
refused = folder / f"refused-{number}"
if refused.exists():
    sys.exit(int(refused.read_text()))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ.get(f"CODE_{number}", "0"))))
if number == os.environ.get("DEAF"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
say_up()
(folder / f"up-{number}").write_text(str(os.getpid()))
while True:
    time.sleep(0.01)
"""


class Family:
    """A parent, its children and its log."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.process = process
        self.folder = folder

    def eventually(self, look: Callable[[], object], seconds: float = 30) -> None:
        wait_for(look, seconds=seconds, said=(self.folder / "log").read_text)

    def pid(self, number: int) -> int:
        """Of the child that said so last."""
        path = self.folder / f"up-{number}"
        return int((path.exists() and path.read_text()) or 0)

    def said(self) -> list[dict[str, object]]:
        """The lines of the log that are whole: the last one may just be written."""
        whole, _, _ = (self.folder / "log").read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def family(folder: Path, **env: str) -> Iterator[Family]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FOLDER": str(folder), **env}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], env=env, stdout=log, stderr=log)
    try:
        yield Family(process, folder)
    finally:
        process.kill()
        process.wait()


def test_an_end_that_was_asked_for_has_the_worst_code_of_all(tmp_path: Path) -> None:
    deaf = {"DEAF": "1", "STOP_SECONDS": "1"}
    expected = [({}, 0), ({"CODE_0": "1"}, 1), ({"CODE_1": "78", "CODE_0": "1"}, 78), (deaf, 1)]
    with ExitStack() as stack:
        families = []
        for number, (env, _) in enumerate(expected):
            folder = tmp_path / str(number)
            folder.mkdir()
            families.append(stack.enter_context(family(folder, **env)))
        for running in families:
            running.eventually(lambda: running.pid(0) and running.pid(1))  # noqa: B023 - called before the next turn
            running.process.send_signal(signal.SIGTERM)
        assert [running.process.wait(60) for running in families] == [code for _, code in expected]


def test_one_that_asks_for_another_configuration_before_it_was_up_ends_all(tmp_path: Path) -> None:
    (tmp_path / "refused-1").write_text("78")
    with family(tmp_path) as running:
        assert running.process.wait(60) == 78
    if running.pid(0):
        assert not psutil.pid_exists(running.pid(0))


def test_one_that_asks_for_another_configuration_later_leaves_the_others_alone_and_comes_back(tmp_path: Path) -> None:
    with family(tmp_path) as running:
        running.eventually(lambda: running.pid(0) and running.pid(1))
        untouched, victim = running.pid(0), running.pid(1)
        (tmp_path / "refused-1").write_text("78")
        os.kill(victim, signal.SIGKILL)
        running.eventually(lambda: [line["code"] for line in running.said()].count(78) >= 2)
        assert running.process.poll() is None
        assert running.pid(0) == untouched
        assert psutil.pid_exists(untouched)
        pauses = [line["restart_seconds"] for line in running.said()]
        assert pauses[:3] == [0.1, 0.2, 0.4]
        (tmp_path / "refused-1").unlink()
        running.eventually(lambda: running.pid(1) != victim)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0


def test_one_that_fails_at_its_start_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "refused-0").write_text("1")
    with family(tmp_path) as running:
        running.eventually(lambda: len(running.said()) >= 2)
        (tmp_path / "refused-0").unlink()
        running.eventually(lambda: running.pid(0) and running.pid(1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals children of a dead parent")
def test_none_outlives_the_parent(tmp_path: Path) -> None:
    with family(tmp_path) as running:
        running.eventually(lambda: running.pid(0) and running.pid(1))
        children = psutil.Process(running.process.pid).children()
        running.process.kill()
        running.process.wait()
        assert psutil.wait_procs(children, timeout=30)[1] == []
