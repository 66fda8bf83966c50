"""Files, plan and server: a real nats-server is told what the files say, and says it back."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.broker.jetstream import Broker, NatsSettings, connect
from engine.broker.wire import header
from engine.errors import ApiError, TopologyError, Unavailable
from engine.topology import server as topology
from engine.topology.check import check
from engine.topology.files import Profile, render
from ops.dev.servers import NatsCluster, NatsServer
from seamark.protocol.subjects import event_subject, log_subject, partition_of
from tests.support.logs import connected
from tests.support.overlays import SYNCED_LATE
from tests.support.topology import Overrides, send_as_they_are

FILES = render("dev")


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    connected = await connect(NatsSettings(nats_server.url))
    yield connected
    await connected.close()


async def test_every_file_of_dev_is_taken_byte_for_byte(broker: Broker, tmp_path: Path):
    await send_as_they_are(broker, render("dev", 3).write(tmp_path))
    plan = await topology.plan(broker, "dev")
    assert plan.refusals == ()
    assert {why.split(":")[0].split(",")[0] for step in plan.steps for why in step.why} == {
        "it has no epoch",
        "behind what LOG-0 holds by then",
        "behind what LOG-1 holds by then",
        "behind what LOG-2 holds by then",
        "seen for the first time",
    }


async def test_after_apply_server_and_files_agree_and_applying_again_changes_nothing(broker: Broker):
    done = await topology.ensure(broker, "dev")
    assert len(done) == len(FILES.streams) + len(FILES.consumers) + 4 + 1  # marks of planners, and the epochs
    before = await topology.observe(broker, "dev")
    assert (await topology.plan(broker, "dev")).empty
    assert await topology.ensure(broker, "dev") == []
    after = await topology.observe(broker, "dev")
    assert {name: stream.config for name, stream in before.streams.items()} == {
        name: stream.config for name, stream in after.streams.items()
    }


async def test_epochs_are_random_distinct_and_recorded(broker: Broker):
    await topology.ensure(broker, "dev")
    observed = await topology.observe(broker, "dev")
    epochs = [stream.epoch or "" for stream in observed.streams.values()]
    assert len(set(epochs)) == len(FILES.streams)
    assert all(re.fullmatch(r"[a-z0-9]{8}", epoch) for epoch in epochs)
    named = ("EVENTS", "BULK", "LATER", *(f"LOG-{p}" for p in range(4)))
    recorded = {name: observed.streams[name].epoch for name in named}
    assert observed.epochs == recorded
    state = await broker.stream("LOG-3")
    assert (state.epoch, state.partitions) == (recorded["LOG-3"], 4)


async def test_provisioners_that_run_at_once_agree_on_one_epoch(nats_server: NatsServer):
    brokers = [await connect(NatsSettings(nats_server.url)) for _ in range(4)]
    try:
        plans = [await topology.plan(broker, "dev") for broker in brokers]
        await asyncio.gather(*(topology.apply(broker, plan) for broker, plan in zip(brokers, plans, strict=True)))
        observed = await topology.observe(brokers[0], "dev")
        assert observed.epochs == await topology.actual_epochs(brokers[0])
        assert (await topology.plan(brokers[0], "dev")).empty
    finally:
        for broker in brokers:
            await broker.close()


async def test_an_event_is_stored_under_the_partition_that_we_compute(broker: Broker):
    await topology.ensure(broker, "dev")
    for user in ("alice", "bob@example.com", "Zoë", "u-1"):
        subject = event_subject("default", user, "demo.hello")
        ack = await broker.append(subject, b"{}")
        stored = await broker.leader_next("EVENTS", "ev.>", ack.seq)
        assert stored is not None
        _, tenant, key, _ = subject.split(".", 3)
        assert stored.subject == f"ev.{partition_of(tenant, key, 4)}.{tenant}.{key}.demo.hello"


async def test_records_are_republished_and_marks_are_not(broker: Broker):
    await topology.ensure(broker, "dev")
    heard: list[bytes] = []
    arrived = asyncio.Event()
    broker.subscribe("live.>", lambda subject, *_: (heard.append(subject), arrived.set())[0])
    await broker.nc.flush()
    await broker.append("mark.3.3", b"{}")
    await broker.append(log_subject(3, "default", "alice"), b"{}")
    async with asyncio.timeout(20):
        await arrived.wait()
    assert heard == [b"live.3.default.alice"]


async def test_subjects_outside_the_topology_are_refused_not_stored_unseen(broker: Broker):
    await topology.ensure(broker, "dev")
    for subject in ("events.default.alice", "log.9.default.alice", "log.0.default.alice.extra", "rcpt.0.default"):
        with pytest.raises(Unavailable):
            await broker.append(subject, b"{}", budget_seconds=0.1)


async def test_a_drifted_setting_is_shown_and_put_back_with_all_messages_kept(broker: Broker):
    await topology.ensure(broker, "dev")
    for _ in range(20):
        await broker.append(log_subject(1, "default", "alice"), b"x" * 100)
    before = await broker.stream("LOG-1")
    await broker.api("STREAM.UPDATE.LOG-1", before.config | {"max_consumers": 3, "description": "by hand"})
    plan = await topology.plan(broker, "dev")
    (step,) = plan.steps
    assert set(step.why) == {"description by hand -> unset", "max_consumers 3 -> 64"}
    await topology.apply(broker, plan)
    after = await broker.stream("LOG-1")
    assert (after.messages, after.epoch, after.config["max_consumers"]) == (20, before.epoch, 64)


async def test_a_consumer_setting_is_put_back_in_place(broker: Broker):
    await topology.ensure(broker, "dev")
    quick = Overrides(pin_timeout_seconds=1)
    plan = await topology.plan(broker, "dev", overrides=quick)
    assert {step.action for step in plan.steps} == {"update_consumer"}
    await topology.apply(broker, plan)
    info = await broker.api("CONSUMER.INFO.EVENTS.dispatch-2")
    assert info["config"]["priority_timeout"] == 1_000_000_000


async def test_the_filter_of_an_earlier_release_is_taken_off_a_log_s_consumer_in_place(broker: Broker):
    await topology.ensure(broker, "dev")
    config = (await broker.api("CONSUMER.INFO.LOG-2.inbox-2"))["config"] | {"filter_subject": "log.2.>"}
    await broker.api("CONSUMER.CREATE.LOG-2.inbox-2.log.2.>", {"stream_name": "LOG-2", "config": config})
    (step,) = (plan := await topology.plan(broker, "dev")).steps
    assert (step.target, step.why) == ("LOG-2/inbox-2", ("filter_subject log.2.> -> >",))
    await topology.apply(broker, plan)
    assert (await topology.plan(broker, "dev")).empty


async def test_another_number_of_partitions_is_refused_by_plan_and_apply(broker: Broker):
    await topology.ensure(broker, "dev", 4)
    plan = await topology.plan(broker, "dev", 8)
    assert plan.refusals
    with pytest.raises(TopologyError, match="made for 4 partitions, 8 are asked for"):
        await topology.apply(broker, plan)
    assert len((await topology.observe(broker, "dev")).streams) == len(FILES.streams)


async def test_without_a_number_the_server_decides(broker: Broker):
    await topology.ensure(broker, "dev", 2)
    assert (await topology.plan(broker, "dev")).empty


async def test_a_plan_made_before_somebody_else_changed_a_stream_is_not_carried_out(broker: Broker):
    await topology.ensure(broker, "dev")
    state = await broker.stream("LOG-1")
    await broker.api("STREAM.UPDATE.LOG-1", state.config | {"max_consumers": 3})
    plan = await topology.plan(broker, "dev")
    await broker.api("STREAM.UPDATE.LOG-1", state.config | {"max_consumers": 5})
    with pytest.raises(TopologyError, match="Plan again"):
        await topology.apply(broker, plan)
    assert (await broker.stream("LOG-1")).config["max_consumers"] == 5


async def test_a_stream_made_by_hand_gets_its_epoch_from_apply_and_is_recorded(broker: Broker):
    log = next(file for file in render("dev").streams if file.name == "LOG-2")
    await broker.api("STREAM.CREATE.LOG-2", log.config)
    assert (await broker.stream("LOG-2")).epoch is None
    await topology.ensure(broker, "dev")
    epoch = (await broker.stream("LOG-2")).epoch
    assert epoch
    assert (await topology.read_epochs(broker))[0]["LOG-2"] == epoch


async def test_a_lost_log_comes_back_empty_under_an_epoch_nobody_trusts_yet(broker: Broker):
    await topology.ensure(broker, "dev")
    lost = (await broker.stream("LOG-2")).epoch
    await broker.api("STREAM.DELETE.LOG-2")
    await topology.ensure(broker, "dev")
    assert (await broker.stream("LOG-2")).epoch != lost
    assert (await topology.read_epochs(broker))[0]["LOG-2"] == lost, "dispatchers compare with this entry and refuse"
    assert any("LOG-2" in note for note in (await topology.plan(broker, "dev")).notes)


async def test_restore_rotates_the_epoch_keeps_messages_and_says_where_the_old_numbering_ends(broker: Broker):
    await topology.ensure(broker, "dev")
    ack = await broker.append(log_subject(2, "default", "alice"), b"{}")
    before = await broker.stream("LOG-2")
    rotated = await topology.restore(broker, ["LOG-2"])
    after = await broker.stream("LOG-2")
    assert rotated == {"LOG-2": (before.epoch, after.epoch)}
    assert after.epoch != before.epoch
    assert after.messages == 1
    assert after.config["metadata"]["seamark.restored"] == f"{before.epoch}.{ack.seq}"
    assert (await topology.read_epochs(broker))[0]["LOG-2"] == before.epoch
    assert (await topology.plan(broker, "dev")).steps == ()


async def test_restore_of_a_stream_that_is_not_there_changes_nothing(broker: Broker):
    await topology.ensure(broker, "dev")
    before = await topology.actual_epochs(broker)
    with pytest.raises(TopologyError, match="no stream LOG-9"):
        await topology.restore(broker, ["LOG-1", "LOG-9"])
    assert await topology.actual_epochs(broker) == before


@pytest.mark.parametrize(
    "texts", [["EVENTS="], ["=5"], ["EVENTS=-1"], ["EVENTS=end"], ["LOG-1", "LOG-1=4"], ["LOG-1", "EVENTS"]]
)
def test_other_texts_are_no_restored_streams(texts: list[str]):
    assert topology.parse_backups(["EVENTS=1000", "LOG-2"]) == {"EVENTS": 1000, "LOG-2": None}
    with pytest.raises(TopologyError):
        topology.parse_backups(texts)


@pytest.mark.parametrize("second", [("dev", 8), ("production", 4)])
async def test_two_provisioners_that_want_different_things_do_not_both_report_success(
    nats_cluster: NatsCluster, second: tuple[Profile, int]
):
    async with connected(nats_cluster.url) as one, connected(nats_cluster.url) as other:
        small = dict.fromkeys(("EVENTS", "BULK", "BULK", "LOG", "RECEIPTS", "DEAD-LETTERS"), 1 << 24)
        plans = [
            await topology.plan(one, "dev", 4, overrides=Overrides(stream_bytes=small)),
            await topology.plan(other, *second, overrides=Overrides(stream_bytes=small)),
        ]
        await topology.apply(one, plans[0])
        with pytest.raises(TopologyError, match=r"was made otherwise by another provisioner.*Plan again"):
            await topology.apply(other, plans[1])
        found = await topology.observe(one, "dev")
        assert {name for name in found.streams if name.startswith("LOG-")} == {f"LOG-{p}" for p in range(4)}


async def test_of_two_restores_at_once_the_one_whose_epoch_did_not_stay_says_so(nats_server: NatsServer):
    async with connected(nats_server.url) as one, connected(nats_server.url) as other:
        await topology.ensure(one, "dev")
        turn = Together(2)
        for broker in (one, other):
            turn.hold(broker, "STREAM.UPDATE.LOG-2")
        outcomes = await asyncio.gather(
            *(topology.restore(broker, ["LOG-2"]) for broker in (one, other)), return_exceptions=True
        )
        epoch = (await one.stream("LOG-2")).epoch
        for outcome in outcomes:
            if isinstance(outcome, TopologyError):
                assert "changed at the same time" in str(outcome)
            else:
                assert isinstance(outcome, dict), outcome
                assert outcome["LOG-2"][1] == epoch
        assert sum(isinstance(outcome, TopologyError) for outcome in outcomes) == 1


class Together:
    """Holds a call of several connections before it is sent, and again after its answer, until all have come so far."""

    def __init__(self, count: int) -> None:
        self._before, self._after = asyncio.Barrier(count), asyncio.Barrier(count)

    def hold(self, broker: Broker, held: str) -> None:
        send = broker.api

        async def api(method: str, *args: Any, **given: Any) -> dict[str, Any]:
            if method != held:
                return await send(method, *args, **given)
            await self._before.wait()
            answer = await send(method, *args, **given)
            await self._after.wait()
            return answer

        broker.api = api  # type: ignore[method-assign]


async def test_one_server_is_told_that_production_wants_three(broker: Broker):
    with pytest.raises(TopologyError, match=r"is to have 3 copies.*--profile dev"):
        await topology.ensure(broker, "production")
    assert (await topology.observe(broker, "production")).streams == {}


async def test_a_server_without_room_is_told_by_name_and_apply_continues_later(broker: Broker):
    plan = await topology.plan(broker, "dev", overrides=Overrides(stream_bytes={"RECEIPTS": 1 << 60}))
    with pytest.raises(TopologyError, match="max_file_store"):
        await topology.apply(broker, plan)
    await topology.ensure(broker, "dev")
    assert (await topology.plan(broker, "dev")).empty


async def test_the_control_bucket_is_what_the_client_library_takes_for_one(broker: Broker):
    await topology.ensure(broker, "dev")
    bucket = await broker.nc.jetstream().key_value("control")
    await bucket.put("pause.email", b"on")
    entry = await bucket.get("pause.email")
    assert entry.value == b"on"
    assert "epochs" in await bucket.keys()
    await bucket.delete("pause.email")
    status = await bucket.status()
    assert status.history == 16


async def test_the_dispatch_consumer_pins_without_acks_and_can_be_reset(broker: Broker):
    await topology.ensure(broker, "dev", 1)
    for number in range(3):
        await broker.append(event_subject("default", "alice", "demo"), b"%d" % number)
    headers, payload = await pull_one(broker, {"group": "owner"})
    assert payload == b"0"
    pin = (header(headers, b"Nats-Pin-Id") or b"").decode()
    assert pin
    await broker.api("CONSUMER.RESET.EVENTS.dispatch-0", {"seq": 2})
    headers, payload = await pull_one(broker, {"group": "owner", "id": pin})
    assert payload == b"1"


async def pull_one(broker: Broker, body: dict[str, str]) -> tuple[bytes, bytes]:
    """A pulled message comes under its own subject, so it needs an inbox of its own."""
    inbox = broker.nc.new_inbox()
    arrived: asyncio.Future[tuple[bytes, bytes]] = asyncio.get_running_loop().create_future()
    subscription = broker.subscribe(
        inbox, lambda _subject, _reply, headers, payload: arrived.set_result((headers, payload))
    )
    request = json.dumps({"batch": 1, "expires": 30_000_000_000} | body).encode()
    broker.publish("$JS.API.CONSUMER.MSG.NEXT.EVENTS.dispatch-0", request, reply=inbox)
    try:
        async with asyncio.timeout(30):
            return await arrived
    finally:
        subscription.unsubscribe()


async def test_a_full_log_refuses_and_keeps_what_it_has(broker: Broker):
    await topology.ensure(broker, "dev", 1, overrides=Overrides(stream_bytes={"LOG": 4096}))
    for number in range(100):
        try:
            await broker.append(log_subject(0, "default", "alice"), b"x" * 200)
        except ApiError as refused:
            assert refused.err_code == 10077  # noqa: PT017 - which number is refused is not ours to say
            assert (await broker.stream("LOG-0")).messages == number
            return
    pytest.fail("4 KiB held 100 messages of 200 bytes")


async def test_steps_are_carried_out_in_the_order_of_the_plan(broker: Broker):
    plan = await topology.plan(broker, "dev", 1)
    assert plan.steps[-1].action == "record_epochs", "recorded only once everything exists"
    with pytest.raises(TopologyError, match="no stream KV_control"):
        await topology.apply(broker, replace(plan, steps=plan.steps[::-1]))


async def test_check_reads_back_what_the_server_does(nats_server: NatsServer, broker: Broker):
    await topology.ensure(broker, "dev")
    findings = await check(broker, "dev", monitor_urls=[nats_server.monitor_url])
    told = {finding.name: finding.level for finding in findings.findings}
    assert told == {"version": "ok", "max_payload": "ok", "sync_always": "ok", "files": "ok", "replicas": "warn"}
    assert (await check(broker, "production", monitor_urls=[nats_server.monitor_url])).refused


async def test_check_says_that_a_server_acknowledges_before_it_writes_to_disk(tmp_path: Path):
    server = NatsServer(tmp_path / "late", overlay=SYNCED_LATE)
    server.start()
    try:
        async with connected(server.url) as broker:
            await topology.ensure(broker, "dev")
            for profile, level in (("dev", "warn"), ("production", "refuse")):
                findings = (await check(broker, profile, monitor_urls=[server.monitor_url])).findings  # type: ignore[arg-type]
                assert {finding.level for finding in findings if finding.name == "sync_always"} == {level}
    finally:
        server.kill()


async def test_check_says_unknown_when_nobody_tells_what_is_synced(broker: Broker):
    await topology.ensure(broker, "dev")
    for urls in ([], ["http://127.0.0.1:1"]):
        findings = await check(broker, "dev", monitor_urls=urls)
        assert {finding.level for finding in findings.findings if finding.name == "sync_always"} == {"unknown"}


async def test_check_on_an_empty_server_names_what_is_missing_and_refuses(broker: Broker):
    findings = await check(broker, "dev")
    assert findings.refused
    assert any(
        "missing: " in line and "EVENTS" in line and "seamark topology plan" in line for line in findings.lines()
    )
