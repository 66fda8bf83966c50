"""Three nodes that run `cluster.conf` with accounts, and the production files on them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker, NatsSettings, connect
from engine.errors import BrokerError, TopologyError
from engine.topology import server as topology
from engine.topology.check import check
from engine.topology.files import render
from ops.dev.servers import NatsCluster
from seamark.protocol.subjects import log_subject
from tests.support.logs import eventually
from tests.support.topology import send_as_they_are


@pytest.fixture
async def provisioner(nats_cluster: NatsCluster) -> AsyncIterator[Broker]:
    broker = await connect(NatsSettings(nats_cluster.url_of("provisioner"), inbox_prefix="_INBOX_provisioner"))
    yield broker
    await broker.close()


async def test_every_file_of_production_is_taken_byte_for_byte(provisioner: Broker, tmp_path: Path):
    await send_as_they_are(provisioner, render("production").write(tmp_path / "rendered"))
    plan = await topology.plan(provisioner, "production")
    assert plan.refusals == ()
    marks = [step.target for step in plan.steps if step.action == "begin_planning"]
    assert len(marks) == 16, "of the planner of each log"
    others = [why for step in plan.steps if step.action != "begin_planning" for why in step.why]
    assert {why.split(":")[0].split(",")[0] for why in others} == {"it has no epoch", "seen for the first time"}


async def test_production_is_applied_with_three_copies_and_synced_to_disk(
    provisioner: Broker, nats_cluster: NatsCluster
):
    await topology.ensure(provisioner, "production", 2)
    assert (await topology.plan(provisioner, "production")).empty
    info = await provisioner.api("STREAM.INFO.LOG-1")
    assert len(info["cluster"]["replicas"]) == 2
    addresses = [member.monitor_url for member in nats_cluster.servers]
    await eventually(lambda: all_ok(provisioner, addresses))  # a fresh copy may be a moment behind


async def all_ok(broker: Broker, addresses: list[str]) -> bool:
    try:
        findings = await check(broker, "production", monitor_urls=addresses)
    except BrokerError:  # a node that was stopped for a while: a stream has no leader
        return False
    print(*findings.lines(), sep="\n")
    return {finding.level for finding in findings.findings} == {"ok"}


async def test_copies_are_not_taken_away_from_what_was_accepted(provisioner: Broker):
    await topology.ensure(provisioner, "production", 2)
    plan = await topology.plan(provisioner, "dev")
    assert plan.steps == () or all(step.action == "update_consumer" for step in plan.steps)
    assert any("3 copies on 1" in refusal.detail for refusal in plan.refusals)


async def test_applying_goes_through_once_two_of_three_nodes_have_a_leader_again(
    provisioner: Broker, nats_cluster: NatsCluster
):
    await topology.ensure(provisioner, "production", 1)
    gateway = await connect(NatsSettings(nats_cluster.servers[0].url_of("gateway"), inbox_prefix="_INBOX_gateway"))
    try:
        ack = await gateway.append(log_subject(0, "default", "alice"), b"{}")
    finally:
        await gateway.close()
    before = await provisioner.stream("LOG-0")
    await provisioner.api("STREAM.UPDATE.LOG-0", before.config | {"max_consumers": 5})
    nats_cluster.servers[2].kill()
    async with asyncio.timeout(60):
        while not await applied(provisioner):
            await asyncio.sleep(0.25)
    after = await provisioner.stream("LOG-0")
    assert (after.last_seq, after.epoch, after.config["max_consumers"]) == (ack.seq, before.epoch, 64)


async def applied(broker: Broker) -> bool:
    """Whether planning and applying succeeded now; in an election nobody answers."""
    try:
        await topology.ensure(broker, "production")
    except (BrokerError, TopologyError):
        return False
    return True


async def test_no_two_copies_of_a_stream_stand_in_one_zone(tmp_path: Path):
    cluster = NatsCluster(tmp_path / "four", size=4)
    zones = {"n0": "a", "n1": "a", "n2": "b", "n3": "c"}
    for server in cluster.servers:
        server._variables["SEAMARK_NATS_TAGS"] = f'"az:{zones[server.server_name]}"'
    try:
        cluster.start()
        broker = await connect(NatsSettings(cluster.url))
        await topology.ensure(broker, "production", 2)
        placed = {}
        for file in render("production", 2).streams:
            group = (await broker.api(f"STREAM.INFO.{file.name}"))["cluster"]
            placed[file.name] = sorted(
                zones[name] for name in (group["leader"], *(one["name"] for one in group["replicas"]))
            )
        await broker.close()
    finally:
        cluster.kill()
    assert set(map(tuple, placed.values())) == {("a", "b", "c")}, placed
