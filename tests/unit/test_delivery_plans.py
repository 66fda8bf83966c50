"""Plans in the fold of receipts: the highest term counts, whole, in whatever order receipts come."""

import json
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from engine.partition.reader import Delivered
from projections.folds.deliveries import PLAN_RANK, Delivery, fold, plan_in, replanned

AT = datetime(2027, 1, 15, 8, tzinfo=UTC)


def stored(*bodies: dict) -> list[Delivered]:
    return [
        Delivered(b"rcpt.0.default.alice", seq, 1_800_000_000_000_000_000, b"", json.dumps(body).encode())
        for seq, body in enumerate(bodies, 1)
    ]


def planned(term: int, id: str = "e1", second: int = 0, **channels: tuple[str, str]) -> dict:
    plan = {name: {"when": when, "why": why} for name, (when, why) in channels.items()}
    at = AT.replace(second=second).isoformat()
    return {"id": id, "user": "alice", "channel": "", "state": "planned", "at": at, "term": term, "plan": plan}


def told(channel: str, state: str, id: str = "e1") -> dict:
    return {"id": id, "user": "alice", "channel": channel, "state": state, "at": AT.isoformat(), "attempt": 1}


NOW = ("now", "default")


def rows(*bodies: dict) -> dict[str, Delivery]:
    return {key[3]: row for key, row in fold(stored(*bodies)).rows().items()}


def test_the_highest_term_wins_whole():
    found = rows(planned(7, email=NOW, push=NOW), planned(8, email=("never", "user_off")), planned(6, sms=NOW))
    assert set(found) == {"email"}
    assert (found["email"].state, found["email"].reason, found["email"].plan_term) == ("suppressed", "user_off", 8)


def test_what_a_channel_has_told_stands_whatever_was_planned():
    found = rows(planned(7, email=NOW, push=NOW), told("push", "sent"), planned(8, email=("at:x", "quiet_hours")))
    assert (found["push"].state, found["push"].plan_term) == ("sent", 0)
    assert (found["email"].state, found["email"].plan_when) == ("planned", "at:x")
    assert rows(told("push", "queued"), planned(1, push=NOW))["push"].state == "queued"


def test_what_is_over_says_how_it_ended():
    found = rows(planned(1, a=("never", "expired"), b=("never", "recalled"), c=("never", "suppressed:bounce")))
    assert {name: row.state for name, row in found.items()} == {"a": "expired", "b": "cancelled", "c": "suppressed"}
    assert {row.rank for row in found.values()} == {PLAN_RANK}


def test_a_receipt_that_plans_nothing_or_has_no_term_is_passed_over():
    nameless = {key: value for key, value in planned(1, a=NOW).items() if key != "id"}
    folded = fold(stored(planned(1), planned(0, a=NOW), planned(1 << 70, a=NOW), nameless))
    assert (folded.rows(), folded.skipped) == ({}, 4)


decisions = st.sampled_from([NOW, ("never", "expired"), ("digest:x", "digest")])
bodies = st.lists(
    st.one_of(
        st.builds(
            lambda term, name, second, plan: planned(term, name, second, **plan),
            st.integers(1, 4),
            st.sampled_from(["e1", "e2"]),
            st.integers(0, 3),
            st.dictionaries(st.sampled_from(["email", "push", "inapp"]), decisions, min_size=1),
        ),
        st.builds(told, st.sampled_from(["email", "push"]), st.sampled_from(["queued", "sent", "read"]), st.just("e1")),
    ),
    max_size=8,
)


@given(bodies, st.randoms())
def test_the_order_of_receipts_changes_nothing_and_neither_does_telling_them_twice(said, rng):
    shuffled = [*said, *said]
    rng.shuffle(shuffled)
    assert fold(stored(*shuffled)).rows() == fold(stored(*said)).rows()


@given(bodies)
def test_the_rows_of_a_notification_tell_its_plan_and_a_plan_changes_them_as_the_fold_does(said):
    """The table has only rows; what it makes of a later plan must be what the fold makes of all receipts."""
    before = fold(stored(*said))
    for later in (planned(2, second=1, push=NOW), planned(9, email=("never", "expired"))):
        known = {key[3]: row for key, row in before.rows().items() if key[2] == "e1"}
        stands = before.plans.get(("default", "alice", "e1"))
        assert (plan_in(known) or stands) is None or plan_in(known).channels == stands.channels  # type: ignore[union-attr]
        [plan] = fold(stored(later)).plans.values()
        for channel, row in replanned(known, plan).items():
            known.pop(channel, None)
            known |= {channel: row} if row is not None else {}
        after = fold(stored(later), before)
        assert known == {key[3]: row for key, row in after.rows().items() if key[2] == "e1"}
