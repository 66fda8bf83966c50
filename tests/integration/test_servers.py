"""The embedded servers keep data and port through stop and kill, and die with the process that started them."""

import os
import pwd
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import asyncpg
import nats
import pytest
import redis.asyncio

from engine.limits import BATCH_MESSAGES_MAX, PULL_MESSAGES_MAX
from ops.dev import stores
from ops.dev.child import ServerFailed, free_port, is_free
from ops.dev.servers import Change, NatsCluster, NatsServer, Postgres, Valkey
from seamark.protocol.limits import RECORD_BYTES_MAX
from tests.support.clones import copy_postgres
from tests.support.overlays import UNSYNCED
from tests.support.servers import end
from tests.support.waiting import wait_for


async def test_nats_keeps_stored_messages_and_its_port_when_killed_and_started_again(nats_server: NatsServer) -> None:
    url = nats_server.url
    client = await nats.connect(url)
    stream = client.jetstream(timeout=30)
    await stream.add_stream(name="KEPT", subjects=["kept.>"])
    await stream.publish("kept.1", b"one")
    await client.close()

    nats_server.restart(kill=True)

    assert nats_server.url == url
    client = await nats.connect(url)
    assert (await client.jetstream(timeout=30).get_msg("KEPT", 1)).data == b"one"
    await client.close()


def test_a_suspended_nats_server_answers_nothing_until_it_is_resumed(nats_server: NatsServer) -> None:
    with (
        socket.create_connection(("127.0.0.1", nats_server.port), timeout=30) as connection,
        connection.makefile("rb") as lines,
    ):
        assert lines.readline().startswith(b"INFO")
        connection.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
        assert lines.readline() == b"PONG\r\n"

        nats_server.suspend()
        connection.sendall(b"PING\r\n")
        readable, _, _ = select.select([connection], [], [], 0.5)
        assert readable == []

        nats_server.resume()
        assert lines.readline() == b"PONG\r\n"


async def test_the_servers_configuration_file_runs_with_other_addresses_and_the_store_asked_for(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "a folder" / "nats")
    try:
        server.start()
        stored = wait_for(lambda: server.monitor("/varz"))["jetstream"]["config"]
        assert stored["store_dir"].startswith(str(tmp_path / "a folder/nats/store"))
        assert stored["sync_always"] is True
    finally:
        server.kill()


def test_the_shipped_configuration_takes_the_largest_pull_and_batch_that_the_engine_asks_for(
    nats_server: NatsServer,
) -> None:
    limits = wait_for(lambda: nats_server.monitor("/varz"))["jetstream"]["limits"]
    assert limits["max_request_batch"] == PULL_MESSAGES_MAX
    assert limits["max_batch_size"] == BATCH_MESSAGES_MAX
    assert nats_server.max_payload_bytes > RECORD_BYTES_MAX


async def test_a_cluster_has_a_leader_for_a_replicated_stream_and_survives_its_death(nats_cluster: NatsCluster) -> None:
    client = await nats.connect(nats_cluster.urls)
    await client.jetstream(timeout=30).add_stream(name="KEPT", subjects=["kept.>"], num_replicas=3)
    leader = wait_for(lambda: nats_cluster.leader_of("KEPT"))
    leader.kill()
    successor = wait_for(lambda: (found := nats_cluster.leader_of("KEPT")) is not leader and found)
    assert successor.alive
    await client.close()


async def test_valkey_never_evicts_and_keeps_what_it_was_told(tmp_path: Path) -> None:
    server = Valkey(tmp_path / "valkey")
    try:
        server.start()
        async with redis.asyncio.from_url(server.url) as client:
            assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"
            await client.set("kept", "one")
        server.restart()
        async with redis.asyncio.from_url(server.url) as client:
            assert await client.get("kept") == b"one"
    finally:
        server.kill()


async def test_postgres_keeps_its_data_and_asks_for_the_password(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "postgres", overlay=UNSYNCED)
    try:
        server.start()
        connection = await asyncpg.connect(server.url)
        await connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
        await connection.close()
        server.restart()
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("SELECT one FROM kept") == 1
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(f"postgresql://postgres:wrong@127.0.0.1:{server.port}/postgres")
    finally:
        end(server)


async def test_a_postgres_that_was_killed_starts_again_once_the_last_of_its_processes_has_ended(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "postgres", overlay=UNSYNCED)
    try:
        server.start()
        connection = await asyncpg.connect(server.url)
        backend = await connection.fetchval("SELECT pg_backend_pid()")
        os.kill(backend, signal.SIGSTOP)
        server.kill()
        later = threading.Timer(1.5, os.kill, (backend, signal.SIGCONT))
        later.start()
        server.start()
        later.join()
        connection.terminate()
        again = await asyncpg.connect(server.url)
        assert await again.fetchval("SELECT 1") == 1
        await again.close()
    finally:
        end(server)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks where Linux tells what a process may do")
def test_postgres_runs_without_any_capability_and_never_as_root(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "postgres", overlay=UNSYNCED)
    try:
        server.start()
        lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapAmb"], 16) == 0
        users = {int(user) for user in status["Uid"].split()}
        assert users == {os.getuid() or pwd.getpwnam("nobody").pw_uid}
    finally:
        end(server)


async def test_a_postgres_whose_programs_only_we_can_reach_runs_and_leaves_no_copy_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    copy_postgres(locked)
    installed = replace(stores.postgres_installation(), root=locked)
    monkeypatch.setattr(stores, "postgres_installation", lambda: installed)
    server = Postgres(locked / "data", overlay=UNSYNCED)
    link = locked / "data/programs"
    try:
        server.start()
        assert link.is_symlink() == (os.geteuid() == 0)  # another user runs the programs himself
        copy = link.resolve()
        server.kill()
        server.start()  # a copy that was left is used again, not made once more
        assert link.resolve() == copy
        connection = await asyncpg.connect(server.url)
        assert await connection.fetchval("SELECT count(*) FROM pg_timezone_names") > 100  # read from the copied files
        await connection.close()
    finally:
        end(server)
    assert not link.is_symlink()
    assert not copy.exists()


async def test_each_test_gets_a_database_of_its_own(empty_postgres: str) -> None:
    connection = await asyncpg.connect(empty_postgres)
    assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    await connection.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats", overlay=(Change("no_such_option", "1", "to be refused"),))
    with pytest.raises(ServerFailed, match="no_such_option"):
        server.start()


def test_a_free_port_is_one_a_reconnecting_client_cannot_be_given() -> None:
    port = free_port()
    assert is_free(port)
    assert port < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals children of a dead parent")
def test_no_server_survives_the_sigkill_of_the_process_that_started_it(tmp_path: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from ops.dev.servers import NatsServer, Postgres, Valkey
        data = Path(sys.argv[1])
        servers = [NatsServer(data / "n"), Valkey(data / "v"), Postgres(data / "p")]
        for server in servers:
            server.start()
        print(*(server.pid for server in servers), flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not any(runs(pid) for pid in pids))


def runs(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between the opening and the reading
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks where Linux keeps shared memory")
async def test_a_postgres_that_is_killed_leaves_no_shared_memory_of_the_system_but_one_segment_for_its_lock(
    tmp_path: Path,
) -> None:
    server = Postgres(tmp_path / "postgres", overlay=UNSYNCED)
    try:
        server.start()
        connection = await asyncpg.connect(server.url)
        kinds = await connection.fetch("SELECT name, setting FROM pg_settings WHERE name LIKE '%shared_memory_type'")
        assert dict(kinds) == {"shared_memory_type": "mmap", "dynamic_shared_memory_type": "mmap"}
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        await connection.close()
        assert "/dev/shm/PostgreSQL" not in maps  # its files may lie in memory, too
    finally:
        end(server)


def test_a_postgres_that_is_stopped_is_given_the_time_for_its_last_checkpoint(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "postgres", overlay=UNSYNCED)
    try:
        server.start()
        server.stop()
        assert server.child.exit_code == 0
        assert server.stop_seconds_max >= 60
    finally:
        end(server)
