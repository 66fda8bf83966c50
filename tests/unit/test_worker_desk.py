"""What a desk decides without asking a store, which provider it sends by, and when another one is asked."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from engine.channels.channel import Job, Outcome
from engine.channels.email.settings import DomainSettings
from engine.channels.push.message import PushTarget
from engine.controls.document import Control, Document, InForce, Kill, Pause
from engine.controls.view import Controls
from engine.jobs.desk import Hold, Over, Send, Split
from engine.plan.decisions import Decision
from engine.plan.rules import ChannelRule, TypeRule
from engine.planner.shares import Above
from engine.worker.desk import ANOTHER_SECONDS, CONTROLS_SECONDS_MAX, Aim, WorkerDesk, _serving
from engine.worker.fallback import next_channel
from engine.worker.gates import Gates
from engine.worker.providers import Provider
from engine.worker.targets import Several, Target, Unusable
from tests.support.plans import NOON, plain
from tests.support.sending import TENANT, USER, a_job


class Known:
    """Controls as a process knows them."""

    def __init__(self, *controls: Control, age_seconds: float = 0.0) -> None:
        self.age_seconds = age_seconds
        self.controls = Controls(Document(tuple(InForce(one, 0.0, "ops", "test") for one in controls)))


class Open:
    """Gates that let everything through, or nothing. They count what they are told."""

    def __init__(self, *, wait_seconds: float = 0.0, full: bool = False) -> None:
        self._wait_seconds, self.full = wait_seconds, full
        self.told_of = list[Outcome]()

    def of(self, provider: Provider, key: str = "") -> Any:
        return self

    def wait_seconds(self) -> float:
        return self._wait_seconds

    async def enter(self, *, wait_seconds_max: float) -> float:
        return 0.0

    async def told(self, outcome: Outcome, *, retry: bool, seconds: float) -> None:
        self.told_of.append(outcome)

    def take_place(self, provider: Provider, key: str, who: object) -> float:
        return 0.0

    def free_place(self, provider: Provider, key: str, who: object) -> None:
        """None was taken."""


class Answering:
    """A channel whose provider gives one answer, whatever is sent."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    async def send(self, rendered: Any, target: str, *, key: str, deadline_seconds: float) -> Outcome:
        return self._outcome


def desk(known: Known, gates: Open | None = None) -> WorkerDesk:
    providers = [Provider("first", None)]  # type: ignore[arg-type]
    unused: Any = None
    return WorkerDesk("sms", lambda: providers, gates or Open(), known, *[unused] * 5)  # type: ignore[arg-type]


async def test_who_has_not_heard_of_the_controls_for_two_seconds_begins_nothing() -> None:
    fresh, old = Known(age_seconds=CONTROLS_SECONDS_MAX), Known(age_seconds=CONTROLS_SECONDS_MAX + 0.1)
    assert desk(fresh).open("normal")
    assert not desk(old).open("critical")
    held = await desk(old).decide(a_job("sms", "n1"))
    assert isinstance(held, Hold)
    assert held.why == "controls_old"


@pytest.mark.parametrize(
    ("control", "is_open", "decided"),
    [
        (Kill(channel="sms"), False, "killed:channel=sms"),
        (Kill(tenant=TENANT), True, f"killed:tenant={TENANT}"),
        (Kill(category="parcels", channel="sms"), True, "killed:channel=sms,category=parcels"),
        (Pause(lane="normal"), False, "paused"),
        (Pause(lane="normal", channel="sms"), False, "paused"),
    ],
)
async def test_what_an_operator_holds_is_put_back_and_not_even_taken_where_it_is_about_all(
    control: Control, is_open: bool, decided: str
) -> None:
    one = desk(Known(control))
    assert one.open("normal") is is_open
    held = await one.decide(a_job("sms", "n1"))
    assert isinstance(held, Hold)
    assert held.why == decided
    assert timedelta(0) < held.due - datetime.now(UTC) <= timedelta(seconds=10)


async def test_what_is_held_for_long_is_not_written_anew_every_few_seconds() -> None:
    held = await desk(Known(Kill(tenant=TENANT))).decide(a_job("sms", "n1", put_backs=9))
    assert isinstance(held, Hold)
    assert timedelta(seconds=55) < held.due - datetime.now(UTC) <= timedelta(seconds=90)


class Crowded:
    """Shares in which a tenant has too many jobs, and has not said of too many that they are critical."""

    async def above(self, tenants: Iterable[str]) -> Above:
        return Above(frozenset(tenants))


class Endpoints:
    async def find(self, job: Job, category: str | None, now: datetime) -> Several:
        return Several(("a", "b"))


async def test_a_job_of_a_tenant_that_has_too_many_does_not_become_several() -> None:
    """One notification of the planner is a hundred jobs where a tenant has so many endpoints."""
    unused: Any = None
    sources: Any = (unused, unused, unused, Endpoints(), unused)
    one = WorkerDesk("webhook", list, Open(), Known(), *sources, shares=Crowded())  # type: ignore[arg-type]
    assert await one.aim(a_job("webhook", "n1")) == Over("suppressed", "throttled")
    critical = await one.aim(a_job("webhook", "n1", lane="critical"))
    assert isinstance(critical, Split)
    assert critical.targets == ("a", "b")


class Sealed:
    async def find(self, job: Job, category: str | None, now: datetime) -> Unusable:
        return Unusable("secret_sealed")


async def test_a_job_whose_secret_is_sealed_by_a_key_that_this_worker_lacks_waits_for_it() -> None:
    unused: Any = None
    one = WorkerDesk("webhook", list, Open(), Known(), unused, unused, unused, Sealed(), unused)  # type: ignore[arg-type]
    held = await one.aim(a_job("webhook", "n1", first_at=datetime.now(UTC)))
    assert isinstance(held, Hold)
    assert held.why == "secret_sealed"
    over = await one.aim(a_job("webhook", "n1", first_at=datetime.now(UTC) - timedelta(days=5)))
    assert isinstance(over, Over)
    assert (over.end, over.why) == ("failed", "secret_sealed")


async def test_what_an_operator_drops_ends() -> None:
    one = desk(Known(Kill(channel="sms", mode="drop")))
    assert one.open("normal")
    assert await one.decide(a_job("sms", "n1")) == Over("suppressed", "killed:channel=sms")


def test_a_share_that_is_let_through_again_keeps_a_channel_open() -> None:
    assert desk(Known(Kill(channel="sms", percent=10))).open("normal")


def test_jobs_stay_where_they_are_while_their_provider_cannot_be_asked_and_critical_ones_come_when_slots_are_taken() -> (
    None
):
    assert not desk(Known(), Open(wait_seconds=1.0)).open("critical")
    assert not desk(Known(), Open(full=True)).open("normal")
    assert desk(Known(), Open(full=True)).open("critical")


AWAY = Outcome(kind="transient", code="connect/refused", elsewhere=True)


class Stopping:
    """A channel whose provider takes so long to refuse that an operator sets something meanwhile."""

    def __init__(self, known: Known, control: Control) -> None:
        self._known, self._control = known, control

    async def send(self, rendered: Any, target: str, *, key: str, deadline_seconds: float) -> Outcome:
        self._known.controls = Known(self._control).controls
        return AWAY


@pytest.mark.parametrize("mode", ["hold", "drop"])
@pytest.mark.parametrize("what", [{"provider": "second"}, {"channel": "sms"}])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_no_job_turns_to_a_provider_that_a_kill_switch_has_stopped(when: str, what: Any, mode: Any) -> None:
    kill, gates = Kill(mode=mode, **what), Open()
    known = Known() if when == "meanwhile" else Known(kill)
    first = Stopping(known, kill) if when == "meanwhile" else Answering(AWAY)
    providers = [Provider("first", first), Provider("second", Answering(Outcome(kind="ok")))]  # type: ignore[arg-type]
    aim = Aim(Target("+4366412345678"), providers)
    aim.chosen = providers[0]
    outcome = await desk(known, gates).send(a_job("sms", "n1"), Send(None, aim), deadline_seconds=20.0)
    assert ([one.provider for one in gates.told_of], outcome.kind) == (["first"], "transient")


@pytest.mark.parametrize(
    ("first", "seconds", "asked"),
    [
        (AWAY, 20.0, ["first", "second"]),
        (Outcome(kind="config", code="535", elsewhere=True), 20.0, ["first", "second"]),
        (AWAY, ANOTHER_SECONDS - 0.1, ["first"]),
        (Outcome(kind="ambiguous", code="end/reset"), 20.0, ["first"]),
        (Outcome(kind="target_invalid", code="550"), 20.0, ["first"]),
        (Outcome(kind="ok"), 20.0, ["first"]),
    ],
)
async def test_the_next_provider_gets_only_what_the_first_has_certainly_not_taken_and_only_while_there_is_time(
    first: Outcome, seconds: float, asked: list[str]
) -> None:
    gates = Open()
    providers = [Provider("first", Answering(first)), Provider("second", Answering(Outcome(kind="ok")))]  # type: ignore[arg-type]
    aim = Aim(Target("+4366412345678"), providers)
    aim.chosen = providers[0]
    outcome = await desk(Known(), gates).send(a_job("sms", "n1"), Send(None, aim), deadline_seconds=seconds)
    assert [one.provider for one in gates.told_of] == asked
    assert outcome.kind == ("ok" if asked[1:] else first.kind)


async def test_the_next_provider_gets_no_more_at_once_than_the_file_says() -> None:
    """A mail that the first one refuses would go past the second one's limit for its domain."""
    answers = [Answering(AWAY), Answering(Outcome(kind="ok"))]
    domains = {"default": DomainSettings(at_once=1)}
    providers = [
        Provider(f"p{one}", answer, channel_name="email", domains=domains) for one, answer in enumerate(answers)
    ]  # type: ignore[arg-type]
    unused: Any = None
    gates = Gates(unused)
    one = WorkerDesk("email", lambda: providers, gates, Known(), *[unused] * 5)  # type: ignore[arg-type]

    async def provider_of_a_mail() -> str:
        aim = Aim(Target("a@example.com", "example.com"), providers)
        aim.chosen = providers[0]
        return (await one.send(a_job("email", "n1"), Send(None, aim), deadline_seconds=20.0)).provider

    assert [await provider_of_a_mail() for _ in range(2)] == ["p1", "p1"], "each gives its place back"
    other = object()
    assert gates.take_place(providers[1], "example.com", other) == 0
    assert await provider_of_a_mail() == "p0"
    gates.free_place(providers[1], "example.com", other)
    await gates.of(providers[1], "example.com").told(Outcome(kind="throttled", scope="domain"), retry=False)
    assert await provider_of_a_mail() == "p0"
    assert gates._places == {}, "whom the gate refuses has no place"


def test_a_push_goes_by_the_first_provider_that_is_for_its_token() -> None:
    def provider(name: str, platform: str, *apps: str) -> Provider:
        return Provider(name, None, None, platform, frozenset(apps))  # type: ignore[arg-type]

    providers = [provider("mine", "apns", "com.mine"), provider("all", "apns"), provider("google", "fcm", "com.other")]

    def serving(platform: str, app: str) -> list[str]:
        token = PushTarget(id="t", platform=platform, token="x", app=app)  # type: ignore[arg-type]
        return [one.name for one in _serving(providers, Target(token))]

    assert serving("apns", "com.mine") == ["mine"]
    assert serving("apns", "com.yours") == ["all"]
    assert serving("fcm", "com.mine") == []


def test_what_follows_a_push_is_the_next_channel_that_waits_to_see_whether_it_was_seen() -> None:
    waits = ChannelRule(unless_seen_seconds=60)
    rule = TypeRule(
        pattern="*", channels={"email": waits, "push": ChannelRule(), "webhook": ChannelRule(), "sms": waits}
    )
    following = next_channel(rule, a_job("push", "n1", attempt=2, target="phone", requested=False, tries_before=4))
    assert following is not None
    assert (following.channel, following.stage, following.attempt, following.target) == ("sms", "escalation", 0, "")
    assert following.claim_key == a_job("sms", "n1", user=USER).key, "the claim of the one that is scheduled"
    assert next_channel(rule, a_job("sms", "n1", requested=False)) is None


@pytest.mark.parametrize(("days", "woken"), [(2, True), (3, False), (7, False)])
def test_nothing_is_woken_whose_own_message_comes_when_claims_are_gone(days: int, woken: bool) -> None:
    waits = ChannelRule(unless_seen_seconds=days * 86_400)
    rule = TypeRule(pattern="*", channels={"push": ChannelRule(), "sms": waits})
    assert (next_channel(rule, a_job("push", "n1", requested=False)) is not None) == woken


@pytest.mark.parametrize(
    "of_job",
    [
        {"requested": True},
        {"digest": "news/2026-01-31T08:00:00Z"},
        {"stored_at": datetime.now(UTC) - timedelta(seconds=61)},
    ],
)
def test_nothing_is_woken_that_the_event_did_not_name_or_that_was_handed_out_before(of_job: dict[str, Any]) -> None:
    rule = TypeRule(pattern="*", channels={"push": ChannelRule(), "sms": ChannelRule(unless_seen_seconds=60)})
    assert next_channel(rule, a_job("push", "n1", **{"requested": False, **of_job})) is None


@pytest.mark.parametrize(("stage", "pauses"), [("quiet_hours", True), ("first", False)])
async def test_who_waits_for_the_same_hour_again_is_not_due_at_once(stage: str, pauses: bool) -> None:
    """The broker's clock may be ahead of the worker's: it would hand the job out again and again until that is over."""
    at_once = Decision(f"at:{(NOON + timedelta(milliseconds=1)).isoformat()}", "quiet_hours")
    hold = await desk(Known())._not_now(a_job("sms", "n1", stage=stage, put_backs=3), at_once, plain())
    assert isinstance(hold, Hold)
    assert hold.stage == "quiet_hours"
    if pauses:
        assert hold.due >= NOON + timedelta(seconds=8)
    else:
        assert hold.due == NOON + timedelta(milliseconds=1)
