"""A worker decides once about jobs that are alike, and never takes one for like another that is not."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.channels.channel import Context, Job, Outcome
from engine.controls.document import Kill
from engine.directory.rules import TenantRules
from engine.jobs.desk import Hold, Over, Send
from engine.plan.decide import decide
from engine.plan.decisions import Facts, Inputs
from engine.plan.hours import Window
from engine.plan.preferences import Preferences, QuietHours, TenantDefaults
from engine.plan.profile import Profile, Suppression
from engine.plan.rules import Cap, ChannelRule, TypeRule
from engine.worker import alike
from engine.worker import desk as desks
from engine.worker.alike import Alike
from engine.worker.contexts import Contexts
from engine.worker.desk import WorkerDesk
from engine.worker.providers import Provider
from engine.worker.targets import Target
from tests.support.plans import inputs
from tests.support.sending import a_job
from tests.unit.test_worker_desk import Known, Open

RULES = TenantRules()
PROFILE = Profile(version=1, reach=("sms",))
HOURS = Window(start="00:00", end="23:59")


@settings(max_examples=300, deadline=None)
@given(inputs(), st.sampled_from(("push", "email", "sms", "webhook")), st.timedeltas(timedelta(0), timedelta(days=40)))
def test_what_is_remembered_holds_for_others_at_any_later_time(asked: Inputs, channel: Any, later: timedelta) -> None:
    facts = Facts(stored_at=asked.facts.stored_at, stage="retry")
    asked, known = replace(asked, facts=facts, kills=(), throttled=False), Alike()
    known.keep(a_job(channel, "n1"), RULES, PROFILE, asked, decide(channel, asked))
    if (sent := known.of(a_job(channel, "n2"), RULES, PROFILE)) is None:
        return
    now = asked.now + later
    notification = replace(asked.notification, id="n2", user="somebody else")
    other = replace(asked, now=now, notification=notification, facts=replace(facts, stored_at=now - timedelta(hours=1)))
    assert (decide(channel, other).when, other.category) == ("now", sent.category)


class House:
    """What a desk reads, and how often it has decided."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rules, self.profile, self.known, self.decided = RULES, PROFILE, Known(), 0
        providers = [Provider("first", self, channel_name="sms")]  # type: ignore[arg-type]
        unused: Any = None
        sources: Any = (self, _Of(lambda: self.rules), _Of(lambda: self.profile), self)
        contexts = Contexts(sources[1], unused)
        self.desk = WorkerDesk("sms", lambda: providers, Open(), self.known, *sources, contexts)  # type: ignore[arg-type]
        monkeypatch.setattr(desks, "decide", self._decide)

    def _decide(self, channel: str, asked: Inputs) -> Any:
        self.decided += 1
        return decide(channel, asked)

    async def heard(self) -> None:
        """All cancels are known."""

    def holds(self, tenant: str, transaction: str) -> bool:
        return True

    async def find(self, job: Job, category: str | None, now: datetime) -> Target:
        return Target("+4366412345678")

    def render(self, job: Job, context: Context) -> str:
        return job.id

    async def send(self, *_: Any, **__: Any) -> Outcome:
        raise AssertionError("nothing is sent here")


class _Of:
    def __init__(self, read: Any) -> None:
        self._read = read

    async def of(self, *_: str) -> Any:
        return self._read()


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> House:
    return House(monkeypatch)


async def test_of_jobs_that_are_alike_only_the_first_is_decided_about(house: House) -> None:
    for number in range(3):
        assert isinstance(await house.desk.decide(a_job("sms", f"n{number}")), Send)
    assert house.decided == 1
    for other in ({"type": "parcel.lost"}, {"category": "news"}, {"lane": "critical"}, {"requested": False}):
        before = house.decided
        await house.desk.decide(a_job("sms", "n4", **other))
        assert house.decided == before + 1, other


@pytest.mark.parametrize("how", ["stop", "unsubscribe", "quiet", "rules", "kill", "cancel", "expiry"])
async def test_what_has_changed_holds_for_the_next_job(house: House, how: str) -> None:
    assert isinstance(await house.desk.decide(a_job("sms", "n1")), Send)
    job = a_job("sms", "n2")
    match how:
        case "stop":
            house.profile = replace(PROFILE, suppressions=(Suppression("sms", "opted_out"),))
        case "unsubscribe":
            house.profile = replace(PROFILE, preferences=Preferences(categories={"parcels": {"sms": "off"}}))
        case "quiet":
            house.profile = replace(PROFILE, preferences=Preferences(quiet_hours=QuietHours((HOURS,))))
        case "rules":
            house.rules = TenantRules(defaults=TenantDefaults(channels={"sms": "off"}))
        case "kill":
            house.known.controls = Known(Kill(channel="sms", mode="drop")).controls
        case "cancel":
            job = replace(job, transaction="order-1")
        case "expiry":
            job = replace(job, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert isinstance(await house.desk.decide(job), Over | Hold)


async def test_caps_quiet_hours_and_what_ends_by_itself_are_looked_at_for_each_job(house: House) -> None:
    later = datetime.now(UTC) + timedelta(hours=12)
    quiet = Window(start=f"{later:%H:%M}", end=f"{later + timedelta(minutes=1):%H:%M}")
    for rule, profile in (
        (TypeRule(pattern="*", channels={"sms": ChannelRule(cap=Cap(1, 60))}), PROFILE),
        (TypeRule(pattern="*", channels={"sms": ChannelRule()}, ttl_seconds=60), PROFILE),
        (None, replace(PROFILE, preferences=Preferences(quiet_hours=QuietHours((quiet,))))),
    ):
        house.rules = TenantRules(types={} if rule is None else {"*": rule})
        house.profile, before = profile, house.decided
        for number in range(3):
            assert isinstance(await house.desk.decide(a_job("sms", f"n{number}")), Send)
        assert house.decided == before + 3


async def test_kinds_are_forgotten_when_there_are_too_many(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "KEPT_MAX", 4)
    for number in range(20):
        assert isinstance(await house.desk.decide(a_job("sms", "n", type=f"type{number}")), Send)
    assert len(house.desk._alike._kept) <= 4
