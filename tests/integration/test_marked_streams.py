"""Marks hold for any stream that is written from another: here JOBS, as it is planned from a log."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from chaos.load import whole_stream
from engine.broker.jetstream import Broker, Outgoing
from engine.errors import PartitionStopped, StepDown, TopologyError
from engine.log.marks import Mark, PlacedMark
from engine.log.writer import MarkedWriter, Ownership, read_mark
from engine.planner.position import marked, meant
from engine.topology import repair
from engine.topology import server as topology
from engine.topology.check import check
from engine.topology.files import render
from ops.dev.servers import NatsServer
from seamark.protocol.records import EPOCH_HEADER
from tests.support.logs import FAST, connected

JOBS = marked(0)
JOB = "job.push.normal.default.alice"


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    """Logs with nine records in LOG-0, and a JOBS that is younger than these."""
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        await connection.api("STREAM.DELETE.JOBS")
        for _ in range(9):
            await connection.append("log.0.default.alice", b"{}")
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


async def position(broker: Broker) -> tuple[PlacedMark, Mark]:
    """The mark as it is stored, and what it says now."""
    found = await read_mark(broker, JOBS)
    return found, meant(found, await broker.stream(JOBS.source), await broker.stream(JOBS.name))


async def taken_over(broker: Broker) -> MarkedWriter:
    found, mark = await position(broker)
    ownership = Ownership(mark.term + 1, f"owner{mark.term + 1}", mark.epoch)
    facts = {"epoch": mark.stream_epoch, "found": found, "mark": mark, "start_seq": 0}
    return await MarkedWriter.take_over(broker, JOBS, ownership, **facts)


async def test_a_new_jobs_beside_old_logs_has_its_marks_at_their_ends_and_the_higher_term_each_time_it_is_made(
    broker: Broker,
) -> None:
    (_, first), began = await position(broker), round(time.time())
    assert first.seq == 9
    assert abs(first.term - began) < 60
    writer = await taken_over(broker)
    await broker.append("log.0.default.alice", b"{}")
    await writer.append([Outgoing(JOB, b"1")], 10)
    await broker.append("log.0.default.alice", b"{}")
    await broker.api("STREAM.DELETE.JOBS")
    assert [each.name for each in (await check(broker, "dev")).findings if each.level == "refuse"] == ["files"]
    done = await topology.apply(broker, await topology.plan(broker, "dev", overrides=FAST))
    assert [line.split(":")[0] for line in done] == [
        "+ create stream JOBS",
        *(f"+ create consumer {file.target}" for file in render("dev").consumers if file.stream == "JOBS"),
        *(f"~ begin planning jmark.{p}" for p in range(4)),
    ]
    assert (await position(broker))[1].seq == 11


async def test_a_writer_of_another_stream_is_refused_whole_once_another_has_taken_over_and_that_one_goes_on(
    broker: Broker,
) -> None:
    old = await taken_over(broker)
    await old.append([Outgoing(JOB, b"1")], 9)
    new = await taken_over(broker)
    assert new.mark.next_seq == 10
    with pytest.raises(StepDown):
        await asyncio.wait_for(old.append([Outgoing(JOB, b"late")], 9), 30)
    await new.append([Outgoing(JOB, b"2")], 9)
    jobs = await whole_stream(broker, "JOBS", "job.>")
    assert [stored.payload for stored in jobs] == [b"1", b"2"]
    line = f"{EPOCH_HEADER}:{new.mark.stream_epoch}\r\n".encode()
    assert all(line in stored.headers for stored in jobs)
    marks = await whole_stream(broker, "JOBS", "jmark.0")
    assert len(marks) == 1, "only the newest mark stays, for marks of JOBS do not leave by age"


async def test_a_planner_does_not_begin_anew_where_its_mark_is_gone(broker: Broker) -> None:
    await broker.api("STREAM.PURGE.JOBS", {"filter": "jmark.0"})
    with pytest.raises(PartitionStopped, match=r"JOBS holds no mark for LOG-0.*topology apply"):
        await position(broker)
    assert any(
        finding.detail == "planners wait for a mark at jmark.0" for finding in (await check(broker, "dev")).findings
    )


async def test_a_backup_of_jobs_is_never_taken_for_what_still_has_to_be_sent(broker: Broker) -> None:
    found, _ = await position(broker)
    with pytest.raises(TopologyError, match="what waited in a backup of JOBS was sent since"):
        await topology.restore(broker, ["JOBS"])
    other = replace(await broker.stream("JOBS"), epoch="restored")
    with pytest.raises(PartitionStopped, match=r"another incarnation than its mark.*nats stream rm JOBS"):
        meant(found, await broker.stream("LOG-0"), other)


async def test_a_log_that_was_made_anew_stops_its_planner_until_a_repair_has_set_its_mark_to_the_end(
    broker: Broker,
) -> None:
    _, before = await position(broker)
    await broker.api("STREAM.DELETE.LOG-0")
    await topology.ensure(broker, "dev", overrides=FAST)
    await broker.append("log.0.default.alice", b"{}")
    with pytest.raises(PartitionStopped, match=r"planned up to 9 of incarnation .* nor its backup.*topology repair"):
        await position(broker)
    assert any("planned up to 9" in finding.detail for finding in (await check(broker, "dev")).findings)
    plan = await repair.prepare(broker, {None: "first"})
    assert plan.refusals == ()
    await repair.apply(broker, plan)
    _, after = await position(broker)
    assert (after.seq, after.term > before.term) == (1, True)


async def test_a_log_that_was_put_back_to_a_backup_is_planned_from_there_once_that_was_said(broker: Broker) -> None:
    _, before = await position(broker)
    log = await broker.stream("LOG-0")
    found, jobs = await read_mark(broker, JOBS), await broker.stream("JOBS")
    with pytest.raises(PartitionStopped, match=r"ends at 5, before record 9 that was planned.*topology restore LOG-0"):
        meant(found, replace(log, last_seq=5), jobs)
    restored = replace(log, epoch="restored", last_seq=5, config=log.config | {
        "metadata": {"seamark.epoch": "restored", "seamark.restored": f"{log.epoch}.5"}})  # fmt: skip
    assert meant(found, restored, jobs).seq == 5
    assert before.seq == 9
