"""What a worker reads from the broker's words about a job."""

import pytest

from engine.jobs.queue import deliveries_of


@pytest.mark.parametrize(
    "reply",
    [
        b"$JS.ACK.JOBS.push-normal.3.17.9.1795478400000000000.4",
        b"$JS.ACK._.ABCDEF.JOBS.push-normal.3.17.9.1795478400000000000.4.random",
    ],
)
def test_the_subject_of_the_acknowledgement_says_how_often_a_job_was_handed_out(reply: bytes) -> None:
    """In the short form, and in the one with a domain and an account (nats-server's ADR-15)."""
    assert deliveries_of(reply) == 3
