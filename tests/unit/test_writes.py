"""What writes that came to nothing say about a stream, and for how long."""

from hypothesis import given
from hypothesis import strategies as st

from engine.broker.health import write_error
from engine.broker.writes import Writes, stream_of_subject
from engine.limits import UNSTORED_DOUBT_SECONDS, UNSTORED_SECONDS
from seamark.protocol.subjects import mark_subject, receipt_subject


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def failing(clock: Clock, seconds: float, subject: str = "events.acme.alice.x") -> Writes:
    """Writes that have come to nothing once a second for so long."""
    writes = Writes(clock)
    for _ in range(int(seconds) + 1):
        writes.not_stored(subject)
        clock.now += 1
    clock.now -= 1
    return writes


def test_a_stream_whose_writes_fail_for_longer_than_an_election_takes_counts_as_stopped() -> None:
    assert failing(Clock(), UNSTORED_SECONDS).stopped() == {"EVENTS": UNSTORED_SECONDS}


def test_an_election_is_no_reason_to_call_a_stream_dead() -> None:
    assert failing(Clock(), UNSTORED_SECONDS - 1).stopped() == {}


def test_a_stored_write_ends_all_doubt_about_its_stream_and_no_other() -> None:
    clock = Clock()
    writes = failing(clock, UNSTORED_SECONDS)
    writes.stored("LOG-1")
    assert set(writes.stopped()) == {"EVENTS"}
    writes.stored("EVENTS")
    assert writes.stopped() == {}


def test_a_process_that_gets_no_traffic_because_it_is_not_ready_becomes_ready_again_by_itself() -> None:
    clock = Clock()
    writes = failing(clock, UNSTORED_SECONDS)
    clock.now += UNSTORED_DOUBT_SECONDS + 1
    assert writes.stopped() == {}


def test_two_failures_far_apart_are_not_one_long_one() -> None:
    clock = Clock()
    writes = Writes(clock)
    writes.not_stored("log.3.acme.alice")
    clock.now += UNSTORED_DOUBT_SECONDS + 1
    writes.not_stored("log.3.acme.alice")
    assert writes.stopped() == {}


def test_another_leader_or_another_server_is_given_the_benefit_of_the_doubt() -> None:
    clock = Clock()
    writes = failing(clock, UNSTORED_SECONDS, "rcpt.0.acme.alice")
    writes.forget("EVENTS")
    assert set(writes.stopped()) == {"RECEIPTS"}
    writes.forget()
    assert writes.stopped() == {}


def test_every_subject_that_is_written_belongs_to_the_stream_that_stores_it() -> None:
    assert stream_of_subject("log.12.acme.alice") == "LOG-12"
    assert stream_of_subject(mark_subject(3, 1)) == "LOG-3"
    assert stream_of_subject(receipt_subject(0, "acme", "alice")) == "RECEIPTS"
    assert stream_of_subject("dlq.1.epoch.7") == "DEAD-LETTERS"
    assert stream_of_subject("$KV.control.epochs") == "KV_control"


@given(st.text())
def test_no_subject_whatever_breaks_the_bookkeeping(subject: str) -> None:
    writes = Writes(Clock())
    writes.not_stored(subject)
    assert writes.stopped() == {}


def test_a_servers_word_about_a_write_error_names_stream_and_reason_but_no_path() -> None:
    said = {
        "status": "unavailable",
        "error": "JetStream stream '$G > LOG-0' write error: write /srv/nats/msgs/1.blk: no space left on device",
    }
    assert write_error(said) == "LOG-0 (no space left on device)"
    assert write_error({"status": "ok"}) is None
    assert write_error({"status": "unavailable", "error": "JetStream is not current with the meta leader"}) is None
