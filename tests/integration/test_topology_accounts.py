"""What each user of `accounts.conf` may and may not do, on a server that runs with it."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine.broker.control import ControlBucket
from engine.broker.jetstream import After, Broker, NatsSettings, Outgoing, connect
from engine.campaigns.bulk import Bulk
from engine.campaigns.draft import Message, page_event
from engine.campaigns.planners import JobsPlanners
from engine.cancels import cancel, watching
from engine.controls.changing import Asked
from engine.controls.document import Kill
from engine.controls.store import ControlStore
from engine.directory.bell import listen, ring
from engine.dispatch.later import due_by, tenth_of, with_schedules
from engine.dispatch.source import EVENTS, LATER_PLACE
from engine.errors import ApiError, BrokerError, Forbidden
from engine.log.incarnations import read_partitions
from engine.log.writer import read_mark
from engine.partition.worker import delivered
from engine.topology import server as topology
from engine.topology.files import files_folder, render
from gateway.access.sign_outs import SignOuts
from ops.dev.servers import NatsServer
from seamark.protocol.subjects import (
    bulk_subject,
    dead_letter_subject,
    event_subject,
    job_letter_subject,
    log_subject,
    mark_subject,
    receipt_subject,
    waiting_subject,
)
from tests.support.commands import seamark
from tests.support.logs import eventually
from tests.support.topology import ROLES, Overrides, password, running_with_accounts, settings_for

PEOPLE_AND_PROCESSES = [role for role in ROLES if role != "system"]

SMALL = Overrides(stream_bytes=dict.fromkeys(("EVENTS", "BULK", "LOG", "RECEIPTS", "DEAD-LETTERS"), 1 << 24))

Connect = Callable[[str], Awaitable[Broker]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NatsServer]:
    with running_with_accounts(tmp_path / "nats", monkeypatch) as started:
        yield started


@pytest.fixture
async def connected(server: NatsServer) -> AsyncIterator[Connect]:
    """Connections by role on a server whose topology the provisioner has made."""
    async with AsyncExitStack() as stack:

        async def open_as(role: str) -> Broker:
            broker = await connect(settings_for(server.url, role))
            stack.push_async_callback(broker.close)
            return broker

        await topology.ensure(await open_as("provisioner"), "dev", overrides=SMALL)
        yield open_as


async def denied(broker: Broker, subject: str) -> bool:
    """Whether the server refuses to take this from the user."""
    try:
        await broker.request(subject, b"")
    except Forbidden:
        return True
    except BrokerError:
        return False
    return False


async def test_nobody_connects_without_the_password_of_the_role(server: NatsServer):
    for login in ({"user": "gateway", "pass": "guess"}, {"user": "nobody", "pass": password("gateway")}, {}):
        # On the wire: a client library would go on trying.
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            async with asyncio.timeout(20):
                assert (await reader.readline()).startswith(b"INFO ")
                writer.write(b"CONNECT %b\r\nPING\r\n" % json.dumps(login | {"verbose": False}).encode())
                assert b"Authorization Violation" in await reader.readline()
        finally:
            writer.close()
            await writer.wait_closed()


async def test_a_publisher_publishes_events_and_nothing_else(connected: Connect):
    publisher = await connected("publisher")
    ack = await publisher.append(event_subject("default", "alice", "demo.hello"), b"{}", msg_id="default:e1")
    assert (ack.stream, ack.seq) == ("EVENTS", 1)
    assert (await publisher.append(bulk_subject("default", "alice", "demo.hello"), b"{}")).stream == "BULK"
    batch = [Outgoing(event_subject("default", "alice", "demo"), b"{}") for _ in range(3)]
    assert (await publisher.commit(batch)).seq == 4
    for subject in (
        "log.0.default.alice",
        "rcpt.0.default.alice",
        "$JS.API.STREAM.INFO.EVENTS",
        "live.0.default.alice",
    ):
        assert await denied(publisher, subject), subject


async def test_now_messages_go_by_the_dispatcher_and_broadcasts_to_gateways_and_nobody_forges_live_copies(
    connected: Connect,
):
    publisher, dispatcher, gateway = [await connected(role) for role in ("publisher", "dispatcher", "gateway")]
    heard: list[bytes] = []
    await dispatcher.subscribe("now.>", lambda subject, *_: heard.append(subject), queue="relay").confirmed()
    await gateway.subscribe("live.0.default.alice", lambda subject, *_: heard.append(subject)).confirmed()
    await gateway.subscribe("broadcast.>", lambda subject, *_: heard.append(subject)).confirmed()
    for subject in ("now.default.alice.chat.typing", "broadcast.default.system.down"):
        publisher.publish(subject, b"{}")
    dispatcher.publish("live.0.default.alice", b"{}")
    for broker in (gateway, publisher):
        assert await denied(broker, "live.0.default.alice")
    for subject in ("now.acme.alice.chat.typing", "broadcast.acme.system.down"):
        assert await denied(publisher, subject), subject
        gateway.publish(subject, b"{}")
    assert await denied(dispatcher, "live.0.default")
    await eventually(lambda: len(heard) == 5)
    with pytest.raises(Forbidden):
        await gateway.subscribe("now.>", lambda *_: None).confirmed()


async def test_gateways_cancel_transactions_and_who_must_not_send_them_hears_of_it_and_writes_none(connected: Connect):
    gateway, *others = [await connected(role) for role in ("gateway", "dispatcher", "planner")]
    async with watching(others[0]) as heard, watching(others[1]) as planner, watching(gateway) as own:
        await cancel(gateway, "default", "order 17", budget_seconds=30)
        await eventually(lambda: all(view.holds("default", "order 17") for view in (heard, planner, own)))
        await eventually(lambda: all(view.fresh for view in (heard, planner, own)))
    for role in ("dispatcher", "publisher", "worker", "projector", "planner"):
        assert await denied(await connected(role), "$KV.cancels.default.t"), role


async def test_the_shipped_publisher_cannot_publish_the_events_of_another_tenant(connected: Connect):
    publisher = await connected("publisher")
    assert await denied(publisher, event_subject("acme", "alice", "demo"))
    with pytest.raises(Forbidden):
        await publisher.commit([Outgoing(event_subject("acme", "alice", "demo"), b"{}")])
    assert await denied(publisher, "events.defaultx.alice.demo")
    assert await denied(publisher, bulk_subject("acme", "alice", "demo"))


@pytest.mark.parametrize("tenant", ["acme", "ac-me.com", "Ümläut"])
async def test_a_tenants_publisher_publishes_the_events_of_its_tenant_and_of_no_other(
    tenant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = tmp_path / "files"
    shutil.copytree(files_folder(), files)
    command = ["topology", "publisher", tenant, "--add-to", str(files / "accounts.conf"), "--json"]
    made = await asyncio.to_thread(seamark, *command)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    monkeypatch.setenv("SEAMARK_NATS_FILES", str(files))
    monkeypatch.setenv(told["password_variable"], "a-password")
    with running_with_accounts(tmp_path / "nats", monkeypatch) as server:
        async with AsyncExitStack() as stack:
            provisioner = await connect(settings_for(server.url, "provisioner"))
            stack.push_async_callback(provisioner.close)
            await topology.ensure(provisioner, "dev", overrides=SMALL)
            user, prefix = told["user"], told["inbox_prefix"]
            publisher = await connect(NatsSettings(server.url, user=user, password="a-password", inbox_prefix=prefix))
            stack.push_async_callback(publisher.close)
            assert (await publisher.append(event_subject(tenant, "alice", "demo"), b"{}")).stream == "EVENTS"
            assert (await publisher.append(bulk_subject(tenant, "alice", "demo"), b"{}")).stream == "BULK"
            for subject in (
                event_subject("default", "alice", "demo"),
                event_subject(f"{tenant}x", "alice", "demo"),
                "log.0.default.alice",
                "$JS.API.STREAM.INFO.EVENTS",
            ):
                assert await denied(publisher, subject), subject
            with pytest.raises(Forbidden):
                await publisher.commit([Outgoing(event_subject("default", "alice", "demo"), b"{}")])


async def test_a_dispatcher_reads_its_consumers_commits_to_logs_and_sets_aside(connected: Connect):
    publisher, dispatcher = await connected("publisher"), await connected("dispatcher")
    await publisher.append(event_subject("default", "alice", "demo"), b"{}")
    arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    inbox = dispatcher.nc.new_inbox()
    dispatcher.subscribe(inbox, lambda subject, *_: arrived.set_result(subject))
    for source in ("BULK", "LATER"):
        assert (await dispatcher.api(f"CONSUMER.INFO.{source}.dispatch-3"))["name"] == "dispatch-3"
        await dispatcher.api(f"CONSUMER.RESET.{source}.dispatch-0", {"seq": 1})
        await dispatcher.api(f"CONSUMER.UNPIN.{source}.dispatch-0", {"group": "owner"})
    for q in range(4):
        dispatcher.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.EVENTS.dispatch-{q}",
            b'{"batch":1,"group":"owner","expires":30000000000}',
            reply=inbox,
        )
    async with asyncio.timeout(20):
        assert (await arrived).endswith(b".default.alice.demo")
    await dispatcher.api("CONSUMER.RESET.EVENTS.dispatch-0", {"seq": 1})
    await dispatcher.api("CONSUMER.UNPIN.EVENTS.dispatch-0", {"group": "owner"})
    assert (await dispatcher.stream("LOG-0")).epoch
    assert (await topology.read_epochs(dispatcher))[0]
    mark = Outgoing(mark_subject(0, 0), b"{}", b"Nats-Expected-Last-Subject-Sequence: 0\r\n")
    assert (await dispatcher.commit([Outgoing(log_subject(0, "default", "alice"), b"{}"), mark])).seq == 2
    assert (await dispatcher.leader_last("LOG-0", mark_subject(0, 0))) is not None
    await dispatcher.append(dead_letter_subject(0, "abcdefgh", 1), b"{}", after=After("DEAD-LETTERS", 0))


async def test_a_dispatcher_puts_events_off_and_only_the_broker_wakes_it_up(connected: Connect):
    dispatcher = await connected("dispatcher")
    tenth = tenth_of(datetime.now(UTC))
    waiting = Outgoing(waiting_subject(0, tenth, "default"), b"{}", b"Nats-TTL:60s\r\n")
    placed = await read_mark(dispatcher, EVENTS.marked(LATER_PLACE, 0))
    mark = Outgoing(mark_subject("later", 0), b"{}", EVENTS.marked(LATER_PLACE, 0).lines(placed.seq))
    await dispatcher.commit([*with_schedules([waiting]), mark])
    woken = await eventually(lambda: dispatcher.leader_last("LATER", "due.0.*"))
    assert [found.seq async for page in due_by(dispatcher, 0, delivered(woken)) for found in page.events] == [1]
    assert await denied(dispatcher, woken.subject)
    for role in ("publisher", "gateway", "projector", "worker", "pager", "planner"):
        other = await connected(role)
        for subject in (waiting.subject, woken.subject, "later.0.1", mark.subject):
            assert await denied(other, subject), (role, subject)


async def test_a_dispatcher_changes_no_stream_and_publishes_no_events(connected: Connect):
    dispatcher = await connected("dispatcher")
    for subject in (
        event_subject("default", "alice", "demo"),
        "$KV.control.epochs",
        "$JS.API.STREAM.DELETE.LOG-0",
        "$JS.API.STREAM.PURGE.LOG-0",
        "$JS.API.STREAM.MSG.DELETE.LOG-0",
        "$JS.API.STREAM.UPDATE.LOG-0",
        "$JS.API.CONSUMER.DELETE.EVENTS.dispatch-0",
        "$JS.API.CONSUMER.CREATE.EVENTS.mine.ev.0.>",
    ):
        assert await denied(dispatcher, subject), subject


async def test_a_gateway_reads_logs_hears_live_records_and_appends(connected: Connect):
    gateway = await connected("gateway")
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    subscription = gateway.subscribe("live.3.default.alice", lambda subject, *_: heard.set_result(subject))
    await subscription.confirmed()
    ack = await gateway.append(log_subject(3, "default", "alice"), b"{}", msg_id="read:1")
    async with asyncio.timeout(20):
        assert await heard == b"live.3.default.alice"
    page = await gateway.next_by_subject("LOG-3", log_subject(3, "default", "alice"), 1)
    assert [record.seq for record in page.records] == [ack.seq]
    heads = await gateway.last_by_subjects("LOG-3", [log_subject(3, "default", "alice")])
    assert heads.seqs == {log_subject(3, "default", "alice"): ack.seq}
    assert (await gateway.stream("LOG-3")).last_seq == ack.seq
    assert (await gateway.leader_next("LOG-3", log_subject(3, "default", "alice"), 1)) is not None
    await gateway.append(receipt_subject(3, "default", "alice"), b"{}")
    await gateway.append(event_subject("default", "alice", "demo"), b"{}")


async def test_a_gateway_reads_no_other_stream_and_changes_none(connected: Connect):
    gateway = await connected("gateway")
    for subject in (
        "mark.0.0",
        "dlq.0.abcdefgh.1",
        "$KV.control.epochs",
        "live.0.default.alice",
        "$JS.API.STREAM.DELETE.LOG-0",
        "$JS.API.STREAM.PURGE.LOG-0",
        "$JS.API.STREAM.MSG.DELETE.LOG-0",
        "$JS.API.STREAM.MSG.GET.EVENTS",
        "$JS.API.DIRECT.GET.EVENTS",
        "$JS.API.DIRECT.GET.JOBS",
        "$JS.API.STREAM.MSG.DELETE.JOBS",
        "$JS.API.STREAM.PURGE.DEAD-LETTERS",
        "dlq.job.default.alice.email.1",
        "jobsched.email.default.alice.1",
        "$JS.API.CONSUMER.CREATE.LOG-0.mine.log.>",
        "$JS.API.CONSUMER.MSG.NEXT.EVENTS.dispatch-0",
    ):
        assert await denied(gateway, subject), subject


async def test_a_pager_appends_pages_and_reads_what_became_of_them_and_nothing_else(connected: Connect):
    await (await connected("gateway")).append(log_subject(0, "default", "alice"), b"{}")
    broker = await connected("pager")
    bulk, planners = Bulk(broker, await read_partitions(broker)), JobsPlanners(broker)
    event = page_event("acme", "c0", Message(type="sale.autumn"), 0, ["alice"])
    at = await bulk.store(event.subject, event.payload, (await bulk.state()).epoch or "")
    assert await bulk.find(event.subject) == at.seq
    await bulk.home_mark(event.subject)
    assert await planners.has_room()
    assert not await planners.passed(await bulk.heads())
    for subject in (
        event_subject("acme", "alice", "demo"),
        "log.0.default.alice",
        "mark.0.b0",
        "jmark.0",
        "rcpt.0.default.alice",
        "live.0.default.alice",
        "$KV.control.epochs",
        "$JS.API.STREAM.MSG.GET.EVENTS",
        "$JS.API.STREAM.PURGE.BULK",
        "$JS.API.CONSUMER.MSG.NEXT.BULK.dispatch-0",
    ):
        assert await denied(broker, subject), subject


async def test_a_planner_reads_its_consumers_and_writes_receipts_and_jobs_and_nothing_else(connected: Connect):
    await (await connected("gateway")).append(log_subject(0, "default", "alice"), b"{}")
    planner = await connected("planner")
    arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    inbox = planner.nc.new_inbox()
    planner.subscribe(inbox, lambda subject, *_: arrived.set_result(subject))
    body = b'{"batch":1,"group":"owner","expires":30000000000}'
    planner.publish("$JS.API.CONSUMER.MSG.NEXT.LOG-0.plan-0", body, reply=inbox)
    async with asyncio.timeout(30):
        assert await arrived == b"log.0.default.alice"
    await planner.api("CONSUMER.INFO.LOG-0.plan-0")
    await planner.api("CONSUMER.RESET.LOG-0.plan-0", {"seq": 1})
    await planner.api("CONSUMER.UNPIN.LOG-0.plan-0", {"group": "owner"})
    for stream in ("LOG-0", "JOBS"):
        assert (await planner.stream(stream)).epoch
    mark = await planner.leader_last("JOBS", "jmark.0")
    assert mark is not None
    after = Outgoing(
        "jmark.0", mark.payload, b"Nats-Expected-Last-Subject-Sequence: %d\r\nNats-Rollup: sub\r\n" % mark.seq
    )
    await planner.commit([Outgoing("job.push.normal.default.alice", b"{}"), after])
    await planner.commit([Outgoing(receipt_subject(0, "default", "alice"), b"{}")])
    for subject in (
        "log.0.default.alice",
        "mark.0.0",
        event_subject("default", "alice", "demo"),
        "live.0.default.alice",
        "$KV.control.epochs",
        "$JS.API.STREAM.PURGE.JOBS",
        "$JS.API.STREAM.DELETE.JOBS",
        "$JS.API.CONSUMER.RESET.LOG-0.inbox-0",
        "$JS.API.CONSUMER.CREATE.JOBS.mine.job.>",
        "$JS.API.CONSUMER.MSG.NEXT.EVENTS.dispatch-0",
    ):
        assert await denied(planner, subject), subject


async def test_dead_letters_of_jobs_are_written_by_workers_and_taken_out_by_gateways_who_replay_them(
    connected: Connect,
):
    gateway, worker, planner = [await connected(role) for role in ("gateway", "worker", "planner")]
    subject = job_letter_subject("default", "alice", "email", "1")
    seq = (await worker.append(subject, b"{}", after=After("DEAD-LETTERS", 0))).seq
    assert (await gateway.next_by_subject("DEAD-LETTERS", "dlq.job.default.>", 1)).records[0].seq == seq
    await gateway.append("job.email.normal.default.alice", b"{}")
    await gateway.api("STREAM.MSG.DELETE.DEAD-LETTERS", {"seq": seq})
    assert await worker.leader_next("JOBS", "job.>", 1) is not None, "the sweep looks there"
    assert await worker.leader_next("RECEIPTS", "rcpt.>", 1) is None
    for other, forbidden in (
        (worker, dead_letter_subject(0, "abcdefgh", 1)),
        (worker, "$JS.API.STREAM.MSG.DELETE.DEAD-LETTERS"),
        (worker, "$JS.API.DIRECT.GET.DEAD-LETTERS"),
        (planner, "$JS.API.STREAM.MSG.DELETE.DEAD-LETTERS"),
    ):
        assert await denied(other, forbidden), forbidden


async def test_a_projector_keeps_durables_of_its_own_and_lets_those_of_dispatchers_be(connected: Connect):
    projector = await connected("projector")
    arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    inbox = projector.nc.new_inbox()
    projector.subscribe(inbox, lambda subject, *_: arrived.set_result(subject))
    await (await connected("gateway")).append(log_subject(0, "default", "alice"), b"{}")
    body = b'{"batch":1,"group":"owner","expires":30000000000}'
    projector.publish("$JS.API.CONSUMER.MSG.NEXT.LOG-0.unread-0", body, reply=inbox)
    async with asyncio.timeout(20):
        assert await arrived == b"log.0.default.alice"
    for durable in ("LOG-0.unread-0", "LOG-0.inbox-0", "RECEIPTS.deliveries-0"):
        await projector.api(f"CONSUMER.INFO.{durable}")
        await projector.api(f"CONSUMER.RESET.{durable}", {"seq": 1})
        await projector.api(f"CONSUMER.UNPIN.{durable}", {"group": "owner"})
    assert (await projector.leader_last("LOG-0", "log.0.>")) is not None
    config = {"name": "rebuild", "durable_name": "rebuild", "ack_policy": "none", "filter_subject": "log.0.>"}
    request = {"stream_name": "LOG-0", "config": config, "action": "create"}
    await projector.api("CONSUMER.CREATE.LOG-0.rebuild.log.0.>", request)
    await projector.api("CONSUMER.DELETE.LOG-0.rebuild")
    projector.publish("live.0.default.alice", b'{"unread":1}')
    for subject in (
        log_subject(0, "default", "alice"),
        "events.default.alice.demo",
        "$JS.API.CONSUMER.RESET.EVENTS.dispatch-0",
        "$JS.API.CONSUMER.DELETE.EVENTS.dispatch-0",
        "$JS.API.CONSUMER.MSG.NEXT.EVENTS.dispatch-0",
        "$JS.API.CONSUMER.RESET.BULK.dispatch-0",
        "$JS.API.CONSUMER.MSG.NEXT.JOBS.email-normal",
        "$JS.API.CONSUMER.DELETE.JOBS.email-normal",
    ):
        assert await denied(projector, subject), subject


async def test_a_projector_erases_a_user_from_his_log_receipts_and_letters_and_purges_nothing_else(connected: Connect):
    gateway, projector, worker = [await connected(role) for role in ("gateway", "projector", "worker")]
    for user in ("alice", "bob"):
        await gateway.append(log_subject(3, "default", user), b"{}")
        await gateway.append(receipt_subject(3, "default", user), b"{}")
        await worker.append(job_letter_subject("default", user, "email", "1"), b"{}")
    for stream, subjects in (
        ("LOG-3", [log_subject(3, "default", user) for user in ("alice", "bob")]),
        ("RECEIPTS", [receipt_subject(3, "default", user) for user in ("alice", "bob")]),
        ("DEAD-LETTERS", [job_letter_subject("default", user, "*", "*") for user in ("alice", "bob")]),
    ):
        done = await projector.api(f"STREAM.PURGE.{stream}", {"filter": subjects[0]})
        assert done["purged"] == 1
        assert await projector.leader_last(stream, subjects[0]) is None
        assert await projector.leader_last(stream, subjects[1]) is not None
    for stream in ("EVENTS", "BULK", "JOBS", "KV_control", "KV_cancels", "KV_signouts"):
        assert await denied(projector, f"$JS.API.STREAM.PURGE.{stream}"), stream


async def test_gateways_and_workers_ring_the_bell_of_rules_and_other_roles_only_hear_it(connected: Connect):
    gateway, planner = await connected("gateway"), await connected("planner")
    heard: list[None] = []
    listening = asyncio.create_task(listen(planner, lambda: heard.append(None)))
    await eventually(lambda: len(heard) == 1)  # as it is when one begins to listen
    for rings in (2, 3):
        await ring(gateway)
        await eventually(lambda rings=rings: len(heard) == rings)
    await ring(await connected("worker"))  # it has disabled an endpoint
    await eventually(lambda: len(heard) == 4)
    listening.cancel()
    for role in ("planner", "dispatcher", "projector", "pager", "publisher"):
        assert await denied(await connected(role), "$KV.control.rules.changed"), role


async def test_a_worker_writes_receipts_and_reads_records(connected: Connect):
    worker = await connected("worker")
    await worker.append(receipt_subject(0, "default", "alice"), b"{}")
    assert (await worker.leader_next("LOG-0", "log.0.>", 1)) is None
    for subject in (log_subject(0, "default", "alice"), "events.default.alice.demo", "$JS.API.STREAM.MSG.GET.EVENTS"):
        assert await denied(worker, subject), subject


async def test_a_gateway_sets_controls_and_signs_users_out_but_records_no_epochs(connected: Connect):
    gateway, dispatcher = await connected("gateway"), await connected("dispatcher")
    await ControlStore(gateway).change(Asked(Kill(channel="push"), "ops", "outage"))
    sign_outs = SignOuts(gateway)
    await sign_outs.start()
    try:
        seq = await sign_outs.sign_out("default", "alice", time.time())
        await sign_outs.read_up_to(seq)
        assert sign_outs.refuses("default", "alice", time.time() - 60)
        assert sign_outs.known
    finally:
        await sign_outs.close()
    assert await denied(gateway, "$KV.control.epochs")
    for subject in ("$KV.control.controls.document", "$KV.signouts.default.alice", "gateways.ask"):
        assert await denied(dispatcher, subject), subject


async def test_an_operator_sees_everything_and_changes_nothing(connected: Connect):
    operator = await connected("operator")
    assert len((await operator.api("STREAM.LIST"))["streams"]) == len(render("dev").streams)
    subjects = await operator.api("STREAM.INFO.LOG-0", {"subjects_filter": ">"})
    assert subjects["config"]["name"] == "LOG-0"
    assert len((await operator.api("CONSUMER.LIST.EVENTS"))["consumers"]) == 4
    assert (await operator.leader_last("LOG-0", log_subject(0, "default", "alice"))) is None
    subscription = operator.subscribe("live.>", lambda *_: None)
    await subscription.confirmed()
    assert (await topology.plan(operator, "dev")).refusals == ()
    for subject in (
        "events.default.alice.demo",
        log_subject(0, "default", "alice"),
        "$JS.API.STREAM.UPDATE.LOG-0",
        "$JS.API.STREAM.PURGE.LOG-0",
        "$JS.API.CONSUMER.RESET.EVENTS.dispatch-0",
        "$JS.API.CONSUMER.UNPIN.EVENTS.dispatch-0",
    ):
        assert await denied(operator, subject), subject


async def test_a_provisioner_cannot_delete_or_purge_a_stream_nor_publish(connected: Connect):
    provisioner = await connected("provisioner")
    for subject in (
        "$JS.API.STREAM.DELETE.LOG-0",
        "$JS.API.STREAM.PURGE.LOG-0",
        "$JS.API.STREAM.MSG.DELETE.LOG-0",
        "events.default.alice.demo",
        log_subject(0, "default", "alice"),
    ):
        assert await denied(provisioner, subject), subject


async def test_a_provisioner_removes_a_consumer_as_its_refusals_advise_and_makes_it_again(connected: Connect):
    provisioner = await connected("provisioner")
    for consumer in ("EVENTS.dispatch-0", "LOG-0.inbox-0", "LOG-3.unread-3", "RECEIPTS.deliveries-1"):
        await provisioner.api(f"CONSUMER.DELETE.{consumer}")
    plan = await topology.plan(provisioner, "dev")
    assert {step.target for step in plan.steps if step.action == "create_consumer"} == {
        "EVENTS/dispatch-0",
        "LOG-0/inbox-0",
        "LOG-3/unread-3",
        "RECEIPTS/deliveries-1",
    }


async def test_a_backup_reads_a_whole_stream_and_changes_none(connected: Connect):
    backup = await connected("backup")
    inbox, arrived = backup.nc.new_inbox(), asyncio.Event()

    def on_chunk(_subject: bytes, reply: bytes, _headers: bytes, payload: bytes) -> None:
        if not payload:
            arrived.set()  # the empty chunk ends a snapshot
        elif reply:
            backup.publish(reply)

    backup.subscribe(inbox, on_chunk)
    answer = await backup.api("STREAM.SNAPSHOT.LOG-0", {"deliver_subject": inbox})
    assert answer["config"]["name"] == "LOG-0"
    async with asyncio.timeout(30):
        await arrived.wait()
    with pytest.raises(ApiError, match="already in use"):
        await backup.api("STREAM.RESTORE.LOG-0", {"config": answer["config"], "state": answer["state"]})
    for subject in ("$JS.API.STREAM.UPDATE.LOG-0", "$JS.API.STREAM.DELETE.LOG-0", log_subject(0, "default", "alice")):
        assert await denied(backup, subject), subject


@pytest.mark.parametrize("spy", PEOPLE_AND_PROCESSES)
async def test_nobody_hears_the_replies_of_another_role(connected: Connect, spy: str):
    broker = await connected(spy)
    for subject in ("_INBOX.>", *(f"_INBOX_{role}.>" for role in PEOPLE_AND_PROCESSES if role != spy)):
        with pytest.raises(Forbidden):
            await broker.subscribe(subject, lambda *_: None).confirmed()
    await broker.subscribe(f"_INBOX_{spy}.>", lambda *_: None).confirmed()


async def test_the_system_account_sees_the_server_and_none_of_the_streams(connected: Connect):
    system = await connected("system")
    answer = await system.request("$SYS.REQ.SERVER.PING.VARZ")
    assert json.loads(answer.payload)["data"]["jetstream"]["config"]
    with pytest.raises(ApiError, match="not enabled for account"):
        await system.api("STREAM.NAMES")


async def test_every_role_reads_and_watches_the_control_bucket_and_only_the_provisioner_writes_it(connected: Connect):
    switch = {"why": "outage"}
    await ControlBucket(await connected("provisioner"), dict[str, str], "switch.").put("push", switch, 0)
    for role in ("dispatcher", "gateway", "projector", "worker"):
        control, told = ControlBucket(await connected(role), dict[str, str], "switch."), []
        assert (await control.get("push")).value == switch, role
        watch = asyncio.create_task(control.watch(told.append), name="watch")
        try:
            await eventually(lambda told=told: told == [{"push": switch}])
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        with pytest.raises(Forbidden):
            await control.put("push", switch, 0)
