"""What a feed promises of live copies, pages and sockets without room; see `test_feed.py` for the rest."""

from __future__ import annotations

import sys

import pytest

from gateway.join.catchup import PARKED_LIMIT
from gateway.join.feed import Ask, LogState, State
from tests.support.feedowner import Owner, Record, behind, joined


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def live(owner: Owner) -> Owner:
    return joined(owner)


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
