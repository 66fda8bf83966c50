"""`make run` in a fresh clone, wherever it lies, whatever else runs on the machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.cli.target import DevFile, read_dev_file
from tests.support.clones import clone
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(480)

READY_SECONDS_MAX = 150.0
USUAL_PORT = 8080
OTHERS_SECONDS_MAX = 120.0


class Run:
    """A `make run` in a clone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SEAMARK_", "PYTHON", "VIRTUAL_ENV", "MAKE", "ARGS"))
        }
        with self.output.open("wb") as output:
            self.make = subprocess.Popen(
                ["make", "run"], cwd=folder, env=self.env, stdout=output, stderr=output, start_new_session=True
            )

    def described(self) -> DevFile:
        """Where everything is, once it runs."""

        def written() -> bool:
            assert self.make.poll() is None, self.output.read_text()
            return (self.folder / ".seamark/dev.json").exists()

        wait_for(written, seconds=READY_SECONDS_MAX, said=self.output.read_text)
        return read_dev_file(self.folder / ".seamark")

    def seamark(self, *words: str) -> str:
        argv = [".venv/bin/seamark", *words]
        done = subprocess.run(argv, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def delivers(self, event: str) -> bool:
        """Whether the one who is named as the event gets it."""
        self.seamark("publish", "--to", event, "--id", event)
        [line] = self.seamark("tail", event, "-n", "1", "--json").splitlines()
        return bool(json.loads(line)["record"]["id"] == event)

    def stop(self) -> None:
        """Ctrl-C, as a terminal sends it: to make and what it runs."""
        if self.make.poll() is None:
            os.killpg(self.make.pid, signal.SIGINT)
            self.make.wait(90)


@contextlib.contextmanager
def running(*folders: Path) -> Iterator[list[Run]]:
    runs: list[Run] = []
    try:
        runs += map(Run, folders)  # at the same moment: none waits for another
        yield runs
    finally:
        for run in runs:
            run.stop()


@contextlib.contextmanager
def usual_port_taken() -> Iterator[None]:
    """By us. Other tests have it for a while; whoever has it for longer than those keeps it."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deadline = time.monotonic() + OTHERS_SECONDS_MAX
        while not bound(taken) and time.monotonic() < deadline:
            time.sleep(0.1)  # asked again until the deadline; that somebody else holds it is as good
        yield


def bound(taken: socket.socket) -> bool:
    try:
        taken.bind(("127.0.0.1", USUAL_PORT))
        taken.listen()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody but us may enter, such as root's home."""
    folder = tmp_path_factory.mktemp("clones") / "home"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="module")
def one(locked: Path) -> Path:
    """A clone that several tests run: fresh for the first of them."""
    return clone(locked / "one")


def test_make_run_works_in_a_clone_below_a_folder_that_others_may_not_enter_while_the_usual_port_is_taken(
    one: Path,
) -> None:
    with usual_port_taken(), running(one) as [run]:
        assert not run.described().gateway_url.endswith(f":{USUAL_PORT}")
        assert run.delivers("first")
    copies = [path for path in (one / ".seamark/postgres").iterdir() if path.is_symlink()]
    assert copies == []  # what was copied for PostgreSQL's user went with it


def test_two_clones_run_side_by_side_and_deliver_each_its_own(one: Path, locked: Path) -> None:
    with running(one, clone(locked / "two")) as runs:
        described = [run.described() for run in runs]
        for kind in ("gateway_url", "nats_url", "redis_url", "postgres_url"):
            assert getattr(described[0], kind).rpartition(":")[2] != getattr(described[1], kind).rpartition(":")[2]
        for number, run in enumerate(runs):
            assert run.delivers(f"of-{number}")
