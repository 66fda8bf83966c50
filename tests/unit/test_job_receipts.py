"""The facts that are stored of a job: a try that may have been taken is never told by the fact alone that the job goes on."""

from datetime import UTC, datetime

import pytest

from engine.channels.channel import Job, Outcome
from engine.jobs.claims import Done, Waiting
from engine.jobs.receipts import receipts_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
JOB = Job(id="n1", tenant="t", user="ada", type="x", channel="webhook", target="wh_1", first_at=NOW)


def told(claim: Waiting | Done) -> list[tuple[str, int, str | None]]:
    return [(one.state, one.attempt, one.reason) for one in receipts_of(JOB, claim, NOW)]


@pytest.mark.parametrize("kind", ["ambiguous", "transient"])
def test_a_try_that_was_not_answered_is_in_doubt_before_its_job_waits(kind) -> None:
    outcome = Outcome(kind=kind, code="timeout", unanswered=kind == "transient")
    assert told(Waiting(1, NOW, NOW, outcome)) == [("ambiguous", 1, "timeout"), ("queued", 2, "timeout")]


def test_a_last_try_that_was_not_answered_is_in_doubt_and_its_job_has_failed() -> None:
    outcome = Outcome(kind="transient", code="timeout", unanswered=True)
    assert told(Done(9, "failed", "timeout", outcome)) == [("ambiguous", 10, "timeout"), ("failed", 10, "timeout")]


def test_a_try_that_was_refused_is_in_no_doubt() -> None:
    outcome = Outcome(kind="transient", code="503")
    assert told(Waiting(1, NOW, NOW, outcome)) == [("queued", 2, "503")]
    assert told(Done(9, "failed", "503", outcome)) == [("failed", 10, "503")]
