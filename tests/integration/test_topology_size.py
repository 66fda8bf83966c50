"""Sizes that are reckoned are those of a real server, and a server started from written files has room for its streams."""

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from engine.broker.jetstream import Broker, Outgoing
from engine.log.marks import Mark, encode_mark
from engine.plan.decide import plan
from engine.plan.hours import Window
from engine.plan.preferences import QuietHours, TenantDefaults
from engine.planner.plans import Due, receipt_of
from engine.topology import room as topology_room
from engine.topology import server as topology
from engine.topology.check import check
from engine.topology.size import PLAN_BYTES, Demand, size, write
from ops.dev.servers import NatsServer
from seamark.protocol.receipts import Receipt
from tests.support.logs import connected
from tests.support.plans import plain, with_notification
from tests.support.topology import Overrides

NOW = datetime(2026, 11, 28, 12, 30, 15, 123456, tzinfo=UTC)
RECORD = b"r" * 450
MARK = Mark("q2o54586", 4711, 2, "036166379ce1ec96", "aci1o3w9", None)


@pytest.fixture
async def broker(nats_server: NatsServer):
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", 2)
        yield broker


async def bytes_of(broker: Broker, stream: str) -> int:
    return int((await broker.api(f"STREAM.INFO.{stream}"))["state"]["bytes"])


@pytest.mark.parametrize("batch", [1, 5, 100])
async def test_a_record_takes_on_disk_what_is_reckoned_for_it(broker: Broker, batch: int) -> None:
    for number in range(20):
        records = [Outgoing(f"log.0.default.person{number * batch + i:08d}", RECORD) for i in range(batch)]
        await broker.commit([*records, Outgoing("mark.0.0", encode_mark(MARK))])
    taken = await bytes_of(broker, "LOG-0") / (20 * batch)
    # A partition sees a hundredth of a second's records in one batch.
    log = size(Demand(rate=batch * 100 * 16, record_bytes=len(RECORD), partitions=16)).streams[0]
    reckoned = log.stored_bytes * 16 / (batch * 100 * 16 * 30 * 86_400)
    assert 0.9 * reckoned <= taken <= reckoned


async def test_an_event_and_a_receipt_take_on_disk_what_is_reckoned_for_them(broker: Broker) -> None:
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    for number in range(100):
        subject = f"events.default.person{number:08d}.order.shipped"
        await broker.append(subject, RECORD, trace, msg_id=f"default:order-{number:024d}")
    device = "tab-0123456789abcdef"
    receipt = Receipt("person00000001", "inapp", "acknowledged", NOW, device, None, "q2o54586", 4711, 4712, NOW)
    await broker.commit([Outgoing(f"rcpt.0.default.person{i:08d}", msgspec.json.encode(receipt)) for i in range(100)])
    sizes = {each.name: each for each in size(Demand(rate=1, record_bytes=len(RECORD))).streams}
    for name, days in (("EVENTS", 7), ("RECEIPTS", 30)):
        taken, reckoned = await bytes_of(broker, name) / 100, sizes[name].stored_bytes / (days * 86_400)
        assert 0.75 * reckoned <= taken <= reckoned, name


async def test_a_plan_takes_on_disk_what_is_reckoned_for_it(broker: Broker) -> None:
    inputs = plain(defaults=TenantDefaults(quiet_hours=QuietHours((Window("22:00", "07:00"),)), version=3))
    inputs = with_notification(inputs, id="0123456789abcdef0123456789abcdef", user="person00000001", tenant="default")
    due = Due(inputs.notification, "rcpt.0.default.person00000001", NOW, f"00-{'a' * 32}-{'b' * 16}-01", None)
    receipt = receipt_of(due, inputs, plan(inputs), 1_795_939_200, always=False)
    assert receipt is not None
    await broker.commit([receipt] * 100)
    assert 0.75 * PLAN_BYTES <= await bytes_of(broker, "RECEIPTS") / 100 <= PLAN_BYTES


async def test_a_server_started_from_written_files_has_room_for_every_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = size(Demand(rate=1000))
    write(found, tmp_path / "files")
    monkeypatch.setenv("SEAMARK_NATS_FILES", str(tmp_path / "files"))
    server = NatsServer(tmp_path / "nats")  # it takes its files from SEAMARK_NATS_FILES
    server.start()
    try:
        async with connected(server.url) as broker:
            await topology.ensure(broker, "production", found.partitions, overrides=Overrides(replicas=1))
            reserved = (await broker.api("INFO"))["reserved_storage"]
            assert 0.9 * found.max_file_store <= reserved <= found.max_file_store
    finally:
        server.kill()


async def test_check_measures_on_the_server_how_fast_a_stream_fills(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology_room, "INTAKE_SECONDS_MIN", 0.0)
    for number in range(50):
        await broker.append(f"log.1.default.person{number}", RECORD)
    config = (await broker.stream("LOG-1")).config
    await broker.api("STREAM.UPDATE.LOG-1", {**config, "max_bytes": 100_000})
    rooms = [finding for finding in (await check(broker, "dev", 2)).findings if finding.name == "room"]
    assert [finding.level for finding in rooms if finding.detail.startswith("LOG-1 is ")] == ["warn"]
    assert any("messages/s lately" in finding.detail and "full on " in finding.detail for finding in rooms)
