"""Receipts of jobs that end at about the same time are stored together, and each job learns what became of its own."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from chaos.load import whole_stream
from engine.broker import wire
from engine.broker.jetstream import Broker, Outgoing
from engine.channels.channel import Job
from engine.errors import ApiError, Unanswered
from engine.limits import BATCH_MESSAGES_MAX
from engine.topology import server as topology
from engine.worker.journal import WorkerJournal
from ops.dev.servers import NatsServer
from seamark.protocol.receipts import Receipt, decode_receipt
from tests.support.logs import connected

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NOTHING: Any = None
"""In place of what a journal does not need to store receipts."""


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", 1)
        yield connection


@pytest.fixture
async def journal(broker: Broker) -> AsyncIterator[WorkerJournal]:
    journal = WorkerJournal(broker, 1, NOTHING, NOTHING)
    yield journal
    await journal.close()


def job(number: int) -> Job:
    return Job(id=f"n{number}", tenant="default", user=f"user{number}", type="a.b", channel="sms", first_at=NOW)


def receipts(number: int, count: int = 1, reason: str | None = None) -> list[Receipt]:
    return [
        Receipt(user=f"user{number}", channel="sms", state="sent", at=NOW, id=f"n{number}-{place}", reason=reason)
        for place in range(count)
    ]


async def stored(broker: Broker) -> list[tuple[str | None, bytes | None]]:
    """The id of each receipt that is stored, and the batch that brought it."""
    return [
        (decode_receipt(one.payload).id, wire.header(one.headers, b"Nats-Batch-Id"))
        for one in await whole_stream(broker, "RECEIPTS", "rcpt.0.>")
    ]


async def test_what_many_jobs_store_at_once_takes_few_batches(broker: Broker, journal: WorkerJournal) -> None:
    await asyncio.gather(*(journal.store(job(number), receipts(number)) for number in range(60)))
    found = await stored(broker)
    assert sorted(id or "" for id, _ in found) == sorted(f"n{number}-0" for number in range(60))
    assert len({batch for _, batch in found}) <= 3


async def test_more_than_a_batch_holds_are_several_and_none_divides_what_is_one_jobs(
    broker: Broker, journal: WorkerJournal
) -> None:
    most = BATCH_MESSAGES_MAX * 2 // 5
    await asyncio.gather(*(journal.store(job(number), receipts(number, most)) for number in range(5)))
    batches: dict[str, set[bytes | None]] = {}
    for id, batch in await stored(broker):
        assert id is not None
        batches.setdefault(id.partition("-")[0], set()).add(batch)
    assert [len(of_a_job) for of_a_job in batches.values()] == [1] * 5


async def test_a_broker_that_does_not_answer_makes_no_other_channel_wait_and_nobody_for_more_than_one_batch() -> None:
    asked = list[int]()

    class Silent:
        async def append(self, *message: object) -> None:
            if len(asked) == 0:
                asked.append(1)
                await asyncio.sleep(0.3)
                raise Unanswered("no answer")

        async def commit(self, messages: Sequence[Outgoing]) -> None:
            asked.append(len(messages))
            raise Unanswered("no answer")

    journal = WorkerJournal(Silent(), 1, NOTHING, NOTHING)  # type: ignore[arg-type]
    first = asyncio.create_task(journal.store(job(0), receipts(0)))
    await asyncio.sleep(0)
    behind = [asyncio.create_task(journal.store(job(n), receipts(n, 500))) for n in range(1, 9)]
    async with asyncio.timeout(0.2):
        await journal.store(replace(job(9), channel="email"), receipts(9))
    ended = await asyncio.gather(first, *behind, return_exceptions=True)
    assert [type(one) for one in ended] == [Unanswered] * 9
    assert asked == [1, 1000], "who was behind a batch that was not answered is told at once"
    await journal.close()


async def test_a_receipt_that_the_broker_refuses_keeps_no_others_back_and_its_job_hears_of_it(
    broker: Broker, journal: WorkerJournal
) -> None:
    too_large = "x" * (2 << 20)
    jobs = [journal.store(job(n), receipts(n, reason=too_large if n == 7 else None)) for n in range(20)]
    ended = await asyncio.gather(*jobs, return_exceptions=True)
    assert [number for number, one in enumerate(ended) if isinstance(one, ApiError)] == [7]
    assert [one for one in ended if one is not None] == [ended[7]]
    assert {id for id, _ in await stored(broker)} == {f"n{n}-0" for n in range(20) if n != 7}
