"""A full disk is told by every role, and heals once there is room: nothing that was accepted is lost."""

import asyncio
import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker
from engine.errors import BrokerError
from engine.topology.server import ensure
from ops.dev.servers import NatsServer, Valkey
from tests.support.devstack import Stack
from tests.support.logs import all_records, connected, eventually, within
from tests.support.smalldisk import fill, small_disk

pytestmark = [pytest.mark.chaos(takes_seconds=60), pytest.mark.timeout(400)]

PARTITIONS = 4
LEFT_BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 96) as folder:
        yield folder


async def stored_until_full(broker: Broker, disk: Path) -> list[str]:
    """Publish until the disk takes no more; the ids of what was accepted."""
    accepted: list[str] = []
    padding = "x" * 20_000
    while len(accepted) < 1000:
        id = f"before-{len(accepted)}"
        body = json.dumps({"id": id, "to": ["alice"], "data": {"padding": padding}}).encode()
        try:
            await broker.append("events.default.alice.demo.full", body, msg_id=f"default:{id}", budget_seconds=1.0)
        except BrokerError:
            if shutil.disk_usage(disk).free < len(body) * 2:
                return accepted
        else:
            accepted.append(id)
    raise AssertionError("the disk did not fill")


def reasons_at(url: str) -> list[str]:
    """Why it is not ready; none when it is."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return list(json.load(answer)["reasons"])
    except urllib.error.HTTPError as error:
        with error:
            return list(json.load(error)["reasons"])
    except OSError as error:
        return [f"no answer: {error!r}"]


def tells_of_a_full_disk(reasons: list[str]) -> bool:
    """Whether the reasons name it, and what to do."""
    return any("no space left" in why for why in reasons) and "restart nats-server" in " ".join(reasons)


def health_urls(stack: Stack) -> dict[str, str]:
    """Where each role says whether it is ready; empty until all of them listen there."""
    urls = {}
    for role in ("dispatcher", "projector", "gateway"):
        found = re.findall(r'"health_port": (\d+),', (stack.data / f"{role}.log").read_text())
        if not found:
            return {}
        urls[role] = f"http://127.0.0.1:{found[-1]}"
    return urls


async def test_a_full_disk_makes_every_role_unready_until_room_is_made_and_the_stack_has_restarted_the_broker(
    disk: Path, valkey: Valkey, postgres: str, tmp_path: Path
) -> None:
    stack = Stack(disk, SEAMARK_REDIS_URL=valkey.url, SEAMARK_POSTGRES_URL=postgres)
    stack.output = tmp_path / "output.txt"  # what it says of a full disk must find room
    await asyncio.to_thread(stack.start)
    try:
        roles = await eventually(lambda: health_urls(stack))
        await eventually(lambda: not any(map(reasons_at, roles.values())))
        hog = fill(disk, LEFT_BYTES)
        async with connected(stack.describe().nats_url) as broker:
            accepted = await stored_until_full(broker, disk)
            assert accepted
            for url in roles.values():
                await eventually(lambda url=url: tells_of_a_full_disk(reasons_at(url)), seconds=60)
            await eventually(lambda: "make room where" in stack.output.read_text(), seconds=60)
            hog.unlink()
            await eventually(lambda: "there is room again: restarting it" in stack.output.read_text(), seconds=60)
            for url in roles.values():
                await eventually(lambda url=url: not reasons_at(url), seconds=60)
            await eventually(lambda: broker.connected, seconds=60)
            await asyncio.to_thread(stack.run, "publish", "--to", "alice", "--id", "after")

            async def delivered() -> bool:
                ids = [entry.id for entry in await all_records(broker, PARTITIONS)]
                assert len(ids) == len(set(ids))
                return {*accepted, "after"} <= set(ids)

            await eventually(delivered, seconds=60)
    finally:
        stack.stop()


async def test_failed_writes_show_a_full_disk_without_a_monitoring_address_until_the_broker_was_restarted(
    disk: Path,
) -> None:
    server = NatsServer(disk / "nats")
    server.start()
    try:
        async with connected(server.url) as broker:
            await ensure(broker, "dev", PARTITIONS)
            hog = fill(disk, LEFT_BYTES)
            await stored_until_full(broker, disk)

            async def told() -> bool:
                with pytest.raises(BrokerError):
                    await broker.append("events.default.alice.demo.full", b"{}", budget_seconds=1.0)
                return set(broker.writes.stopped()) == {"EVENTS"}

            await eventually(told, seconds=60)
            hog.unlink()
            assert await told()  # room alone does not help
            await asyncio.to_thread(server.stop)
            await eventually(lambda: not broker.connected)
            server.start()
            await eventually(lambda: broker.connected)
            # Long before what was not stored is old news.
            await within(lambda: not broker.writes.stopped(), 5)
            await broker.append("events.default.alice.demo.full", b"{}")
    finally:
        server.kill()
