"""When the stack restarts a nats-server that cannot write, and when it only says so."""

import itertools

from ops.dev.fulldisk import RESTART_SECONDS_MAX, RESTART_SECONDS_MIN, ROOM_BYTES_MIN, Action, FullDisk

FULL = "EVENTS (no space left on device)"


def test_a_full_disk_is_said_once_and_the_server_is_restarted_only_when_there_is_room() -> None:
    disk = FullDisk()
    assert [disk.decide(FULL, 0, now) for now in range(3)] == [Action.SAY, Action.NOTHING, Action.NOTHING]
    assert disk.decide(FULL, ROOM_BYTES_MIN, 3) is Action.RESTART


def test_a_server_that_can_write_is_left_alone_however_little_is_free() -> None:
    assert FullDisk().decide(None, 0, 0) is Action.NOTHING


def test_what_restarting_does_not_mend_is_restarted_ever_more_rarely() -> None:
    disk = FullDisk()
    error = "EVENTS (input/output error)"
    restarts = [now for now in range(3600) if disk.decide(error, 1 << 40, now) is Action.RESTART]
    pauses = [after - before for before, after in itertools.pairwise(restarts)]
    assert pauses[0] == RESTART_SECONDS_MIN
    assert pauses == sorted(pauses)
    assert pauses[-1] == RESTART_SECONDS_MAX


def test_a_disk_that_fills_again_much_later_is_handled_as_for_the_first_time() -> None:
    disk = FullDisk()
    assert disk.decide(FULL, ROOM_BYTES_MIN, 0) is Action.RESTART
    assert disk.decide(FULL, ROOM_BYTES_MIN, RESTART_SECONDS_MIN) is Action.RESTART
    later = 10 * RESTART_SECONDS_MAX
    assert disk.decide(None, ROOM_BYTES_MIN, later) is Action.NOTHING
    assert disk.decide(FULL, ROOM_BYTES_MIN, later + 1) is Action.RESTART
    assert disk.decide(FULL, ROOM_BYTES_MIN, later + 1 + RESTART_SECONDS_MIN) is Action.RESTART
