"""What may be asked for as a campaign, and where its pages end."""

from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.campaigns.cuts import Bounds, Member, Window, bounds, cut, remainder
from engine.campaigns.draft import Audience, Draft, InvalidCampaign, Message, page_event
from engine.campaigns.states import Dispatched, Position, dispatched
from engine.log.incarnations import restored_metadata
from engine.log.marks import Mark
from seamark.protocol.limits import EVENT_BYTES_MAX, FANOUT_BYTES_MAX, RECIPIENTS_MAX
from tests.support.topology import stream_with

MESSAGE = Message(type="sale.autumn")


def draft(audience: Audience, id: str = "c0", **more: Any) -> Draft:
    return Draft(id=id, audience=audience, message=MESSAGE, **more)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (draft(Audience(users=("a",)), "no blanks"), "id"),
        (draft(Audience(users=())), "audience.users"),
        (draft(Audience(users=("a", ""))), "audience.users[1]"),
        (draft(Audience(topic="a\0")), "audience"),
        (draft(Audience(topic="a"), exclude=Audience(everyone=True)), "exclude.everyone"),
        (draft(Audience(topic="a"), start_at=datetime(2026, 1, 1)), "start_at"),  # noqa: DTZ001
        (Draft(id="a", audience=Audience(topic="a"), message=Message(type="no blanks")), "message.subject"),
    ],
)
def test_a_campaign_that_could_not_be_sent_is_refused_with_the_member_at_fault(asked: Draft, field: str) -> None:
    with pytest.raises(InvalidCampaign) as refused:
        asked.check("acme")
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "exactly one"),
        ({"topic": "a", "everyone": True}, "exactly one"),
        ({"everyone": False}, "only be true"),
        ({"segment": []}, "segment"),
        ({"segment": [{"attribute": "a", "op": "in", "value": 1}]}, "list for `in`"),
        ({"segment": [{"attribute": "a", "op": "eq", "value": [1]}]}, "list for `in`"),
        ({"segment": [{"attribute": "a", "op": "lt", "value": True}]}, "number or a text"),
        ({"segment": [{"attribute": "a", "op": "exists", "value": 1}]}, "true or false"),
        ({"topics": "a"}, "topics"),
    ],
)
def test_an_audience_that_is_none_is_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(said, Audience)


users = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
windows = st.builds(
    lambda names, excluded, final: Window(
        [Member(name, name in excluded) for name in sorted(names)], max(names, default=""), final
    ),
    st.sets(users, max_size=30),
    st.sets(users, max_size=5),
    st.booleans(),
)


@given(windows, st.integers(1, 8), st.integers(1, 300))
def test_pages_cut_one_after_the_other_hold_everybody_once(window: Window, recipients: int, size: int) -> None:
    most, seen, after = Bounds(recipients, size), [], ""
    while True:
        rest = Window([member for member in window.members if member.user > after], window.reached, window.final)
        piece = cut(rest, most)
        seen += piece.recipients
        assert piece.members + remainder(rest, piece).members == len(rest.members)
        assert len(piece.recipients) == 1 or len(piece.recipients) <= recipients
        names = sum(len(msgspec.json.encode(user)) + 1 for user in piece.recipients)
        assert len(piece.recipients) <= 1 or names <= size
        assert all(user <= piece.up_to for user in piece.recipients)
        if piece.up_to == window.reached:
            assert piece.final == window.final
            break
        assert piece.up_to > after
        after = piece.up_to
    assert seen == [member.user for member in window.members if not member.excluded]


@settings(max_examples=5)
@given(st.text("a\n\x01é€", min_size=1, max_size=40), st.integers(0, 200_000))
def test_the_largest_page_is_an_event_that_is_taken(letters: str, data_bytes: int) -> None:
    """With the widest names that fit, next to data of any size."""
    data = msgspec.Raw(msgspec.json.encode("x" * data_bytes))
    message = Message(type="sale.autumn", data=data)
    names = sorted({f"{letters[: 20 // len(letters.encode())]}{n}" for n in range(RECIPIENTS_MAX + 1)})
    empty = page_event("acme", "c" * 100, message, 10**9, ["-"], after="", up_to="")
    piece = cut(
        Window([Member(name, False) for name in names], names[-1], True), bounds(len(empty.payload), len(data), None)
    )
    event = page_event("acme", "c" * 100, message, 10**9, piece.recipients, after=names[0], up_to=piece.up_to)
    assert len(event.payload) <= EVENT_BYTES_MAX - 1024
    assert len(piece.recipients) * len(data) <= FANOUT_BYTES_MAX


@pytest.mark.parametrize(("rate", "recipients"), [(None, RECIPIENTS_MAX), (1, 5), (300, 1500), (10**6, RECIPIENTS_MAX)])
def test_a_page_holds_what_the_rate_allows_in_five_seconds(rate: int | None, recipients: int) -> None:
    assert bounds(300, 2, rate).recipients == recipients


BULK = {"name": "BULK", "metadata": {"seamark.epoch": "e1"}}


def mark(epoch: str, seq: int) -> Mark:
    return Mark(epoch, seq, 1, "o", "l1")


@pytest.mark.parametrize(
    ("at", "found", "verdict"),
    [
        (Position("e1", 7), None, Dispatched.NOT_YET),
        (Position("e1", 7), mark("e1", 6), Dispatched.NOT_YET),
        (Position("e1", 7), mark("e1", 7), Dispatched.YES),
        (Position("e1", 7), msgspec.structs.replace(mark("e1", 7), user="m"), Dispatched.NOT_YET),
        (Position("e0", 7), mark("e1", 9), Dispatched.UNKNOWN),
        (Position("e0", 7), mark("e0", 7), Dispatched.YES),
        (Position("e0", 7), mark("e0", 6), Dispatched.UNKNOWN),
    ],
)
def test_a_page_is_dispatched_once_its_whole_event_lies_behind_the_mark(
    at: Position, found: Mark | None, verdict: Dispatched
) -> None:
    assert dispatched(at, found, stream_with(BULK, last_seq=9)) is verdict


@pytest.mark.parametrize(
    ("at", "found", "verdict"),
    [
        (Position("e1", 5), mark("e2", 5), Dispatched.YES),
        (Position("e1", 5), mark("e2", 4), Dispatched.NOT_YET),
        (Position("e1", 5), mark("e1", 4), Dispatched.NOT_YET),
        (Position("e1", 6), mark("e2", 9), Dispatched.UNKNOWN),
        (Position("e1", 6), mark("e1", 6), Dispatched.YES),
    ],
)
def test_of_a_bulk_put_back_to_a_backup_what_the_backup_held_goes_on_and_the_rest_is_said_to_be_unknown(
    at: Position, found: Mark, verdict: Dispatched
) -> None:
    metadata = restored_metadata(stream_with(BULK, last_seq=5), "e2", 5)
    assert dispatched(at, found, stream_with(BULK | {"metadata": metadata}, last_seq=9)) is verdict
