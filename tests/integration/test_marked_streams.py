"""Marks hold for any stream that is written from another: here what is planned from a log, as jobs."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from chaos.load import whole_stream
from engine.broker.jetstream import Broker, Outgoing
from engine.errors import PartitionStopped, StepDown
from engine.log.incarnations import translated
from engine.log.marks import Mark, MarkedStream, PlacedMark
from engine.log.writer import MarkedWriter, Ownership, read_mark
from engine.topology import server as topology
from ops.dev.servers import NatsServer
from seamark.protocol.records import EPOCH_HEADER
from tests.support.logs import FAST, connected

JOBS = MarkedStream("LOG-0", "JOBS", "jmark.0")


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        await make_jobs(connection)
        for _ in range(9):
            await connection.append("log.0.default.alice", b"{}")
        yield connection


async def make_jobs(broker: Broker) -> None:
    config = {"name": "JOBS", "subjects": ["job.>", "jmark.*"], "storage": "file", "allow_atomic": True}
    config |= {"allow_direct": True}
    await broker.api("STREAM.CREATE.JOBS", config | {"metadata": {"seamark.epoch": "jobs0001"}})


async def meant(broker: Broker, **recorded: str) -> tuple[PlacedMark, Mark | None]:
    """The mark as it is stored, and what it says now."""
    source, stream = await broker.stream(JOBS.source), await broker.stream(JOBS.name)
    found = await read_mark(broker, JOBS)
    return found, translated(found, 0, source, stream, {JOBS.name: stream.epoch or ""} | recorded)


async def taken_over(broker: Broker, term: int) -> MarkedWriter:
    found, mark = await meant(broker)
    ownership = Ownership(term, f"owner{term}", (await broker.stream(JOBS.source)).epoch or "")
    facts = {"epoch": "jobs0001", "found": found, "mark": mark, "start_seq": 0}
    return await MarkedWriter.take_over(broker, JOBS, ownership, **facts)


async def test_a_writer_of_another_stream_is_refused_whole_once_another_has_taken_over_and_that_one_goes_on(
    broker: Broker,
) -> None:
    old = await taken_over(broker, 1)
    await old.append([Outgoing("job.push.normal.default.alice", b"1")], 7)
    new = await taken_over(broker, 2)
    assert new.mark.next_seq == 8
    with pytest.raises(StepDown):
        await asyncio.wait_for(old.append([Outgoing("job.push.normal.default.alice", b"late")], 8), 10)
    await new.append([Outgoing("job.push.normal.default.alice", b"2")], 8)
    jobs = await whole_stream(broker, "JOBS", "job.>")
    assert [stored.payload for stored in jobs] == [b"1", b"2"]
    assert all(f"{EPOCH_HEADER}:jobs0001\r\n".encode() in stored.headers for stored in jobs)


async def test_a_mark_is_no_position_once_its_stream_or_its_source_was_made_anew(broker: Broker) -> None:
    await taken_over(broker, 1)
    assert (await meant(broker))[1]
    await broker.api("STREAM.DELETE.JOBS")
    await make_jobs(broker)
    with pytest.raises(PartitionStopped, match="JOBS was re-created and holds no mark"):
        await meant(broker, JOBS="gone0000")
    await taken_over(broker, 1)
    await broker.api("STREAM.DELETE.LOG-0")
    await topology.ensure(broker, "dev", overrides=FAST)
    with pytest.raises(PartitionStopped, match=r"counts in LOG-0 .* which is not the present one"):
        await meant(broker)
