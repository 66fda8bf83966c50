"""`seamark dev` and the commands around it, as a newcomer runs them: real processes, real servers."""

import asyncio
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil
import pytest

from ops.dev.servers import NatsServer, Valkey
from ops.exitcode import MISCONFIGURED
from seamark.protocol.subjects import log_subject, partition_of
from tests.support.devstack import Stack
from tests.support.forks import ROOT
from tests.support.logs import all_records, connected, eventually
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack that the test may hurt."""
    with _running(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that several tests use, each as a user of its own."""
    with _running(tmp_path_factory.mktemp("shared")) as running:
        yield running


@contextmanager
def _running(folder: Path) -> Iterator[Stack]:
    stack = Stack(folder)
    stack.start()
    yield stack
    if stack.process is not None and stack.process.poll() is None:
        stack.stop()


def test_the_printed_command_delivers_a_first_notification(shared: Stack) -> None:
    printed = re.search(r"seamark (publish .*)$", shared.output.read_text(), re.MULTILINE)
    assert printed is not None
    subprocess.run(
        f"{sys.executable} -m ops {printed[1]}", shell=True, cwd=shared.folder, env=shared.env, check=True, timeout=30
    )
    [line] = shared.run("tail", "alice", "-n", "1", "--json").splitlines()
    frame = json.loads(line)
    assert frame["record"]["data"] == {"text": "hi"}
    assert frame["prev"] < frame["seq"]
    assert frame["cursor"].endswith(f".{frame['seq']}")
    shown = shared.run("tail", "alice", "-n", "1")
    assert f"seq {frame['seq']}" in shown
    assert f"cursor {frame['cursor']}" in shown
    assert "demo.hello" in shared.run("log", "alice")


async def test_a_plain_core_publish_is_delivered_and_the_same_id_again_adds_nothing(shared: Stack) -> None:
    async with connected(shared.describe().nats_url) as broker:
        for _ in range(2):
            broker.publish("events.default.bob.demo.hello", b'{"id":"e1","to":["bob"],"data":{}}')
        broker.publish("events.default.bob.demo.hello", b'{"id":"e2","to":["bob"],"data":{}}')
        await eventually(lambda: _has(broker, "e2"))
        assert [entry.id for entry in await all_records(broker, 4) if entry.user == "bob"] == ["e1", "e2"]
    lines = await asyncio.to_thread(shared.run, "tail", "bob", "-n", "2", "--json")
    assert [json.loads(line)["record"]["id"] for line in lines.splitlines()] == ["e1", "e2"]


def test_a_crashed_server_is_restarted_on_its_data_and_that_is_said(stack: Stack) -> None:
    stack.run("publish", "--to", "alice", "--id", "before")
    for server in ("nats-server", "valkey", "postgres"):
        [victim] = [
            child
            for child in stack.children()
            if Path(child.exe()).name.startswith(server) and child.ppid() == stack.pid
        ]
        victim.kill()
        is_restarted(stack, server)
    stack.run("publish", "--to", "alice", "--id", "after")
    lines = stack.run("tail", "alice", "-n", "2", "--json", timeout=60).splitlines()
    assert [json.loads(line)["record"]["id"] for line in lines] == ["before", "after"]


def is_restarted(stack: Stack, name: str) -> None:
    """Returns when the stack has said that it starts this process again, as it was killed."""
    said = stack.output.read_text
    wait_for(lambda: f"{name} ended (SIGKILL), restarting" in said(), said=said)


async def _has(broker: object, event_id: str) -> bool:
    return any(entry.id == event_id for entry in await all_records(broker, 4))  # type: ignore[arg-type]


def test_a_crashed_role_is_restarted_and_that_is_said(stack: Stack) -> None:
    for role in ("dispatcher", "gateway"):
        [victim] = [child for child in stack.children() if role in child.cmdline()]
        victim.kill()
        is_restarted(stack, role)
    stack.run("publish", "--to", "alice", "--id", "after")
    [line] = stack.run("tail", "alice", "-n", "1", "--json", timeout=60).splitlines()
    assert json.loads(line)["record"]["id"] == "after"


def test_ctrl_c_leaves_no_process_and_a_second_run_goes_on_with_the_same_data(stack: Stack) -> None:
    before = stack.describe()
    stack.run("publish", "--to", "alice", "--id", "first")
    cursor = json.loads(stack.run("tail", "alice", "-n", "1", "--json"))["cursor"]
    family = stack.stop()
    assert not (stack.folder / ".seamark/dev.json").exists()
    assert len(family) >= 5
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    stack.start()
    after = stack.describe()
    assert (after.jwt_secret, after.api_key, after.nats_url) == (before.jwt_secret, before.api_key, before.nats_url)
    stack.run("publish", "--to", "alice", "--id", "second")
    frame = json.loads(stack.run("tail", "alice", "-n", "1", "--json", "--cursor", cursor))
    assert (frame["record"]["id"], frame["prev"]) == ("second", int(cursor.split(".")[1]))


def test_keys_to_the_stack_are_readable_by_its_owner_only(shared: Stack) -> None:
    for name in ("dev.json", "kept.json"):
        assert stat.S_IMODE((shared.folder / ".seamark" / name).stat().st_mode) == 0o600
    kept = shared.describe()
    logs = "".join(path.read_text(errors="replace") for path in (shared.folder / ".seamark").glob("*.log"))
    assert kept.jwt_secret not in logs
    assert kept.api_key not in logs


def test_a_second_stack_on_the_same_data_says_so(shared: Stack) -> None:
    argv = [sys.executable, "-m", "ops", "dev"]
    done = subprocess.run(argv, cwd=shared.folder, env=shared.env, capture_output=True, text=True, timeout=30)
    assert done.returncode == MISCONFIGURED
    assert "a stack already runs" in done.stderr


def test_without_a_stack_a_command_names_the_remedy(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SEAMARK_")}
    argv = [sys.executable, "-m", "ops", "tail", "alice"]
    done = subprocess.run(
        argv, cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == MISCONFIGURED
    assert "make run" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_suggested_commands_find_a_stack_in_a_folder_of_another_name(tmp_path: Path) -> None:
    stack = Stack(tmp_path, data="data here")
    stack.start()
    try:
        described = stack.describe()
        with urllib.request.urlopen(f"{described.gateway_url}/dev/session", timeout=10) as answer:
            of_the_page = json.load(answer)["command"] + " --to alice --data '{}'"
        printed = re.findall(r"seamark ((?:publish|tail) .*)$", stack.output.read_text(), re.MULTILINE)
        assert [words.split()[0] for words in printed] == ["publish", "tail"]
        for command in (of_the_page.partition("seamark ")[2], printed[0], f"{printed[1]} -n 2 --json"):
            output = stack.run(*shlex.split(command))
        assert [json.loads(line)["record"]["data"] for line in output.splitlines()] == [{}, {"text": "hi"}]
    finally:
        stack.stop()


@pytest.mark.parametrize("as_files", [False, True], ids=["by value", "by file"])
def test_servers_named_in_the_environment_are_used_and_left_running(
    as_files: bool, tmp_path: Path, nats_server: NatsServer, valkey: Valkey, empty_postgres: str
) -> None:
    urls = {
        "SEAMARK_NATS_URL": nats_server.url,
        "SEAMARK_REDIS_URL": valkey.url,
        "SEAMARK_POSTGRES_URL": empty_postgres,
    }
    stack = Stack(tmp_path, **(written(tmp_path, urls) if as_files else urls))
    stack.start()
    try:
        described = stack.describe()
        assert (described.nats_url, described.redis_url, described.postgres_url) == tuple(urls.values())
        stack.run("publish", "--to", "alice", "--id", "outside")
        [line] = stack.run("tail", "alice", "-n", "1", "--json").splitlines()
        assert json.loads(line)["record"]["id"] == "outside"
        assert not (tmp_path / ".seamark/nats").exists()
    finally:
        stack.stop()
    assert nats_server.alive
    assert valkey.alive


def written(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """The same settings, each as a file."""
    for name, value in settings.items():
        (folder / name).write_text(f"{value}\n")
    return {f"{name}_FILE": str(folder / name) for name in settings}


def test_what_was_left_in_the_shell_does_not_stand_against_what_the_stack_prints(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('jwt_issuer = "https://issuer"\npartitions = 8\n')
    left = {
        "SEAMARK_SETTINGS": str(tmp_path / "settings.toml"),
        "SEAMARK_HEALTH_PORT": "9100",
        "SEAMARK_JWT_AUDIENCE": "audience",
        "SEAMARK_POSTGRES_URL": "",
    }
    stack = Stack(tmp_path, **left)
    stack.start()
    try:
        stack.run("publish", "--to", "alice", "--id", "first")
        [line] = stack.run("tail", "alice", "-n", "1", "--json").splitlines()
        assert json.loads(line)["record"]["id"] == "first"
        assert "restarting" not in stack.output.read_text()
    finally:
        stack.stop()


def test_a_port_that_is_taken_starts_nothing_and_is_named(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        stack.words = ["--port", str(taken.getsockname()[1])]
        argv = [sys.executable, "-m", "ops", "dev", *stack.words]
        done = subprocess.run(argv, cwd=tmp_path, env=stack.env, capture_output=True, text=True, timeout=30)
    assert done.returncode == MISCONFIGURED
    assert "--port" in done.stderr
    assert not (tmp_path / ".seamark/nats").exists()


def test_a_killed_stack_can_be_started_again_at_once_on_its_data(stack: Stack) -> None:
    stack.run("publish", "--to", "alice", "--id", "before")
    family = stack.children()
    assert stack.process is not None
    stack.process.kill()
    stack.process.wait()
    stack.start()
    lines = stack.run("tail", "alice", "-n", "1", "--json").splitlines()
    assert [json.loads(line)["record"]["id"] for line in lines] == ["before"]
    assert not any(runs(process) for process in family)


def test_a_stack_that_is_ended_while_it_makes_its_database_holds_the_folder_until_that_is_done(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    with stack.output.open("wb") as output:
        argv = [sys.executable, "-m", "ops", "dev", *stack.words]
        stack.process = subprocess.Popen(argv, cwd=tmp_path, env=stack.env, stdout=output, stderr=output)
    # Both are looked at often, as a database is made within a second.
    said = stack.output.read_text
    making = wait_for(
        lambda: [child for child in stack.children() if "initdb" in child.name()], every_seconds=0.005, said=said
    )
    stack.process.send_signal(signal.SIGINT)
    with (stack.data / "lock").open() as lock:
        wait_for(lambda: locks(lock), every_seconds=0.005, said=said)
        assert not any(runs(process) for process in making)
    assert stack.process.wait(60) == 0, stack.output.read_text()
    stack.start()
    stack.stop()


def locks(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


async def test_a_message_that_is_no_record_does_not_hide_the_log(stack: Stack) -> None:
    async def logged(count: int) -> bool:
        return len((await asyncio.to_thread(stack.run, "log", "alice", "--json")).splitlines()) == count

    await asyncio.to_thread(stack.run, "publish", "--to", "alice", "--id", "first")
    async with connected(stack.describe().nats_url) as broker:
        await eventually(lambda: _has(broker, "first"))
        subject = log_subject(partition_of("default", "alice", 4), "default", "alice")
        for payload in (b"not json [bold]", b"[1]", b"\xff"):
            await broker.append(subject, payload)
    await asyncio.to_thread(stack.run, "publish", "--to", "alice", "--id", "last")
    await eventually(lambda: logged(5), seconds=30)
    lines = stack.run("log", "alice", "--json").splitlines()
    records = [json.loads(line) for line in lines]
    assert [line["record"] and line["record"]["id"] for line in records] == ["first", None, None, None, "last"]
    assert [line["raw"] for line in records[1:4]] == ["not json [bold]", "[1]", "\ufffd"]
    shown = await asyncio.to_thread(stack.run, "log", "alice")
    assert "not json [bold]" in shown
    assert "id last" in shown
