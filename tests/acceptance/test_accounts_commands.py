"""Commands against a broker with accounts: whoever is named, in the address or apart, gets the answers meant for it."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.broker.jetstream import connect
from engine.topology import server as topology
from ops.dev.servers import NatsServer
from seamark import Publisher
from tests.support.commands import ENV, seamark, started
from tests.support.topology import Overrides, password, running_with_accounts, settings_for
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(240)

SMALL = Overrides(stream_bytes=dict.fromkeys(("EVENTS", "BULK", "LOG", "RECEIPTS", "DEAD-LETTERS"), 1 << 24))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NatsServer]:
    with running_with_accounts(tmp_path / "nats", monkeypatch) as started:
        asyncio.run(make_topology(started))
        yield started


async def make_topology(server: NatsServer) -> None:
    broker = await connect(settings_for(server.url, "provisioner"))
    try:
        await topology.ensure(broker, "dev", overrides=SMALL)
    finally:
        await broker.close()


def with_login(url: str, user: str) -> str:
    return url.replace("nats://", f"nats://{user}:{password(user)}@")


@pytest.mark.parametrize("apart", [True, False], ids=["variables", "address"])
def test_who_the_settings_name_publishes_and_looks(server: NatsServer, tmp_path: Path, apart: bool) -> None:
    def login(user: str) -> dict[str, str]:
        if apart:
            return {"SEAMARK_NATS_USER": user, "SEAMARK_NATS_PASSWORD": password(user), "SEAMARK_NATS_URL": server.url}
        return {"SEAMARK_NATS_URL": with_login(server.url, user)}

    stored = seamark("publish", "--to", "alice", folder=tmp_path, **login("publisher"))
    assert stored.returncode == 0, stored.stderr
    looked = seamark("log", "alice", folder=tmp_path, **login("operator"))
    assert looked.returncode == 0, looked.stderr


def test_an_inbox_prefix_that_is_set_is_the_publishing_commands_too(server: NatsServer, tmp_path: Path) -> None:
    env = {"SEAMARK_NATS_URL": with_login(server.url, "publisher")}
    assert seamark("publish", "--to", "alice", folder=tmp_path, **env).returncode == 0
    elsewhere = ENV | env | {"SEAMARK_NATS_INBOX_PREFIX": "_INBOX_gateway"}
    with (tmp_path / "elsewhere.txt").open("wb") as output:
        process = started("publish", "--to", "alice", folder=tmp_path, output=output, env=elsewhere)
    try:
        # Without answers it goes on trying for half a minute. Why there are none, the server says at once.
        refused = re.compile(r"Subscription Violation .*\"_INBOX_gateway\b")
        wait_for(lambda: refused.search(server.log_path.read_text()), said=server.child.log_tail)
        assert process.poll() != 0
    finally:
        process.kill()


async def test_a_publisher_of_the_sdk_may_be_named_in_the_address(server: NatsServer) -> None:
    async with Publisher(nats_url=with_login(server.url, "publisher")) as publisher:
        assert not (await publisher.publish(to="alice", type="demo.hello", data={})).duplicate
