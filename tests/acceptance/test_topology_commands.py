"""`seamark topology` as an operator runs it: on which servers, by which profile, with what question, and what it leaves."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker
from engine.topology import server as topology
from ops.dev.child import free_port
from ops.dev.servers import NatsServer, Valkey
from ops.exitcode import FAILED, MISCONFIGURED
from tests.support import commands
from tests.support.commands import ENV
from tests.support.logs import FAST, connected, eventually

pytestmark = pytest.mark.timeout(240)


async def seamark(folder: Path, *words: str, answer: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `seamark topology`; without an answer its standard input is at its end."""
    return await asyncio.to_thread(commands.seamark, "topology", *words, folder=folder, text=answer or "", **env)


async def stream_names(broker: Broker) -> set[str]:
    return set((await broker.api("STREAM.NAMES")).get("streams") or ())


async def test_on_a_server_that_settings_name_the_profile_is_that_of_the_roles(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A fresh production server must not get one copy and four partitions for life because a flag was left out."""
    (tmp_path / "settings.toml").write_text(f'nats_url = "{nats_server.url}"\n')
    given = [{"SEAMARK_NATS_URL": nats_server.url}, {"SEAMARK_SETTINGS": "settings.toml"}]
    async with connected(nats_server.url) as broker:
        for env in given:
            done = await seamark(tmp_path, "apply", **env)
            assert done.returncode == MISCONFIGURED
            assert "is to have 3 copies" in done.stderr
            assert "--profile dev" in done.stderr
            assert await stream_names(broker) == set()
        (tmp_path / "profile").write_text("dev\n")
        done = await seamark(tmp_path, "apply", **given[0], SEAMARK_PROFILE_FILE="profile", SEAMARK_PARTITIONS="2")
        assert done.returncode == 0, done.stderr
        assert {"LOG-0", "LOG-1"} == {name for name in await stream_names(broker) if name.startswith("LOG-")}
        done = await seamark(tmp_path, "plan", "--profile", "dev", "--partitions", "0", **given[0])
        assert done.returncode == MISCONFIGURED
        assert "Choose 1 to 64" in done.stderr


async def test_what_existed_once_is_only_made_anew_when_that_is_said(nats_server: NatsServer, tmp_path: Path) -> None:
    env = {"SEAMARK_NATS_URL": nats_server.url, "SEAMARK_PROFILE": "dev"}
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev")
        await broker.api("STREAM.DELETE.LOG-2")
        done = await seamark(tmp_path, "apply", **env)
        assert done.returncode == MISCONFIGURED
        assert "LOG-2: it existed once" in done.stderr
        assert "nats stream restore" in done.stderr
        assert "LOG-2" not in await stream_names(broker)
        assert (await seamark(tmp_path, "plan", **env)).returncode == 2
        done = await seamark(tmp_path, "apply", "--recreate", "--json", **env)
        assert done.returncode == 0
        told = json.loads(done.stdout)
        assert any("create stream LOG-2" in line for line in told["done"])
        assert any("seamark topology repair" in note for note in told["notes"])
        assert "seamark topology repair" in done.stderr
        assert "LOG-2" in await stream_names(broker)


@pytest.fixture
async def to_repair(nats_server: NatsServer) -> NatsServer:
    """A server on which EVENTS has another epoch than the recorded one."""
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        await topology.restore(broker, ["EVENTS"], {"EVENTS": 0})
    return nats_server


async def recorded(server: NatsServer) -> bool:
    """Whether the repair was carried out."""
    async with connected(server.url) as broker:
        return (await topology.read_epochs(broker))[0] == await topology.actual_epochs(broker)


async def test_a_declined_repair_fails_and_changes_nothing_and_json_says_what_was_done(
    to_repair: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    env = {"SEAMARK_NATS_URL": to_repair.url, "SEAMARK_REDIS_URL": valkey.url}
    for answer in ("n\n", None):
        done = await seamark(tmp_path, "repair", answer=answer, **env)
        assert done.returncode == FAILED
        assert not await recorded(to_repair)
    done = await seamark(tmp_path, "repair", "--yes", "--json", **env)
    assert done.returncode == 0
    plan, result = map(json.loads, done.stdout.splitlines())
    [step] = plan["steps"]
    assert step["action"] == "replace_epochs"
    assert result["done"] == [f"~ replace epochs: {step['why'][0]}"]
    assert await recorded(to_repair)


async def test_nothing_is_connected_while_a_person_reads_the_plan(
    to_repair: NatsServer, valkey: Valkey, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ops", "topology", "repair"),
        cwd=tmp_path,
        env=ENV | {"SEAMARK_NATS_URL": to_repair.url, "SEAMARK_REDIS_URL": valkey.url},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdin
        assert process.stderr
        async with asyncio.timeout(90):
            assert b"Do this?" in await process.stderr.readuntil(b"]:")
        await eventually(lambda: to_repair.monitor("/connz").get("num_connections") == 0)
        await process.communicate(b"y\n")
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
    assert await recorded(to_repair)


async def test_a_redis_that_is_away_is_one_line_with_the_remedy_and_nothing_is_changed(
    to_repair: NatsServer, tmp_path: Path
) -> None:
    env = {"SEAMARK_NATS_URL": to_repair.url, "SEAMARK_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    done = await seamark(tmp_path, "repair", "--yes", "--forget-claims", **env)
    assert done.returncode == FAILED
    assert len(done.stderr.splitlines()) == 1
    assert "SEAMARK_REDIS_URL" in done.stderr
    assert not await recorded(to_repair)
    done = await seamark(tmp_path, "repair", "--yes", **env)
    assert done.returncode == 0, done.stderr
