"""Notifications that are alike: what a form gives is, byte for byte, what is made of each of them by itself."""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.partition.worker import Delivered
from engine.plan.decisions import Inputs, Kill
from engine.plan.hours import Digest, Window
from engine.plan.preferences import QuietHours
from engine.plan.profile import Profile, Suppression
from engine.planner import deciding
from engine.planner.deciding import Decider, Planned
from engine.planner.forms import Form
from engine.planner.plans import Found, User, notifications_in
from engine.planner.shares import Above
from tests.support.plans import NOON, inputs, plain, with_document, with_line, with_profile
from tests.unit.test_planner_plans import body


class Said:
    """Rules, profiles, shares: what inputs have of them."""

    def __init__(self, inputs: Inputs, *, webhook: bool = False, above: Above = Above()) -> None:  # noqa: B008 - immutable
        self.inputs, self.webhook, self.shown = inputs, webhook, above
        self.defaults = inputs.defaults

    async def of(self, tenant: str) -> "Said":
        return self

    def rule_of(self, type: str) -> Any:
        return self.inputs.rule

    def templates_of(self, type: str) -> Any:
        return self.inputs.templates

    def webhook_of(self, type: str) -> bool:
        return self.webhook

    async def of_all(self, users: Sequence[User]) -> list[Profile]:
        return [self.inputs.profile for _ in users]

    async def above(self, tenants: Any) -> Above:
        return self.shown

    def drops(self, tenant: str, user: str) -> tuple[Kill, ...]:
        return self.inputs.kills if user != "b" else ()

    def decider(self) -> Decider:
        return Decider(self, self, self.drops, None, self)  # type: ignore[arg-type]


def found(bodies: Sequence[dict[str, Any]], users: Sequence[str], now: datetime) -> list[Found]:
    at = int(now.timestamp() * 1e9)
    stored = [
        Delivered(f"log.3.acme.{user}".encode(), seq, at - seq * 1_234_567_890, b"", msgspec.json.encode(one))
        for seq, (one, user) in enumerate(zip(bodies, users, strict=True), 1)
    ]
    return list(notifications_in(stored))


def planned(decider: Decider, records: Sequence[Found], now: datetime) -> Planned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deciding, "datetime", SimpleNamespace(now=lambda _: now))
        return asyncio.run(decider.planned(records, 5, lambda _: False))


def by_itself(said: Said, records: Sequence[Found], now: datetime) -> Planned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decider, "_alike", lambda *_: None)
        return planned(said.decider(), records, now)


_texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12) | st.sampled_from(
    ("%b", "%", "null")
)
_kinds = st.fixed_dictionaries(
    {
        "type": st.sampled_from(("order.shipped", "other", None)),
        "category": st.sampled_from((None, "orders", "50% off %b")),
        "priority": st.sampled_from(("normal", "low", "critical")),
        "plan": st.sampled_from(
            [
                {"inapp": {"when": "now", "why": "default"}},
                {"push": {"when": "now", "why": "requested"}, "inapp": {"when": "now", "why": "requested"}},
                {"fax": {"when": "now", "why": "requested"}},
            ]
        ),
    }
)


@st.composite
def records(draw: st.DrawFn, now: datetime) -> list[Found]:
    """Some that are alike, some that are not."""
    kinds = draw(st.lists(_kinds, min_size=1, max_size=3))
    near = st.sampled_from((-5, 5, 9000, 99_000)).map(lambda seconds: (now + timedelta(seconds=seconds)).isoformat())
    own = st.fixed_dictionaries(
        {"id": _texts},
        optional={
            "trace": _texts | st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            "collapse_key": _texts,
            "expires_at": near,
            "transaction_id": _texts,
            "data": st.dictionaries(_texts, _texts | st.integers(), max_size=2),
        },
    )
    bodies = draw(st.lists(st.tuples(st.sampled_from(kinds), own), min_size=3, max_size=12))
    users = draw(st.lists(st.sampled_from(("a", "b", "a=2Fb", "=C3=BC")), min_size=len(bodies), max_size=len(bodies)))
    return found([{"kind": "notification", **kind, **each} for kind, each in bodies], users, now)


def timeless(asked: Inputs) -> Inputs:
    """The same without most of what makes a decision hold for a while only."""
    asked = with_document(asked, "tenant", quiet_hours=None, send_windows=())
    return with_profile(with_document(asked, "user", quiet_hours=None), suppressions=())


@settings(max_examples=100, deadline=None)
@given(
    st.data(),
    inputs() | inputs().map(timeless),
    st.booleans(),
    st.sampled_from((Above(), Above(), Above(frozenset({"acme"})))),
)
def test_what_a_form_gives_is_what_is_made_of_each_by_itself(
    data: st.DataObject, asked: Inputs, webhook: bool, above: Above
) -> None:
    said = Said(asked, webhook=webhook, above=above)
    decider, now = said.decider(), asked.now
    for _ in range(3):
        given_records = data.draw(records(now))
        assert planned(decider, given_records, now) == by_itself(said, given_records, now)
        now += timedelta(seconds=data.draw(st.sampled_from((1, 3600, 40_000))))


def filled(said: Said, monkeypatch: pytest.MonkeyPatch, *bodies: dict[str, Any]) -> int:
    """How many of these are made by a form, when each of them comes a few times."""
    count, fill = 0, Form.filled

    def counted(self: Form, *args: Any) -> Any:
        nonlocal count
        made = fill(self, *args)
        count += made is not None
        return made

    monkeypatch.setattr(Form, "filled", counted)
    some = [one for one in bodies for _ in range(4)]
    decider = said.decider()
    for now in (NOON, NOON + timedelta(hours=1)):
        given_records = found(some, ["alice"] * len(some), now)
        assert planned(decider, given_records, now) == by_itself(said, given_records, now)
    return count


def test_the_second_and_all_later_ones_of_a_kind_have_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    later = (NOON + timedelta(days=1)).isoformat()
    kinds = [body(**other) for other in ({}, {"trace": "t"}, {"collapse_key": "c"}, {"expires_at": later})]
    assert filled(Said(plain()), monkeypatch, *kinds, body(data={"order": 17})) == 5 * 8 - 4


@pytest.mark.parametrize(
    "asked",
    [
        with_document(plain(), "user", quiet_hours=QuietHours((Window(start="12:30", end="14:00"),))),
        with_document(plain(), "tenant", quiet_hours=QuietHours((Window(start="12:30", end="14:00"),))),
        with_document(plain(), "tenant", send_windows=(Window(start="09:00", end="12:30"),)),
        with_profile(plain(), suppressions=(Suppression("push", "soft", expires_at=NOON + timedelta(minutes=5)),)),
        with_line(plain(), "push", unless_seen_seconds=60),
    ],
    ids=["user's quiet hours", "tenant's quiet hours", "send windows", "a suppression that ends", "an escalation"],
)
def test_where_time_has_a_say_each_is_decided_by_itself(asked: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert filled(Said(asked), monkeypatch, body()) == 0


def test_nothing_of_a_first_one_is_kept() -> None:
    decider = Said(plain()).decider()
    planned(decider, found([body(data={"text": "x" * 100_000})], ["alice"], NOON), NOON)
    assert len(repr(decider._forms)) < 10_000


def test_whether_one_is_over_before_it_is_due_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    later = body(expires_at=(NOON + timedelta(days=1)).isoformat())
    assert filled(Said(with_line(plain(), "push", unless_seen_seconds=60)), monkeypatch, later) == 0
    digest = with_line(plain(), "push", digest=Digest(every="hour"))
    rule = digest.rule
    assert rule is not None
    assert filled(Said(replace(digest, rule=replace(rule, ttl_seconds=1800))), monkeypatch, body()) == 0
    assert filled(Said(digest), monkeypatch, later) == 0


def test_what_is_over_by_its_rule_or_by_itself_is_not_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = plain().rule
    assert rule is not None
    short = plain(rule=replace(rule, ttl_seconds=3))
    assert 0 < filled(Said(short), monkeypatch, body()) < 7
    over = body(expires_at=NOON.isoformat())
    assert filled(Said(plain()), monkeypatch, over) == 0
