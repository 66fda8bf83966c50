"""Commands without a server: one line that says what is wrong, and nothing on standard output for a program to trip over."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from seamark.dev.child import free_port
from seamark.exitcode import MISCONFIGURED
from tests.support.devstack import ROOT

ENV = {key: value for key, value in os.environ.items() if not key.startswith("SEAMARK_")} | {"PYTHONPATH": str(ROOT)}


def seamark(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seamark", *words],
        cwd=folder,
        env=ENV | env,
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_a_broker_that_is_away_is_one_line_on_standard_error(tmp_path: Path) -> None:
    env = {"SEAMARK_NATS_URL": f"nats://127.0.0.1:{free_port()}"}
    commands = [("publish", "--to", "alice"), ("log", "alice"), ("topology", "plan")]
    with ThreadPoolExecutor() as side_by_side:  # each of them waits ten seconds for a server to come
        for done in side_by_side.map(lambda words: seamark(tmp_path, *words, "--json", **env), commands):
            assert done.returncode == 1
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            assert "127.0.0.1" in done.stderr


def test_tail_says_when_it_is_not_connected_and_goes_on_trying(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    url = f"http://127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [sys.executable, "-m", "seamark", "tail", "alice", "--url", url, "--token-file", "token", "--json"],
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tail:
        try:
            assert tail.stderr is not None
            assert tail.stderr.readline().startswith(f"not connected to {url}, trying again")
            assert tail.stderr.readline().startswith("not connected")
        finally:
            tail.kill()


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("publish", "--to", "alice", "--data", "{"), "--data"),
        (("publish", "--to", "alice", "--data", "@nothing"), "--data"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_a_mistake_is_answered_with_its_remedy(tmp_path: Path, words: tuple[str, ...], remedy: str) -> None:
    done = seamark(tmp_path, *words)
    assert done.returncode == 1
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("tail", "alice"), "make run"),
        (("token", "alice"), "make run"),
        (("topology", "check"), "make run"),
        (("topology", "render", "x", "--partitions", "0"), "Choose 1 to 64"),
        (("topology", "render", "x", "--profile", "prod"), "Choose one of dev, production"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_what_is_missing_or_wrong_before_anything_was_tried_has_an_exit_code_of_its_own(
    tmp_path: Path, words: tuple[str, ...], remedy: str
) -> None:
    done = seamark(tmp_path, *words)
    assert done.returncode == MISCONFIGURED
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["gateway", "gateway --processes 2", "dispatcher", "projector", "dev", "log alice"])
def test_a_wrong_setting_starts_nothing_and_is_named(tmp_path: Path, words: str) -> None:
    done = seamark(tmp_path, *words.split(), SEAMARK_HEALTH_PORT="many", SEAMARK_NATS_URL="nats://127.0.0.1:1")
    assert done.returncode == MISCONFIGURED
    assert "SEAMARK_HEALTH_PORT" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variable", ["SEAMARK_NATS_URL", "SEAMARK_REDIS_URL", "SEAMARK_POSTGRES_URL"])
def test_the_stack_reads_a_server_from_a_file_as_roles_do(tmp_path: Path, variable: str) -> None:
    done = seamark(tmp_path, "dev", **{f"{variable}_FILE": "nowhere"})
    assert done.returncode == MISCONFIGURED
    assert f"{variable}_FILE" in done.stderr
    assert not (tmp_path / ".seamark/nats").exists()


def test_help_names_every_command(tmp_path: Path) -> None:
    done = seamark(tmp_path, "--help")
    assert done.returncode == 0
    for name in ("dev", "gateway", "dispatcher", "topology", "publish", "tail", "token", "log"):
        assert name in done.stdout
