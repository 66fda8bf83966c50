"""What a feed promises when it joins, checks and resets; `test_feed_property.py` tries it all in every mixture."""

from __future__ import annotations

import pytest

from gateway.join.feed import Ask, LogState, ResetReason, Snapshot, State
from seamark.protocol.cursor import Cursor
from tests.support.feedowner import LOG, Owner, Record, behind, joined


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def live(owner: Owner) -> Owner:
    return joined(owner)


# --- joining


def test_a_device_that_missed_nothing_is_live_after_one_question_for_its_head(live):
    assert live.feed.state is State.LIVE


def test_what_was_missed_is_read_from_the_cursor_on_and_ends_with_live(owner):
    owner.feed.hello(Cursor("e", 4))
    owner.head(Ask.OPENING, 10, 12)
    assert owner.questions() == [Ask.OPENING, ("page", 4)]
    owner.page(4, 7, 10)
    assert owner.took() == [("ready", "e.4"), 7, 10, ("live", "e.10")]


def test_a_copy_heard_while_the_session_joins_is_not_forgotten(owner):
    owner.feed.hello(Cursor("e", 10))
    owner.live(13, 10)
    owner.head(Ask.OPENING, 10, 13)
    assert owner.took() == [("ready", "e.10")]
    assert owner.questions() == [Ask.OPENING, ("page", 10)]
    owner.page(10, 13)
    assert owner.took() == [13, ("live", "e.13")]


def test_a_head_older_than_what_was_known_is_asked_for_again_and_the_third_time_from_the_leader(owner):
    owner.feed.hello(Cursor("e", 10))
    owner.head(Ask.OPENING, 4, 5)
    owner.head(Ask.OPENING, 7, 11)
    assert owner.questions() == [Ask.OPENING, Ask.OPENING, Ask.LEADER]
    assert owner.took() == []
    owner.head(Ask.LEADER, 10, 12)
    assert owner.took() == [("ready", "e.10"), ("live", "e.10")]
    assert owner.counters.stale_heads == 2


def test_a_replica_that_ends_before_the_cursor_is_no_reason_to_reset(owner):
    owner.feed.hello(Cursor("e", 20))
    owner.head(Ask.OPENING, 10, 12)
    owner.head(Ask.OPENING, 10, 12)
    owner.head(Ask.LEADER, 20, 20, LogState("e", 1, 20))
    assert owner.took() == [("ready", "e.20"), ("live", "e.20")]


def test_a_cursor_beyond_the_end_is_reset_by_the_second_word_of_the_leader(owner):
    owner.feed.hello(Cursor("e", 20))
    for ask in (Ask.OPENING, Ask.OPENING, Ask.LEADER):
        owner.head(ask, 10, 12)
    assert owner.questions()[-1] is Ask.LEADER
    assert owner.took() == []
    owner.timer(Ask.LEADER)
    owner.head(Ask.LEADER, 10, 12)
    owner.snapshot(Snapshot(Cursor("e", 12)))
    owner.head(Ask.LEADER, 10, 12)
    assert owner.took() == [("reset", "future", "e.12"), ("live", "e.12")]


def test_a_cursor_of_another_epoch_is_reset_only_when_the_leader_says_so_too(owner):
    owner.feed.hello(Cursor("f", 10))
    owner.head(Ask.OPENING, 10, 12)
    assert owner.questions() == [Ask.OPENING, Ask.LEADER]
    owner.head(Ask.LEADER, 10, 12, LogState("f", 1, 12))
    assert owner.took() == [("ready", "f.10"), ("live", "f.10")]


def test_a_cursor_that_has_been_trimmed_is_reset(owner):
    owner.feed.hello(Cursor("e", 4))
    owner.head(Ask.OPENING, 10, 12, LogState("e", 6, 12))
    assert owner.questions() == [Ask.OPENING, "snapshot"]
    owner.snapshot(Snapshot(Cursor("e", 7)))
    owner.head(Ask.LEADER, 10, 12, LogState("e", 6, 12))
    assert owner.took() == [("reset", "trimmed", "e.7")]
    assert owner.questions() == [Ask.LEADER, ("page", 7)]


def test_a_cursor_just_before_the_oldest_message_is_whole(owner):
    owner.feed.hello(Cursor("e", 5))
    owner.head(Ask.OPENING, 10, 12, LogState("e", 6, 12))
    assert owner.took() == [("ready", "e.5")]


def test_an_old_cursor_with_nothing_to_read_is_live_only_when_nothing_was_trimmed_after_its_head_was_asked_for(owner):
    owner.feed.hello(Cursor("e", 4))
    owner.head(Ask.OPENING, 0, 12)
    assert owner.questions() == [Ask.OPENING, "state"]
    assert owner.took() == [("ready", "e.4")]
    owner.leader(LogState("e", 6, 12))
    owner.snapshot(None)
    owner.head(Ask.LEADER, 10, 12, LogState("e", 6, 12))
    assert owner.took() == [("reset", "trimmed", "e.5")]


def test_start_begins_with_the_oldest_record(owner):
    owner.feed.hello("start")
    owner.head(Ask.LEADER, 10, 12, LogState("e", 4, 12))
    assert owner.questions() == [Ask.LEADER, ("page", 3)]
    owner.page(4, 10)
    owner.leader(LogState("e", 4, 12))
    assert owner.took() == [("ready", "e.3"), 4, 10, ("live", "e.10")]


def test_start_in_a_log_that_never_held_a_record_begins_at_0(owner):
    owner.feed.hello("start")
    owner.head(Ask.LEADER, 0, 0, LogState("e", 0, 0))
    assert owner.took()[0] == ("ready", "e.0")


def test_a_record_that_fell_into_the_race_of_the_join_is_found_by_the_check_that_follows(live):
    assert live.timers == [(1.0, Ask.CHECK)]
    live.timer(Ask.CHECK)
    live.head(Ask.CHECK, 13, 13, LogState("e", 1, 13))
    assert live.questions() == [Ask.CHECK, ("page", 10)]
    live.page(10, 13)
    assert live.took() == [13, ("live", "e.13")]
    assert live.counters.missed == 1


# --- resets


def test_a_device_without_a_cursor_gets_a_snapshot_and_goes_on_from_where_that_was_taken(owner):
    owner.feed.hello(None)
    assert owner.questions() == ["snapshot"]
    owner.snapshot(Snapshot(Cursor("e", 8), inbox=({"id": "a"},)))
    owner.head(Ask.LEADER, 10, 12)
    assert owner.took() == [("reset", "new", "e.8")], "not from the head: 9 and 10 are in no snapshot"
    assert owner.shown.inbox == ({"id": "a"},)
    owner.page(10)
    owner.leader()
    assert owner.took() == [10, ("live", "e.10")]


@pytest.mark.parametrize(
    "snapshot",
    [
        pytest.param(None, id="none"),
        pytest.param(Snapshot(Cursor("f", 3), inbox=({"id": "a"},)), id="of another incarnation"),
        pytest.param(Snapshot(Cursor("e", 90), inbox=({"id": "a"},)), id="of history the log has lost"),
    ],
)
def test_with_a_snapshot_that_leads_nowhere_the_whole_log_is_read(owner, snapshot):
    owner.feed.hello(Cursor("f", 4))
    owner.head(Ask.OPENING, 10, 12)
    owner.head(Ask.LEADER, 10, 12, LogState("e", 3, 12))
    owner.snapshot(snapshot)
    owner.head(Ask.LEADER, 10, 12, LogState("e", 3, 12))
    assert owner.took() == [("reset", "epoch", "e.2")]
    assert owner.shown.stale
    assert owner.shown.inbox == ()


@pytest.mark.parametrize("reason", [ResetReason.NEW, ResetReason.SNAPSHOT])
def test_a_device_for_which_no_snapshot_could_be_read_is_never_told_that_there_is_nothing(owner, reason):
    owner.feed.hello(None, reason)
    owner.snapshot(None)
    owner.head(Ask.LEADER, 10, 12, LogState("e", 3, 12))
    assert owner.took() == [("reset", reason.value, "e.2")]
    assert owner.shown.stale
    owner.page(5, 10)
    owner.leader(LogState("e", 3, 12))
    assert owner.took() == [5, 10, ("live", "e.10")]


@pytest.mark.parametrize("begin", [None, "start"])
def test_a_copy_of_a_log_that_was_made_anew_while_a_device_joined_is_never_shown_as_one_of_the_new_log(owner, begin):
    owner.feed.hello(begin)
    owner.live(9, 3)  # of the former log
    if begin is None:
        owner.snapshot(Snapshot(Cursor("f", 0)))
    owner.head(Ask.LEADER, 0, 0, LogState("f", 1, 0))
    owner.page(3, 4)
    owner.leader(LogState("f", 1, 4))
    assert [frame for frame in owner.took() if isinstance(frame, int)] == [3, 4]
    for seq in range(5, 11):
        owner.live(seq, seq - 1)
    owner.timer(Ask.PAGE)
    owner.page(4, 5, 6, 7, 8, 9, 10)
    assert owner.took() == [5, 6, 7, 8, 9, 10, ("live", "f.10")]


def test_a_snapshot_older_than_the_log_is_shown_as_stale(owner):
    owner.feed.hello(None)
    owner.snapshot(Snapshot(Cursor("e", 2), inbox=({"id": "a"},)))
    owner.head(Ask.LEADER, 10, 12, LogState("e", 6, 12))
    assert owner.took() == [("reset", "new", "e.5")]
    assert owner.shown.stale
    assert owner.shown.inbox == ({"id": "a"},)


def test_a_log_made_anew_under_a_session_is_announced_and_read_from_its_beginning(live):
    live.feed.watch(LOG)
    live.live(2, 1)
    assert live.took() == [], "looks like an old number"
    live.feed.watch(LogState("f", 1, 2))
    live.snapshot(None)
    live.head(Ask.LEADER, 2, 2, LogState("f", 1, 2))
    assert live.took() == [("reset", "epoch", "f.0")]
    assert live.counters.resets[ResetReason.EPOCH] == 1
    live.page(1, 2)
    live.leader(LogState("f", 1, 2))
    assert live.took() == [1, 2, ("live", "f.2")]


def test_an_answer_of_the_watch_that_may_be_older_than_the_join_leads_to_a_question_not_to_a_reset(live):
    live.feed.watch(LogState("f", 1, 20))
    assert live.questions() == [Ask.CHECK]
    live.head(Ask.CHECK, 10, 12)
    assert live.took() == []


def test_a_log_that_has_gone_back_is_announced_when_the_leader_says_so_twice(live):
    live.feed.watch(LogState("e", 1, 12))
    live.feed.watch(LogState("e", 1, 8))
    assert live.questions() == []
    live.feed.watch(LogState("e", 1, 8))
    assert live.questions() == ["snapshot"]


def test_an_answer_older_than_the_last_record_is_not_taken_for_a_log_gone_back(live):
    live.live(13, 10)
    for seq in range(14, 20):
        live.live(seq, seq - 1)
        live.feed.watch(LogState("e", 1, seq - 1))
    assert live.questions() == []


def test_answers_to_questions_from_before_a_reset_are_ignored(owner):
    behind(owner)
    before = owner.feed.generation
    owner.leader(LogState("f", 1, 3))
    owner.snapshot(None)
    owner.head(Ask.LEADER, 0, 3, LogState("f", 1, 3))
    owner.took()
    owner.questions()
    owner.feed.page(before, [Record(4), Record(5)], more=True)
    owner.feed.head(before, Ask.CHECK, 90, 90, LOG)
    owner.feed.next(before, Record(5))
    owner.feed.leader(before, LOG)
    owner.feed.snapshot(before, None)
    owner.feed.failed(before, Ask.PAGE)
    owner.feed.timer(before, Ask.PAGE)
    assert owner.took() == owner.questions() == []


def test_copies_of_the_former_incarnation_are_not_shown_after_a_reset(live):
    live.feed.watch(LOG)
    live.feed.watch(LogState("f", 1, 20))
    live.live(13, 10)
    live.snapshot(Snapshot(Cursor("f", 20)))
    live.head(Ask.LEADER, 0, 20, LogState("f", 1, 20))
    assert live.took() == [("reset", "epoch", "f.20"), ("live", "f.20")]


# --- checks and positions


def test_a_check_that_finds_nothing_moves_the_position_an_idle_device_is_told(live):
    live.feed.check()
    live.head(Ask.CHECK, 10, 14, LogState("e", 1, 14))
    assert live.took() == []
    assert live.feed.advance() == Cursor("e", 14)


def test_an_idle_device_is_told_its_position_before_it_is_trimmed(live):
    live.feed.check()
    live.head(Ask.CHECK, 10, 40, LogState("e", 1, 40))
    assert live.took() == [("live", "e.40")]


def test_a_stale_answer_to_a_check_moves_nothing_and_is_asked_for_again(live):
    live.feed.check()
    live.head(Ask.CHECK, 4, 5)
    live.head(Ask.CHECK, 10, 12, LogState("e", 1, 15))
    assert live.questions() == [Ask.CHECK, Ask.CHECK, Ask.LEADER]
    live.head(Ask.LEADER, 15, 15, LogState("e", 1, 15))
    assert live.questions() == [("page", 10)]


def test_copies_that_arrive_during_a_check_do_not_make_its_answer_stale(live):
    live.feed.check()
    live.live(13, 10)
    live.head(Ask.CHECK, 10, 12)
    assert live.questions() == [Ask.CHECK]


def test_a_check_asked_for_during_another_is_made_after_it(live):
    live.feed.check()
    live.feed.check()
    assert live.questions() == [Ask.CHECK]
    live.head(Ask.CHECK, 10, 12)
    assert live.questions() == [Ask.CHECK]
    live.head(Ask.CHECK, 10, 12)
    assert live.questions() == []


def test_a_check_that_meets_another_incarnation_resets(live):
    live.feed.check()
    live.head(Ask.CHECK, 0, 12, LogState("f", 1, 12))
    assert live.questions() == [Ask.CHECK, "snapshot"]


def test_no_position_is_told_before_one_is_accepted(owner):
    owner.feed.hello(Cursor("e", 10))
    assert owner.feed.advance() is None


# --- when nothing answers


def test_a_question_without_an_answer_is_asked_again_later_and_later(live):
    live.live(15, 13)
    delays = []
    for _ in range(8):
        live.feed.failed(0, Ask.PAGE)
        delays.append(live.timers[-1][0])
        live.timer(Ask.PAGE)
    assert delays == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert live.questions() == [("page", 10)] * 9
    live.page(10, 13, 15)
    assert live.took() == [13, 15, ("live", "e.15")]


@pytest.mark.parametrize("ask", [Ask.OPENING, Ask.LEADER])
def test_a_session_that_cannot_open_keeps_asking(owner, ask):
    owner.feed.hello(Cursor("e", 4) if ask is Ask.OPENING else "start")
    owner.feed.failed(0, ask)
    owner.timer(ask)
    assert owner.questions() == [ask, ask]


def test_a_failed_check_is_made_again_and_live_copies_go_on(live):
    live.feed.check()
    live.feed.failed(0, Ask.CHECK)
    live.live(13, 10)
    live.timer(Ask.CHECK)
    assert live.took() == [13]
    assert live.questions() == [Ask.CHECK, Ask.CHECK]


def test_the_leader_is_asked_again_when_it_did_not_answer(live):
    live.live(15, 13)
    live.page(13, 15)
    live.feed.failed(0, Ask.STATE)
    live.timer(Ask.STATE)
    live.leader()
    assert live.took() == [13, 15, ("live", "e.15")]
    live.live(19, 17)
    for _ in range(2):
        live.page(15)
        live.timer(Ask.PAGE)
    live.page(15)
    live.feed.failed(0, Ask.NEXT)
    live.questions()
    live.timer(Ask.NEXT)
    assert live.questions() == [("next", 16)]


def test_a_closed_feed_ignores_everything(live):
    live.live(15, 13)
    live.feed.close()
    live.questions()
    live.page(10, 13, 15)
    live.live(17, 15)
    live.feed.writable()
    live.feed.check()
    live.feed.watch(LogState("f", 1, 1))
    live.feed.hello(Cursor("e", 1))
    live.feed.timer(0, Ask.CHECK)
    assert live.took() == live.questions() == []
    assert live.feed.state is State.CLOSED


def test_a_feed_closed_by_the_frame_it_sends_stays_closed(owner):
    behind(owner)
    owner.deliver = lambda seq, message: bool(owner.feed.close()) or seq < 6  # type: ignore[method-assign]
    owner.page(4, 5, 6, 7)
    assert owner.feed.state is State.CLOSED
    assert owner.questions() == []


def test_a_socket_without_room_costs_no_copies_and_gets_them_all_from_the_log_once_there_is_room(live):
    live.places = 1
    for seq in range(11, 60):
        live.live(seq, seq - 1)
    assert live.took() == [11]
    assert not live.feed._parked
    live.places = 1000
    live.feed.writable()
    assert live.questions()[-1] == ("page", 11)
    live.page(*range(11, 60))
    assert live.took() == [*range(12, 60), ("live", "e.59")]
