"""What the parts of a job that was split take over from the whole."""

import pytest

from engine.jobs.claims import Done
from engine.jobs.splitting import parts_of
from tests.support.sending import a_job


@pytest.mark.parametrize(
    ("stage", "of_parts"), [("escalation", "retry"), ("quiet_hours", "quiet_hours"), ("first", "first")]
)
def test_whether_anybody_has_seen_it_is_asked_once_for_all_devices(stage: str, of_parts: str) -> None:
    parts = parts_of(a_job("push", "n1", stage=stage), Done(0, "split", targets=("a", "b")))
    assert [(job.target, job.stage) for job in parts] == [("a", of_parts), ("b", of_parts)]
