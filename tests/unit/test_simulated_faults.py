"""A simulated provider fails as it was told to: in order, by share, and the same way each time."""

from ops.dev.providers.acceptlog import AcceptLog
from ops.dev.providers.faults import Answers, Faults, Hangs, NoTls

BUSY, GONE = Answers(status=503), Answers(status=410)


def test_scripted_faults_come_first_one_for_each_request() -> None:
    faults = Faults()
    faults.stand(BUSY)
    faults.script([GONE, None, Hangs()])
    assert [faults.next() for _ in range(5)] == [GONE, None, Hangs(), BUSY, BUSY]
    faults.clear()
    assert faults.next() is None
    assert faults.met == [GONE, Hangs(), BUSY, BUSY]


def test_a_share_of_requests_fails_and_the_same_ones_each_time() -> None:
    runs = []
    for _ in range(2):
        faults = Faults(seed=7)
        faults.stand(BUSY, share=0.3)
        runs.append([faults.next() is not None for _ in range(10_000)])
    assert runs[0] == runs[1]
    assert 2_700 < sum(runs[0]) < 3_300


def test_a_broken_handshake_is_met_by_a_connection_and_by_no_request() -> None:
    faults = Faults()
    faults.script([NoTls(), BUSY])
    assert (faults.breaks_tls, faults.breaks_tls, faults.next()) == (True, False, BUSY)
    faults.stand(NoTls())
    assert (faults.breaks_tls, faults.next()) == (True, None)


def test_the_log_of_what_was_accepted_knows_what_came_twice_and_has_an_end() -> None:
    log = AcceptLog(kept_max=3)
    for key in "abab":
        log.add(id=key, channel="sms", to="+1", key=key)
    assert (log.accepted, log.forgotten, [message.key for message in log.messages(to="+1")]) == (4, 1, ["b", "a", "b"])
    assert log.repeated() == {"b": 2}
    log.clear()
    assert (log.accepted, log.messages()) == (0, [])
