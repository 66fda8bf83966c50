"""What a feed promises, one situation at a time; `test_feed_property.py` tries them in every mixture."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest

from engine.cursor import Cursor
from gateway.catchup import PARKED_LIMIT
from gateway.feed import Ask, Feed, FeedCounters, LogState, ResetReason, Snapshot, State

LOG = LogState("e", 1, 12)


class Record(NamedTuple):
    seq: int


class Owner:
    """The port of a feed: writes down what it is asked for."""

    def __init__(self) -> None:
        self.counters = FeedCounters()
        self.feed = Feed(self, self.counters)
        self.frames: list[Any] = []
        self.asked: list[Any] = []
        self.timers: list[tuple[float, Ask]] = []
        self.places = 1000

    # the port

    def room(self) -> bool:
        return self.places > 0

    def deliver(self, seq, message):
        if not self.room():
            return False
        assert message.seq == seq
        self.places -= 1
        self.frames.append(seq)
        return True

    def resumed(self, cursor):
        self.frames.append(("ready", str(cursor)))

    def caught_up(self, cursor):
        self.frames.append(("live", str(cursor)))

    def reset(self, reason, snapshot, cursor):
        self.frames.append(("reset", reason.value, str(cursor)))
        self.shown = snapshot

    def want_head(self, generation, ask):
        self.asked.append(ask)

    def want_page(self, generation, seq):
        self.asked.append(("page", seq))

    def want_next(self, generation, seq):
        self.asked.append(("next", seq))

    def want_state(self, generation):
        self.asked.append("state")

    def want_snapshot(self, generation, reason):
        self.asked.append("snapshot")

    def later(self, generation, delay_seconds, ask):
        self.timers.append((delay_seconds, ask))

    # what the world does

    def took(self) -> list[Any]:
        """Frames since the last look."""
        frames, self.frames = self.frames, []
        return frames

    def questions(self) -> list[Any]:
        """Questions since the last look."""
        asked, self.asked = self.asked, []
        return asked

    def live(self, seq, prev):
        self.feed.live(seq, prev, Record(seq))

    def head(self, ask, seq, up_to, log=LOG):
        self.feed.head(self.feed.generation, ask, seq, up_to, log)

    def page(self, *seqs, more=False):
        self.feed.page(self.feed.generation, [Record(seq) for seq in seqs], more)

    def next(self, seq):
        self.feed.next(self.feed.generation, None if seq is None else Record(seq))

    def leader(self, log=LOG):
        self.feed.leader(self.feed.generation, log)

    def snapshot(self, snapshot):
        self.feed.snapshot(self.feed.generation, snapshot)

    def timer(self, ask):
        """The last timer set has passed; it was one for `ask`."""
        assert self.timers.pop()[1] is ask
        self.feed.timer(self.feed.generation, ask)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def live(owner: Owner) -> Owner:
    """A session that has joined at 10, the newest record of a log that ends at 12."""
    owner.feed.hello(Cursor("e", 10))
    owner.head(Ask.OPENING, 10, 12)
    assert owner.took() == [("ready", "e.10"), ("live", "e.10")]
    assert owner.questions() == [Ask.OPENING]
    return owner


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


# --- live copies


def test_live_copies_go_straight_out_in_order(live):
    live.live(13, 10)
    live.live(15, 13)
    assert live.took() == [13, 15]
    assert live.questions() == []


def test_a_live_copy_costs_no_memory(live):
    copies = [(seq, seq - 1, Record(seq)) for seq in range(11, 1011)]
    live.deliver = lambda seq, message: True
    before = sys.getallocatedblocks()
    for seq, prev, record in copies:
        live.feed.live(seq, prev, record)
    assert sys.getallocatedblocks() - before < 100
    assert live.feed.last == 1010


def test_a_doubled_or_late_copy_is_dropped(live):
    live.live(13, 10)
    live.live(13, 10)
    live.live(9, 8)
    assert live.took() == [13]


def test_a_first_record_follows_upon_any_position(live):
    live.live(13, 0)
    assert live.took() == [13]


def test_a_copy_whose_predecessor_was_not_seen_waits_for_what_was_lost(live):
    live.live(15, 13)
    assert live.took() == []
    assert live.questions() == [("page", 10)]
    live.page(10, 13, 15)
    assert live.took() == [13, 15, ("live", "e.15")]
    assert live.counters.repairs == 1


def test_a_copy_is_not_sent_on_the_word_of_a_replica_that_shows_nothing(live):
    live.live(15, 13)
    live.page(10)
    assert live.took() == []
    live.timer(Ask.PAGE)
    live.page()
    assert live.took() == []
    live.timer(Ask.PAGE)
    live.page(10, 13, 15)
    assert live.took() == [13, 15, ("live", "e.15")]
    assert live.counters.fruitless_reads == 2


def test_after_three_fruitless_reads_the_leader_gives_what_no_replica_shows(live):
    live.live(15, 13)
    live.page(10)
    live.timer(Ask.PAGE)
    live.page(10)
    live.timer(Ask.PAGE)
    live.questions()
    live.page(10)
    assert live.questions() == [("next", 11)]
    live.next(13)
    live.leader()
    assert live.took() == [13, 15, ("live", "e.15")]


def test_what_the_leader_no_longer_holds_is_not_waited_for(live):
    live.live(15, 13)
    for _ in range(2):
        live.page(10)
        live.timer(Ask.PAGE)
    live.page(10)
    live.live(17, 10)
    live.next(None)
    live.leader()
    assert live.took() == [17, ("live", "e.17")], "what was heard after the question is still owed"
    assert live.timers[-1] == (1.0, Ask.CHECK), "a leader just elected may not have applied all"


def test_what_was_trimmed_before_it_could_be_read_is_announced(live):
    live.live(15, 13)
    for _ in range(2):
        live.page(10)
        live.timer(Ask.PAGE)
    live.page(10)
    live.next(None)
    live.leader(LogState("e", 14, 20))
    assert live.questions()[-1] == "snapshot"
    assert live.took() == []


def test_copies_parked_while_a_page_was_read_spare_the_next_read(live):
    live.live(15, 13)
    live.live(17, 15)
    live.live(19, 17)
    live.questions()
    live.page(10, 13)
    assert live.took() == [13, 15, 17, 19, ("live", "e.19")]
    assert live.questions() == []


def test_a_parked_copy_that_names_no_predecessor_is_not_taken_for_the_next(live):
    live.live(15, 13)
    live.live(17, 0)
    live.page(10, 13, more=True)
    assert live.took() == [13, 15]
    assert live.feed.state is State.CATCH


def test_more_copies_than_can_be_parked_cost_reads_and_nothing_else(live):
    live.live(15, 13)
    for seq in range(16, 16 + PARKED_LIMIT):
        live.live(seq, seq - 1)
    assert live.counters.overflows == 1
    end = 15 + PARKED_LIMIT
    live.page(10, 13)
    live.timer(Ask.PAGE)
    live.page(13, *range(15, end + 1))
    assert live.took() == [13, *range(15, end + 1), ("live", f"e.{end}")]


# --- pages


def behind(owner: Owner, cursor: int = 4, head: int = 10) -> Owner:
    """A session that has a page to read, from `cursor` on."""
    owner.feed.hello(Cursor("e", cursor))
    owner.head(Ask.OPENING, head, 12)
    owner.took()
    owner.questions()
    return owner


def test_every_page_begins_with_what_was_sent_last(owner):
    behind(owner).page(4, 5, 6, more=True)
    owner.page(6, 7, 8, more=True)
    owner.page(8, 10)
    assert owner.questions() == [("page", 6), ("page", 8)]
    assert owner.took() == [5, 6, 7, 8, 10, ("live", "e.10")]


def test_a_log_trimmed_between_two_pages_is_announced(owner):
    behind(owner).page(4, 5, 6, more=True)
    owner.page(9, 10)
    assert owner.took() == [5, 6], "a page that does not prove itself waits for the leader"
    owner.leader(LogState("e", 9, 12))
    assert owner.took() == []
    assert owner.questions() == [("page", 6), "state", "snapshot"]


def test_a_cursor_whose_own_record_was_erased_is_whole(owner):
    behind(owner).page(5, 10)
    assert owner.questions() == ["state"]
    owner.leader()
    assert owner.took() == [5, 10, ("live", "e.10")]


def test_a_page_filled_by_the_last_record_alone_is_got_past(owner):
    behind(owner).page(4, more=True)
    assert owner.questions() == [("page", 5)]
    owner.page(7, more=True)
    assert owner.took() == [], "a page that begins behind the last record proves nothing by itself"
    owner.leader()
    assert owner.took() == [7]


def test_what_a_replica_has_more_of_is_waited_for_though_another_shows_nothing(owner):
    behind(owner, head=6).page(4, 6, more=True)
    owner.page(6)
    assert ("live", "e.6") not in owner.took()
    owner.timer(Ask.PAGE)
    owner.page(6, 9)
    assert owner.took() == [9, ("live", "e.9")]


def test_a_page_read_from_another_incarnation_is_not_shown(owner):
    behind(owner).page(7)
    owner.leader(LogState("f", 1, 7))
    assert owner.took() == []
    assert owner.questions() == ["state", "snapshot"]


# --- sockets without room


def test_a_record_without_room_is_read_again_once_there_is_room_and_what_was_sent_stays_sent(live):
    live.places = 1
    live.live(13, 10)
    live.live(15, 13)
    live.live(17, 15)
    assert live.took() == [13]
    assert live.questions() == []
    live.places = 1000
    live.feed.writable()
    assert live.questions() == [("page", 13)]
    live.page(13, 15, 17)
    assert live.took() == [15, 17, ("live", "e.17")]
    assert live.counters.no_room == 1


def test_a_page_is_sent_as_far_as_there_is_room(owner):
    behind(owner)
    owner.places = 2
    owner.page(4, 5, 6, 7)
    assert owner.took() == [5, 6]
    assert owner.questions() == []
    owner.places = 1000
    owner.feed.writable()
    owner.page(6, 7, 10)
    assert owner.took() == [7, 10, ("live", "e.10")]


def test_nothing_is_read_for_a_socket_without_room(owner):
    owner.places = 0
    behind(owner)
    assert owner.asked == []
    owner.places = 1000
    owner.feed.writable()
    assert owner.questions() == [("page", 4)]


def test_room_during_a_read_asks_for_nothing_more(owner):
    behind(owner)
    owner.feed.writable()
    assert owner.questions() == []


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


def test_a_new_device_for_which_there_is_no_snapshot_begins_at_the_end(owner):
    owner.feed.hello(None)
    owner.snapshot(None)
    owner.head(Ask.LEADER, 10, 12)
    assert owner.took() == [("reset", "new", "e.12"), ("live", "e.12")]


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
