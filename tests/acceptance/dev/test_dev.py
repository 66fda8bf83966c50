"""`seamark dev` and the commands around it, as a newcomer runs them: real processes, real servers."""

import asyncio
import contextlib
import fcntl
import json
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TextIO

import psutil
import pytest

from ops.dev.servers import NatsServer, Valkey
from ops.exitcode import MISCONFIGURED
from seamark.protocol.subjects import log_subject, partition_of
from tests.support.commands import seamark
from tests.support.devstack import Stack
from tests.support.logs import all_records, connected, eventually
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(400)


def test_the_printed_command_delivers_a_first_notification(shared: Stack) -> None:
    printed = re.search(r"seamark (publish .*)$", shared.output.read_text(), re.MULTILINE)
    assert printed is not None
    subprocess.run(
        f"{sys.executable} -m ops {printed[1]}", shell=True, cwd=shared.folder, env=shared.env, check=True, timeout=90
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
            broker.publish("events.default.brigid.demo.hello", b'{"id":"e1","to":["brigid"],"data":{}}')
        broker.publish("events.default.brigid.demo.hello", b'{"id":"e2","to":["brigid"],"data":{}}')
        await eventually(lambda: _has(broker, "e2"))
        assert [entry.id for entry in await all_records(broker, 4) if entry.user == "brigid"] == ["e1", "e2"]
    lines = await asyncio.to_thread(shared.run, "tail", "brigid", "-n", "2", "--json")
    assert [json.loads(line)["record"]["id"] for line in lines.splitlines()] == ["e1", "e2"]


def test_a_crashed_server_is_restarted_on_its_data_and_that_is_said(battered: Stack) -> None:
    battered.run("publish", "--to", "anna", "--id", "anna-before")
    for server in ("nats-server", "valkey", "postgres"):
        battered.child(server).kill()
        is_restarted(battered, server)
    battered.run("publish", "--to", "anna", "--id", "anna-after")
    lines = battered.run("tail", "anna", "-n", "2", "--json").splitlines()
    assert [json.loads(line)["record"]["id"] for line in lines] == ["anna-before", "anna-after"]


def is_restarted(stack: Stack, name: str) -> None:
    """Returns when the stack has said that it starts this process again, as it was killed."""
    said = stack.output.read_text
    wait_for(lambda: f"{name} ended (SIGKILL), restarting" in said(), said=said)


async def _has(broker: object, event_id: str) -> bool:
    return any(entry.id == event_id for entry in await all_records(broker, 4))  # type: ignore[arg-type]


def test_a_crashed_role_is_restarted_and_that_is_said(battered: Stack) -> None:
    for role in ("dispatcher", "gateway"):
        battered.child(role).kill()
        is_restarted(battered, role)
    battered.run("publish", "--to", "berta", "--id", "berta-after")
    [line] = battered.run("tail", "berta", "-n", "1", "--json").splitlines()
    assert json.loads(line)["record"]["id"] == "berta-after"


def test_ctrl_c_leaves_no_process_and_a_second_run_goes_on_with_the_same_data(battered: Stack) -> None:
    before = battered.describe()
    assert battered.served("DELETE", "/v1/users/carol")[0] == 202
    battered.run("publish", "--to", "frieda", "--id", "frieda-first")
    cursor = json.loads(battered.run("tail", "frieda", "-n", "1", "--json"))["cursor"]
    family = battered.stop()
    assert not (battered.folder / ".seamark/dev.json").exists()
    assert len(family) >= 5
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    battered.start()
    after = battered.describe()
    assert (after.jwt_secret, after.api_key, after.nats_url) == (before.jwt_secret, before.api_key, before.nats_url)
    assert [user["id"] for user in battered.served("GET", "/v1/users")[1]["items"]] == ["alice", "bob"], (
        "carol stays away"
    )
    battered.run("publish", "--to", "frieda", "--id", "frieda-second")
    frame = json.loads(battered.run("tail", "frieda", "-n", "1", "--json", "--cursor", cursor))
    assert (frame["record"]["id"], frame["prev"]) == ("frieda-second", int(cursor.split(".")[1]))


def test_keys_to_the_stack_are_readable_by_its_owner_only(shared: Stack) -> None:
    for name in ("dev.json", "kept.json"):
        assert stat.S_IMODE((shared.folder / ".seamark" / name).stat().st_mode) == 0o600
    kept = shared.describe()
    logs = "".join(path.read_text(errors="replace") for path in (shared.folder / ".seamark").glob("*.log"))
    assert kept.jwt_secret not in logs
    assert kept.api_key not in logs


def test_a_second_stack_on_the_same_data_says_so(shared: Stack) -> None:
    done = seamark("dev", folder=shared.folder)
    assert done.returncode == MISCONFIGURED
    assert "a stack already runs" in done.stderr


def test_without_a_stack_a_command_names_the_remedy(tmp_path: Path) -> None:
    done = seamark("tail", "alice", folder=tmp_path)
    assert done.returncode == MISCONFIGURED
    assert "make run" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_suggested_commands_find_a_stack_in_a_folder_of_another_name(peculiar: Stack) -> None:
    with urllib.request.urlopen(f"{peculiar.describe().gateway_url}/dev/session", timeout=60) as answer:
        of_the_page = json.load(answer)["command"] + " --to alice --data '{}'"
    printed = re.findall(r"seamark ((?:publish|tail) .*)$", peculiar.output.read_text(), re.MULTILINE)
    assert [words.split()[0] for words in printed] == ["publish", "tail"]
    for command in (of_the_page.partition("seamark ")[2], printed[0], f"{printed[1]} -n 2 --json"):
        output = peculiar.run(*shlex.split(command))
    assert [json.loads(line)["record"]["data"] for line in output.splitlines()] == [{}, {"text": "hi"}]


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
        assert stack.served("GET", "/v1/users")[1]["items"] == [], "nobody is added to a database of somebody else's"
    finally:
        stack.stop()
    assert nats_server.alive
    assert valkey.alive


def written(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """The same settings, each as a file."""
    for name, value in settings.items():
        (folder / name).write_text(f"{value}\n")
    return {f"{name}_FILE": str(folder / name) for name in settings}


def test_what_was_left_in_the_shell_does_not_stand_against_what_the_stack_prints(peculiar: Stack) -> None:
    here = ["--folder", peculiar.data.name]
    peculiar.run("publish", *here, "--to", "linda", "--id", "linda-first")
    [line] = peculiar.run("tail", *here, "linda", "-n", "1", "--json").splitlines()
    assert json.loads(line)["record"]["id"] == "linda-first"
    assert "restarting" not in peculiar.output.read_text()


def test_a_port_that_is_taken_starts_nothing_and_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = seamark("dev", "--port", str(taken.getsockname()[1]), folder=tmp_path)
    assert done.returncode == MISCONFIGURED
    assert "--port" in done.stderr
    assert not (tmp_path / ".seamark/nats").exists()


def test_a_killed_stack_can_be_started_again_at_once_on_its_data(battered: Stack) -> None:
    battered.run("publish", "--to", "klara", "--id", "klara-before")
    family = battered.children()
    assert battered.process is not None
    battered.process.kill()
    battered.process.wait()
    battered.start()
    lines = battered.run("tail", "klara", "-n", "1", "--json").splitlines()
    assert [json.loads(line)["record"]["id"] for line in lines] == ["klara-before"]
    wait_for(lambda: not any(runs(process) for process in family), said=lambda: family)


def test_a_stack_that_is_ended_while_it_makes_its_database_holds_the_folder_until_that_is_done(tmp_path: Path) -> None:
    stack, making = making_its_database(tmp_path)
    assert stack.process is not None
    said = stack.output.read_text
    stack.process.send_signal(signal.SIGINT)
    with (stack.data / "lock").open() as lock:
        wait_for(lambda: locks(lock), every_seconds=0.005, said=said)
        assert not any(runs(process) for process in making)
    assert stack.process.wait(60) == 0, stack.output.read_text()
    stack.start()
    stack.stop()


def making_its_database(folder: Path) -> tuple[Stack, list[psutil.Process]]:
    """A stack in the midst of that, and who does it. Where it was over before we looked, another stack is started."""

    def makers(stack: Stack) -> list[psutil.Process]:
        found = []
        for child in stack.children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "initdb" in child.name():
                    found.append(child)
        return found

    for attempt in range(10):
        (folder / f"{attempt}").mkdir()
        stack = Stack(folder / f"{attempt}")
        stack.spawn()
        assert stack.process is not None
        said, found = stack.output.read_text, list[psutil.Process]()
        while not found and "applying topology" not in said():
            assert stack.process.poll() is None, said()
            time.sleep(0.005)  # a poll: its makers live for less than a second
            found = makers(stack)
        if found:
            return stack, found
        stack.close()
    raise AssertionError("ten databases were made between two looks each")


def locks(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended between the two
        return False


async def test_a_message_that_is_no_record_does_not_hide_the_log(battered: Stack) -> None:
    async def logged(count: int) -> bool:
        return len((await asyncio.to_thread(battered.run, "log", "carla", "--json")).splitlines()) == count

    await asyncio.to_thread(battered.run, "publish", "--to", "carla", "--id", "carlas-first")
    async with connected(battered.describe().nats_url) as broker:
        await eventually(lambda: _has(broker, "carlas-first"))
        subject = log_subject(partition_of("default", "carla", 4), "default", "carla")
        for payload in (b"not json [bold]", b"[1]", b"\xff"):
            await broker.append(subject, payload)
    await asyncio.to_thread(battered.run, "publish", "--to", "carla", "--id", "carlas-last")
    await eventually(lambda: logged(5), seconds=120)
    lines = battered.run("log", "carla", "--json").splitlines()
    records = [json.loads(line) for line in lines]
    assert [line["record"] and line["record"]["id"] for line in records] == [
        "carlas-first",
        None,
        None,
        None,
        "carlas-last",
    ]
    assert [line["raw"] for line in records[1:4]] == ["not json [bold]", "[1]", "\ufffd"]
    shown = await asyncio.to_thread(battered.run, "log", "carla")
    assert "not json [bold]" in shown
    assert "id carlas-last" in shown
