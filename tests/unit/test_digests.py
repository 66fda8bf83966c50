"""What is in a digest, what it says, and when it goes: without servers."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from msgspec.structs import replace

from engine.channels.channel import Context, Job, Members, Outcome
from engine.channels.email.channel import Sender, mail_for
from engine.channels.templates import render
from engine.jobs.claims import Done, Leased, Waiting
from engine.jobs.desk import Over, Send
from engine.jobs.digests import digest_id, key_in, next_round, with_members
from engine.jobs.receipts import doubt_receipts, receipts_of
from engine.jobs.retry import POLICIES, settle
from engine.jobs.splitting import parts_of
from engine.plan.decide import plan, wakes
from engine.plan.hours import SPREAD, Digest, Window
from engine.plan.preferences import Preferences, QuietHours, TenantDefaults
from engine.plan.profile import OPTED_OUT, Profile, Suppression
from engine.plan.rules import Cap, ChannelRule, TypeRule
from engine.worker import digest as module
from engine.worker.caughtup import BEHIND_SECONDS, PASS_SECONDS, CaughtUp, Heads, Known, Place
from engine.worker.digest import Digests
from engine.worker.digest_templates import DIGEST_TEMPLATES
from seamark.protocol.receipts import Receipt
from tests.support.plans import NOON, plain, with_facts, with_line, with_profile

KEY = "news/2026-03-04T11:00:00Z"
JOB = Job(
    id=digest_id(KEY),
    tenant="t",
    user="alice",
    type="digest",
    channel="email",
    stage="digest",
    first_at=NOON,
    category="news",
    digest=KEY,
)
MEMBERS = Members(("n2", "n1"), NOON)


def known(id: str, **other: Any) -> Known:
    one = Known(
        id, NOON - timedelta(hours=2), "news.item", "news", ("inapp",), None, None, False, False, False, False, False
    )
    return one._replace(**other)


class World:
    """Tables, rules, the profile of a user, and a desk that renders what it is given."""

    def __init__(self, *found: Known) -> None:
        self.found = list(found)
        self.knows = True
        self.profile = Profile(version=1, reach=("email",))
        self.line = ChannelRule(digest=Digest())
        self.priority: Any = "normal"
        self.receipts: list[Receipt] = []
        self.aimed: list[Job] = []
        controls = SimpleNamespace(controls=SimpleNamespace(drops=lambda tenant, user: ()))
        self.places: dict[str, datetime] = {}
        self.took: list[tuple[str, str]] = []
        self.digests = Digests(self, self, self, self, controls, None, self.store, self, self)  # type: ignore[arg-type]

    async def take(self, job: Job, pattern: str, cap: Cap) -> datetime | None:
        self.took.append((job.id, pattern))
        return self.places.get(pattern)

    def now(self) -> datetime:
        return NOON

    async def knows_all_of(self, tenant: str, user: str) -> bool:
        return self.knows

    async def planned(self, *_: Any) -> list[Known]:
        return self.found

    async def known(self, tenant: str, user: str, ids: Sequence[str]) -> list[Known]:
        return [one for one in self.found if one.id in ids]

    async def records(self, tenant: str, user: str, ids: Sequence[str]) -> dict[str, bytes]:
        return {id: json.dumps({"at": "2026-03-04T09:00:00Z", "data": {"title": id}}).encode() for id in ids}

    async def of(self, *who: str) -> Any:
        if len(who) == 2:
            return self.profile

        def rule(type: str) -> TypeRule:
            pattern = f"{type.partition('.')[0]}.*"
            return TypeRule(pattern=pattern, category="news", channels={"email": self.line}, priority=self.priority)

        return SimpleNamespace(
            defaults=TenantDefaults(), rule_of=rule, templates_of=lambda _: (), webhook_of=lambda _: False
        )

    async def store(self, job: Job, receipts: Sequence[Receipt]) -> None:
        self.receipts += receipts

    async def aim(self, job: Job, category: str | None, profile: Profile) -> Send:
        self.aimed.append(job)
        return Send(job.data, None)

    def decide(self, job: Job = JOB) -> Any:
        return asyncio.run(self.digests.decide(job, self.aim))

    @property
    def ends(self) -> dict[str | None, tuple[str, str | None]]:
        return {one.id: (one.state, one.reason) for one in self.receipts}


def test_what_is_unread_goes_together_and_the_rest_ends_with_its_reason() -> None:
    world = World(
        known("n5"),
        known("n4", read=True),
        known("n3", archived=True),
        known("n2", recalled=True),
        known("n1", superseded=True),
        known("n0", expires_at=NOON),
        known("shown", seen=True),
    )
    send = world.decide()
    assert send.members == Members(("n5", "shown"), NOON), "what was only shown is still unread"
    assert send.rendered["count"] == 2
    assert [item["title"] for item in send.rendered["items"]] == ["n5", "shown"]
    assert world.ends == {
        "n4": ("suppressed", "all_read"),
        "n3": ("suppressed", "all_read"),
        "n2": ("cancelled", "recalled"),
        "n1": ("suppressed", "superseded"),
        "n0": ("expired", "expired"),
    }


def test_where_nothing_is_left_nothing_is_sent() -> None:
    world = World(known("n1", read=True))
    assert world.decide() == Over("suppressed", "all_read")
    assert World().decide() == Over("suppressed", "all_read")


def test_while_the_tables_are_behind_a_digest_waits() -> None:
    world = World(known("n1"))
    world.knows = False
    waits = [world.decide(replace(JOB, put_backs=number)) for number in (0, 1, 20)]
    assert {one.why for one in waits} == {"tables_behind"}
    longest = [2.0, 4.0, 60.0]
    assert all(
        least <= (one.due - NOON).total_seconds() <= 1.5 * least for one, least in zip(waits, longest, strict=True)
    )


class Behind:
    """Tables that stand still."""

    def __init__(self) -> None:
        self.asked = 0

    async def passed(self, heads: Heads) -> bool:
        self.asked += 1
        return False


async def test_one_waits_for_tables_that_stand_still_and_the_others_leave_their_places_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables, now = Behind(), [100.0]
    caught_up = CaughtUp(None, tables, 1)  # type: ignore[arg-type]
    place = Place("e", 1)

    async def heads(*_: str) -> Heads:
        return Heads(0, place, place)

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(caught_up, "heads", heads)
    monkeypatch.setattr("engine.worker.caughtup.asyncio.sleep", sleep)
    monkeypatch.setattr("engine.worker.caughtup.time", SimpleNamespace(monotonic=lambda: now[0]))
    assert not await caught_up.knows_all_of("t", "alice")
    assert now[0] - 100 >= PASS_SECONDS
    began, tables.asked = now[0], 0
    for _ in range(50):
        assert not await caught_up.knows_all_of("t", "bob")
    assert (now[0], tables.asked) == (began, 50), "each is asked for, and none is waited for"
    now[0] += BEHIND_SECONDS
    assert not await caught_up.knows_all_of("t", "bob")
    assert now[0] > began + BEHIND_SECONDS, "somebody tries whether it is worth waiting"


def test_a_digest_whose_place_is_free_by_the_clock_of_its_worker_goes_now() -> None:
    """Redis says when there is a place; a worker's clock may be ahead of that of Redis."""
    world = World(known("n2"), known("o1", type="other.x"), known("n1"))
    world.line = ChannelRule(digest=Digest(), cap=Cap(2, 86_400))
    world.places = {"news.*": NOON}
    assert world.decide().members.ids == ("n2", "o1", "n1")


def test_a_digest_takes_one_place_of_each_cap_of_its_members_and_waits_for_it_with_all_of_them() -> None:
    world = World(known("n2"), known("n1"), known("o1", type="offer.new"), known("read", type="other.x", read=True))
    world.line = ChannelRule(digest=Digest(), cap=Cap(2, 86_400))
    assert world.decide().members.ids == ("n2", "n1", "o1")
    assert sorted(world.took) == [(JOB.id, "news.*"), (JOB.id, "offer.*")]
    world.places["offer.*"] = NOON + timedelta(hours=20)
    held = world.decide()
    assert (held.due, held.stage, held.why) == (NOON + timedelta(hours=20), "cap", "throttled")
    world.found = [one._replace(type="news.item") for one in world.found]
    assert world.decide(replace(JOB, stage="cap")).members.ids == ("n2", "n1", "o1")


def test_a_digest_of_a_week_waits_for_its_place_as_long_as_any_mail_and_then_ends() -> None:
    old = NOON - timedelta(days=6)
    world = World(known("n1", stored_at=old), known("o1", stored_at=old, type="offer.new"))
    world.line = ChannelRule(digest=Digest(every="week"), cap=Cap(1, 86_400))
    world.places["news.*"] = NOON + timedelta(hours=23)
    assert world.decide().due == NOON + timedelta(hours=23)
    world.places["news.*"] = NOON + timedelta(hours=25)
    assert world.decide().members.ids == ("o1",)
    assert world.ends == {"n1": ("suppressed", "throttled")}


def test_what_goes_to_one_target_of_a_digest_or_is_silent_by_then_takes_no_place() -> None:
    world = World(known("n1"))
    world.line = ChannelRule(digest=Digest(), cap=Cap(1, 3600))
    world.places["news.*"] = NOON + timedelta(hours=1)
    assert isinstance(world.decide(replace(JOB, members=Members(("n1",), NOON), target="phone")), Send)
    night = QuietHours(windows=(Window(start="11:00", end="13:00"),), channels=("email",))
    world.profile = replace(world.profile, preferences=Preferences(quiet_hours=night))
    assert world.decide().why == "quiet_hours"
    assert world.took == []


def test_whether_is_decided_anew_and_not_when() -> None:
    world = World(known("n1"))
    world.profile = replace(world.profile, preferences=Preferences(channels={"email": "instant"}))
    assert world.decide().members.ids == ("n1",), "else the morning's would come once more"
    world.profile = replace(world.profile, preferences=Preferences(categories={"news": {"email": "off"}}))
    assert world.decide() == Over("suppressed", "category_off")
    stopped = Suppression("email", OPTED_OUT)
    world.profile = replace(world.profile, preferences=Preferences(), suppressions=(stopped,))
    assert world.decide() == Over("suppressed", "opted_out")
    assert world.ends == {"n1": ("suppressed", "opted_out")}
    world.receipts.clear()
    world.profile = Profile(version=2, deleted=True)
    assert world.decide() == Over("suppressed", "user_deleted")
    assert world.receipts == [], "whatever is stored of him now would stay behind"


def test_what_has_waited_for_a_digest_is_not_critical_at_its_end() -> None:
    """An event may say `low` where its rule says `critical`; then it waits, and what is switched off meanwhile holds."""
    world = World(known("n1"))
    world.priority = "critical"
    assert world.decide().members.ids == ("n1",)
    world.profile = replace(world.profile, preferences=Preferences(channels={"email": "off"}))
    assert world.decide() == Over("suppressed", "user_off")


def test_in_quiet_hours_the_whole_digest_waits_and_then_asks_again_what_is_in_it() -> None:
    world = World(known("n1"), known("n2"))
    night = QuietHours(windows=(Window(start="11:00", end="13:00"),))
    world.profile = replace(world.profile, preferences=Preferences(quiet_hours=night))
    held = world.decide()
    assert (held.why, held.stage) == ("quiet_hours", "quiet_hours")
    assert NOON + timedelta(hours=1) <= held.due <= NOON + timedelta(hours=1) + SPREAD
    assert world.receipts == []
    world.found = [known("n1"), known("n2", read=True)]
    assert world.decide(replace(JOB, stage="quiet_hours")).why == "quiet_hours", (
        "it came while it was quiet, as after an outage"
    )
    over = QuietHours(windows=(Window(start="09:00", end="11:00"),))
    world.profile = replace(world.profile, preferences=Preferences(quiet_hours=over))
    assert world.decide(replace(JOB, stage="quiet_hours")).members.ids == ("n1",)
    assert world.ends == {"n2": ("suppressed", "all_read")}


def test_a_repetition_has_exactly_the_same_members_or_is_not_made() -> None:
    world = World(known("n1", read=True), known("n2"), known("n3"))
    tried = replace(JOB, members=MEMBERS, stage="retry", attempt=1)
    send = world.decide(tried)
    assert send.members is MEMBERS
    assert world.receipts == [], "n1 has been rendered before it was read"
    world.found = [known("n1", read=True), known("n2", read=True)]
    assert world.decide(tried) == Over("suppressed", "all_read")


def test_what_is_too_much_for_one_message_goes_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMBERS_BYTES_MAX", 11)
    members = World(known("n1"), known("n2"), known("n3")).decide().members
    assert members == Members(("n1", "n2"), NOON, more=True)
    done = Done(0, "sent", members=members)
    following = next_round(JOB, done, NOON, fresh=True)
    assert following is not None
    assert following.id == f"digest/{KEY}/2"


# --- claims, receipts, rounds ----------------------------------------------------------------------------------------


def test_everything_that_becomes_of_a_digest_is_told_of_each_member() -> None:
    tried = replace(JOB, members=MEMBERS)
    for receipts in (
        doubt_receipts(tried, "lease_lost", NOON),
        receipts_of(tried, Done(0, "sent", "ok", members=MEMBERS), NOON),
        receipts_of(tried, Waiting(1, NOON, NOON, Outcome(kind="transient"), members=MEMBERS), NOON),
    ):
        assert [one.id for one in receipts] == ["n2", "n1"]
    assert receipts_of(JOB, Done(0, "suppressed", "all_read"), NOON) == []


def test_what_is_told_of_a_digest_that_is_settled_anew_counts_on_from_tries_that_were_forgotten() -> None:
    """Else `queued` for a second try would hide the end of what is the first try to whoever remembers nothing."""
    world = World(known("n3"), known("n2", attempts=3), known("n1", attempts=1), known("n0", read=True, attempts=2))
    members = world.decide().members
    assert members.tried == 2
    job = replace(JOB, members=members)
    for receipts, attempt in (
        (doubt_receipts(job, "forgotten", NOON), 3),
        (receipts_of(job, Done(0, "sent", "ok", members=members), NOON), 3),
        (receipts_of(job, Waiting(1, NOON, NOON, Outcome(kind="transient"), members=members), NOON), 4),
    ):
        assert {one.attempt for one in receipts} == {attempt}
    assert [(one.id, one.attempt) for one in world.receipts] == [("n0", 2)]


def test_each_fact_carries_the_trace_of_its_notification_where_that_is_followed() -> None:
    followed, dropped = f"00-{'a' * 32}-{'b' * 16}-01", f"00-{'c' * 32}-{'d' * 16}-00"
    world = World(
        known("n3", trace=followed), known("n2", trace=dropped), known("n1"), known("n0", read=True, trace=followed)
    )
    members = world.decide().members
    assert members.traces == {"n3": followed}
    told = receipts_of(replace(JOB, members=members), Done(0, "sent", "ok", members=members), NOON)
    assert [(one.id, one.trace) for one in told] == [("n3", followed), ("n2", None), ("n1", None)]
    assert [(one.id, one.trace) for one in world.receipts] == [("n0", followed)]


def test_the_key_of_a_digest_is_in_the_id_of_each_of_its_rounds() -> None:
    assert {key_in(digest_id(KEY, round)) for round in (1, 2, 31)} == {KEY}


def test_members_go_with_the_claim_from_try_to_try() -> None:
    lease = Leased(0, "me", members=MEMBERS)
    for kind in ("ok", "transient", "permanent"):
        said = settle(JOB, lease, Outcome(kind=kind), POLICIES["email"], NOON, 0.5, repeatable=True)  # type: ignore[arg-type]
        assert said.members == MEMBERS
    assert with_members(JOB, lease).members == MEMBERS
    assert with_members(JOB, None).members is None


def test_a_digest_that_was_settled_anew_is_another_message_if_it_has_others() -> None:
    one, other = replace(JOB, members=MEMBERS), replace(JOB, members=Members(("n1",), NOON))
    assert one.message_key != other.message_key
    assert one.message_key == replace(JOB, members=replace(MEMBERS, rendered_at=NOON + timedelta(hours=1))).message_key
    assert JOB.key == one.key == other.key


def test_another_message_of_a_window_that_is_over_asks_for_what_is_left_and_the_first_does_not() -> None:
    done = Done(0, "sent", members=MEMBERS)
    assert next_round(JOB, done, NOON, fresh=True) is None
    for late in (next_round(JOB, done, NOON, fresh=False), next_round(JOB, replace(done, attempt=1), NOON, fresh=True)):
        assert late is not None
        assert (late.id, late.members, late.attempt, late.stage) == (f"digest/{KEY}/2", None, 0, "digest")
        third = next_round(late, done, NOON, fresh=False)
        assert third is not None
        assert third.id == f"digest/{KEY}/3"
    other = Job(id="n", tenant="t", user="alice", type="a", channel="email", first_at=NOON)
    assert next_round(other, done, NOON, fresh=False) is None
    [part] = parts_of(JOB, Done(0, "split", members=MEMBERS, targets=("phone",)))
    assert (part.target, part.members) == ("phone", MEMBERS)
    assert next_round(part, done, NOON, fresh=False) is None, "its whole asks"


# --- what it says ----------------------------------------------------------------------------------------------------


def items(*titles: str) -> list[dict[str, str]]:
    return [{"title": title, "text": "", "url": f"https://example.com/{number}"} for number, title in enumerate(titles)]


def test_a_mail_counts_and_lists_and_no_title_can_be_more_than_a_title() -> None:
    hostile = "**x** <script>alert(1)</script> [a](https://evil.example)"
    data = {"count": 7, "items": [*items("First", hostile), {"title": "Plain", "text": "Words", "url": ""}], "more": 4}
    context = Context(now=NOON, template=DIGEST_TEMPLATES["email"])
    senders = {"default": Sender(address="news@example.org")}
    mail = mail_for(replace(JOB, data=data, members=MEMBERS), context, senders)
    assert mail.subject == "7 new notifications"
    assert "- First (https://example.com/0)\n" in mail.text
    assert "- Plain: Words\n" in mail.text
    assert "and 4 more" in mail.text
    assert "<script>" not in mail.html
    assert 'href="https://evil' not in mail.html
    assert mail.html.count("<li>") == 3
    one = mail_for(replace(JOB, data={"count": 1, "items": items("x"), "more": 0}), context, senders)
    assert one.subject == "1 new notification"
    assert "more" not in one.text


@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_default_can_be_said_of_any_number(count: int) -> None:
    data = {"data": {"count": count, "items": items(*"abcde"[:count]), "more": 0}}
    for parts in DIGEST_TEMPLATES.values():
        for text in parts.values():
            render(text, data)


@pytest.mark.parametrize(
    "record", [b"", b"{}", b"[1]", b'{"at":"2026-03-04T09:00:00Z","data":{"title":7,"text":["x"]}}']
)
def test_whatever_a_record_holds_it_can_be_listed(record: bytes) -> None:
    assert module._item("n", record)["title"] == ""


# --- when it goes ----------------------------------------------------------------------------------------------------


def half_hours(local: ZoneInfo) -> Iterator[datetime]:
    """Of a year: each half hour within two days of a change of clocks, else every fifth, so that each has its turn."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)

    def clocks(moment: datetime) -> timedelta | None:
        return moment.astimezone(local).utcoffset()

    for number in range(365 * 48):
        moment = begin + timedelta(minutes=30 * number)
        if number % 5 == 0 or clocks(moment - timedelta(days=2)) != clocks(moment + timedelta(days=2)):
            yield moment


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo"])
@pytest.mark.parametrize("at", ["08:00", "02:30", "00:00"])
def test_there_is_one_daily_digest_for_each_day_also_when_clocks_are_changed(zone: str, at: str) -> None:
    """Records of a year: each in one digest, each day has one, and none comes before its time."""
    inputs = with_line(with_profile(plain(), timezone=zone), "email", digest=Digest(every="day", at=at))
    local = ZoneInfo(zone)
    days: dict[date, set[str]] = {}
    for stored_at in half_hours(local):
        decided = replace(with_facts(inputs, stored_at=stored_at), now=stored_at)
        decision = plan(decided)["email"]
        woken = wakes(decision, decided)
        assert woken is not None
        end = datetime.fromisoformat(decision.when.rpartition("/")[2])
        assert timedelta() < end - stored_at <= timedelta(hours=25)
        assert timedelta() <= woken[1] - end <= SPREAD
        days.setdefault(end.astimezone(local).date(), set()).add(decision.when)
    assert all(len(keys) == 1 for keys in days.values())
    first = min(days)
    assert sorted(days) == [first + timedelta(days=number) for number in range(len(days))], "no day is left out"
