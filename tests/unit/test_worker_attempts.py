"""A try ends, whatever becomes of the cancellations by which deadlines end what they wait for."""

import asyncio

import pytest

from engine.channels.channel import Outcome
from engine.worker import attempts

LONG_SECONDS = 60.0


@pytest.fixture(autouse=True)
def little_overtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "OVERTIME_SECONDS", 0.02)


async def sending(lost: int) -> Outcome:
    """A send without an answer, in which some library swallows this many cancellations."""
    for _ in range(lost):
        try:
            await asyncio.sleep(LONG_SECONDS)
        except asyncio.CancelledError:
            continue
    await asyncio.sleep(LONG_SECONDS)
    return Outcome(kind="ok")


@pytest.mark.parametrize("lost", [0, 1, 3])
async def test_a_send_that_keeps_no_deadline_is_ended_and_its_job_goes_on(lost: int) -> None:
    async with asyncio.timeout(LONG_SECONDS / 2):
        outcome = await attempts.in_time(sending(lost), 0.01)
        await asyncio.sleep(0)  # nothing is left that cancels the job
    assert (outcome.kind, outcome.code) == ("ambiguous", "overtime")
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_a_send_that_ends_while_it_is_cancelled_says_how() -> None:
    async def late() -> Outcome:
        try:
            await asyncio.sleep(LONG_SECONDS)
        except asyncio.CancelledError:
            return Outcome(kind="ok")
        raise AssertionError("nobody has cancelled it")

    assert (await attempts.in_time(late(), 0.01)).kind == "ok"
    await asyncio.sleep(0)


async def test_who_cancels_the_job_ends_its_send() -> None:
    job = asyncio.create_task(attempts.in_time(sending(0), LONG_SECONDS))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
