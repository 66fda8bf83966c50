"""What counts as unread, one rule at a time."""

import json
from typing import Any

import pytest

from engine.partition.reader import Delivered
from projections.folds.unread import NONE_UNREAD, Unread, fold

ALICE = "default.alice"


def log(*records: dict[str, Any] | bytes, headers: bytes = b"") -> list[Delivered]:
    bodies = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return [Delivered(b"log.0.default.alice", seq, seq * 10**9, headers, body) for seq, body in enumerate(bodies, 1)]


def new(id: str, **fields: Any) -> dict[str, Any]:
    return {"id": id, "kind": "notification", **fields}


def count(*records: dict[str, Any] | bytes, now_ms: int = 0, bound: int = 3) -> Unread:
    return fold(log(*records), now_ms, bound=bound).get(ALICE, NONE_UNREAD)


def test_each_notification_counts_once_however_often_its_id_comes():
    assert count(new("a"), new("b"), new("a")) == Unread(2, {})


@pytest.mark.parametrize("kind", ["read", "archive", "recall"])
def test_what_no_longer_counts_does_not_count_again_when_it_is_published_again(kind):
    assert count(new("a"), {"id": "r", "kind": kind, "ids": ["a"]}, new("a")) == NONE_UNREAD


def test_an_id_that_comes_after_all_that_are_remembered_is_new_and_counts_once():
    records = log(new("a"), new("b"), {"id": "r", "kind": "read", "ids": ["a"]}, new("c"), new("a"))
    assert fold(records, 0, remembered=3)[ALICE] == Unread(2, {})
    assert fold(records, 0, remembered=2)[ALICE] == Unread(3, {})
    assert fold([*records, *log(new("d"), new("e"), new("a"))], 0, remembered=2)[ALICE] == Unread(5, {})


def test_what_is_not_for_the_screen_does_not_count():
    assert fold(log(new("a"), headers=b"NATS/1.0\r\nSeamark-Skip: 1\r\n\r\n"), 0) == {}


@pytest.mark.parametrize("kind", ["read", "archive", "recall"])
def test_what_is_read_archived_or_recalled_no_longer_counts(kind):
    after = {"id": "r", "kind": kind, "ids": ["a", "never-there"]}
    assert count(new("a", category="mail"), new("b", category="mail"), after) == Unread(1, {"mail": 1})


def test_everything_up_to_a_sequence_is_read_and_nothing_that_comes_later():
    assert count(new("a"), new("b"), {"id": "r", "kind": "read", "up_to": 1}) == Unread(1, {})
    assert count(new("a"), {"id": "r", "kind": "read", "up_to": 99, "ids": ["b"]}, new("b")) == Unread(1, {})


def test_only_the_newest_of_a_collapse_key_counts_and_the_former_does_not_come_back():
    first, second = new("a", collapse_key="k", category="x"), new("b", collapse_key="k", category="y")
    assert count(first, second) == Unread(1, {"y": 1})
    assert count(first, second, {"id": "r", "kind": "recall", "ids": ["b"]}) == NONE_UNREAD
    assert count(first, {"id": "r", "kind": "read", "ids": ["a"]}, second) == Unread(1, {"y": 1})


def test_what_has_expired_does_not_count():
    soon = new("a", expires_at="1970-01-01T00:00:10Z", category="mail")
    assert count(soon, new("b"), now_ms=9_999) == Unread(2, {"mail": 1})
    assert count(soon, new("b"), now_ms=10_000) == Unread(1, {})


def test_a_fold_is_bounded_and_says_so_until_all_that_was_given_up_is_read_at_once():
    five = [new(id) for id in "abcde"]  # a and b are given up
    assert count(*five) == Unread(3, {}, more=True)
    one_by_one = [{"id": f"r{id}", "kind": "read", "ids": [id]} for id in "abcde"]
    assert count(*five, *one_by_one) == Unread(0, {}, more=True), "which were given up is not remembered"
    assert count(*five, {"id": "r", "kind": "read", "up_to": 1}) == Unread(3, {}, more=True), "b is still unread"
    assert count(*five, {"id": "r", "kind": "read", "up_to": 2}) == Unread(3, {})
    assert count(*five, {"id": "r", "kind": "archive", "up_to": 9}) == NONE_UNREAD


def test_room_is_made_by_what_has_expired_by_the_time_of_the_log():
    old = new("a", expires_at="1970-01-01T00:00:02Z")
    assert count(new("x"), old, new("b"), new("c")) == Unread(3, {}), "a had expired when c came"
    late = new("a", expires_at="1970-01-01T01:00:00Z")
    assert count(late, new("b"), new("c"), new("d")) == Unread(3, {}, more=True)
    assert count(late, new("b"), new("c"), new("d"), now_ms=3_600_000) == Unread(3, {}), "what was given up has expired"


def test_what_is_no_record_changes_nothing():
    assert count(b"{", b"[]", b'{"id":1,"kind":"notification"}', {"id": "a", "kind": "unheard-of"}) == NONE_UNREAD
