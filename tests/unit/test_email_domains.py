"""Gates of recipients' domains: what one domain's servers defer holds up its own mails, and no others."""

import heapq
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from engine.channels.channel import Job, Outcome
from engine.channels.email.message import domain_of
from engine.channels.email.settings import DomainSettings
from engine.jobs.breaker import IN_A_ROW
from engine.jobs.desk import Over, Send
from engine.worker.desk import Aim, WorkerDesk
from engine.worker.domains import PUT_BACK_SECONDS_MAX, WINDOW_MAX
from engine.worker.gate import WAIT_SECONDS_MAX, Gate
from engine.worker.gates import Gates
from engine.worker.providers import Provider
from engine.worker.targets import Target
from tests.support.sending import a_job
from tests.unit.test_worker_desk import Known
from tests.unit.test_worker_gate import Bucket, Clock

DEFERRED = Outcome(kind="throttled", code="421/4.7.0", scope="domain", retry_after_seconds=7200)
AWAY = Outcome(kind="transient", code="451/4.4.1", scope="domain")
OK = Outcome(kind="ok")


class Relay:
    """The gates of one relay, on one clock."""

    def __init__(self, name: str = "own", **domains: DomainSettings) -> None:
        self.clock, self.gates = Clock(), Gates(None)  # type: ignore[arg-type]
        self.provider = Provider(name, None, channel_name="email", domains=domains)  # type: ignore[arg-type]

    def gate(self, domain: str = "") -> Gate:
        found = self.gates.of(self.provider, domain)
        found._clock = self.clock
        return found

    def places(self, domain: str, asked: int) -> int:
        return [self.gates.take_place(self.provider, domain, object()) for _ in range(asked)].count(0)


@pytest.mark.parametrize("outcomes", [[DEFERRED], [AWAY] * IN_A_ROW], ids=["deferred", "away"])
async def test_a_domain_that_takes_nothing_waits_and_others_go_on(outcomes: list[Outcome]) -> None:
    relay = Relay()
    busy, other = relay.gate("yahoo.com"), relay.gate("gmail.com")
    for outcome in outcomes:
        assert await busy.enter() == 0
        await busy.told(outcome, retry=False)
    assert await busy.enter() < 0
    assert await other.enter() == 0
    assert relay.gate().wait_seconds() == 0, "the relay itself does its part"


async def test_a_relay_that_is_away_or_set_up_wrongly_is_so_for_all_domains() -> None:
    relay = Relay()
    for number in range(IN_A_ROW):
        await relay.gate(f"domain{number}.example").told(Outcome(kind="transient", code="connect/refused"), retry=False)
    assert await relay.gate("other.example").enter() < 0
    assert relay.gate("other.example").put_back_seconds_max == WAIT_SECONDS_MAX
    relay = Relay()
    await relay.gate("gmail.com").told(Outcome(kind="config", code="535", scope="key"), retry=False)
    assert await relay.gate("other.example").enter() < 0


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(kind="transient", code="452/4.2.2", soft_bounce=True),
        Outcome(kind="transient", code="450", scope="target"),
        Outcome(kind="throttled", code="450/4.2.1", scope="target", retry_after_seconds=3600),
        Outcome(kind="target_invalid", code="550/5.1.1"),
        Outcome(kind="permanent", code="550/5.7.1"),
        Outcome(kind="config", code="554", scope="target"),
    ],
)
async def test_what_is_about_a_mailbox_or_a_mail_holds_up_no_other_to_its_domain(outcome: Outcome) -> None:
    gate = Relay().gate("gmail.com")
    for _ in range(50):
        await gate.told(outcome, retry=False)
    assert await gate.enter() == 0


async def test_after_a_deferral_mails_come_back_one_more_at_a_time_and_end_as_before() -> None:
    """All that have waited for two hours would else be deferred again together."""
    relay = Relay()
    gate = relay.gate("yahoo.com")
    assert relay.places("yahoo.com", 200) == 200
    await gate.told(DEFERRED, retry=False)
    await gate.told(OK, retry=False)
    assert await gate.enter() < -7000, "one that was under way before says nothing"
    assert gate.put_back_seconds_max == PUT_BACK_SECONDS_MAX
    relay.clock.now += 7200
    assert relay.places("yahoo.com", 200) == 1
    assert await gate.enter() == 0, "the probe"
    assert await gate.enter() < 0
    relay.gates._places.clear()
    await gate.told(OK, retry=True)
    assert await gate.enter() == 0
    assert relay.places("yahoo.com", 200) == 2
    assert relay.places("gmail.com", 200) == 200
    for _ in range(WINDOW_MAX):
        await gate.told(OK, retry=True)
    assert relay.gates.of(relay.provider, "yahoo.com").at_once == math.inf  # type: ignore[attr-defined]


async def test_a_deferral_that_says_less_than_an_earlier_one_does_not_shorten_it() -> None:
    gate = Relay().gate("yahoo.com")
    await gate.told(DEFERRED, retry=False)
    await gate.told(Outcome(kind="throttled", code="421", scope="domain"), retry=False)
    assert await gate.enter() < -7000


async def test_a_domain_that_defers_at_one_provider_may_take_mails_of_the_next() -> None:
    gates = Gates(None)  # type: ignore[arg-type]
    own, spare = (Provider(name, None, channel_name="email") for name in ("own", "spare"))  # type: ignore[arg-type]
    await gates.of(own, "yahoo.com").told(DEFERRED, retry=False)
    assert await gates.of(own, "yahoo.com").enter() < 0
    assert await gates.of(spare, "yahoo.com").enter() == 0


async def test_no_more_are_under_way_than_the_file_says_and_what_it_says_anew_holds_at_once() -> None:
    relay = Relay(**{"gmail.com": DomainSettings(at_once=3), "default": DomainSettings(at_once=5)})
    assert [relay.places(domain, 50) for domain in ("gmail.com", "other.example", "third.example")] == [3, 5, 5]
    relay.provider = relay.provider._replace(reading=2, domains={})
    assert relay.places("gmail.com", 50) == 50
    await relay.gates.close()


async def test_who_finds_its_domain_at_its_limit_takes_no_slot_from_others() -> None:
    relay = Relay()
    gate, own, whole = relay.gate("gmail.com"), Bucket(), Bucket()
    asked: list[float] = []

    async def take(*, wait_seconds_max: float) -> tuple[bool, float]:
        asked.append(wait_seconds_max)
        return True, 0.0

    whole.take = take  # type: ignore[method-assign]
    gate._bucket, relay.gate()._bucket = own, whole  # type: ignore[assignment]
    own.answer = (False, 2.0)
    assert await gate.enter() == -2
    assert asked == []
    own.answer = (True, 0.5)
    assert await gate.enter() == 0.5
    assert len(asked) == 1
    await gate.told(DEFERRED, retry=False)
    assert (own.halved, whole.halved) == (1, 0)


@pytest.mark.parametrize(("who", "seconds"), [("relay", (5, 7.5)), ("domain", (60, 90)), ("long", (900, 1350))])
async def test_a_mail_waits_for_its_relay_as_always_and_for_its_domain_longer_each_time(
    who: str, seconds: tuple[float, float]
) -> None:
    """A critical mail that finds no slot at a busy relay must not be looked at again a minute later because of that."""
    relay, unused, full = Relay(), None, Bucket()
    gate = relay.gate("gmail.com")
    full.answer = (False, 5.0)
    if who == "relay":
        relay.gate()._bucket = full  # type: ignore[assignment]
    elif who == "domain":
        gate._bucket = full  # type: ignore[assignment]
    else:
        await gate.told(DEFERRED, retry=False)
    sources: Any = (relay.gates, Known(), *[unused] * 5)
    desk: WorkerDesk = WorkerDesk("email", lambda: [relay.provider], *sources)
    aim = Aim(Target("a@gmail.com", "gmail.com"), [relay.provider])
    for _ in range(20):
        wait = await desk.turn(a_job("email", "n1", put_backs=9, lane="critical"), Send(None, aim))
        assert seconds[0] <= wait <= seconds[1]


async def test_places_of_a_domain_are_those_of_one_provider() -> None:
    relay = Relay("own", default=DomainSettings(at_once=2))
    spare = relay.provider._replace(name="spare")
    senders = [object() for _ in range(3)]
    assert [relay.gates.take_place(relay.provider, "gmail.com", one) == 0 for one in senders] == [True, True, False]
    assert [relay.gates.take_place(spare, "gmail.com", one) == 0 for one in senders] == [True, True, False]
    relay.gates.free_place(spare, "gmail.com", senders[0])
    assert relay.gates.take_place(relay.provider, "gmail.com", senders[2]) > 0


async def test_a_domain_that_goes_on_deferring_is_asked_less_and_less_often_and_one_that_has_taken_a_mail_as_at_first() -> (
    None
):
    relay = Relay()
    gate, waits = relay.gate("yahoo.com"), list[float]()
    for asked in (30.0, 30.0, None, None, 600.0, 30.0, None, 7200.0, None):
        relay.clock.now += gate.wait_seconds()
        assert await gate.enter() == 0
        await gate.told(msgspec.structs.replace(DEFERRED, retry_after_seconds=asked), retry=False)
        waits.append(gate.wait_seconds())
    assert waits == [30, 60, 120, 240, 600, 900, 900, 7200, 900]
    relay.clock.now += 900
    assert await gate.enter() == 0
    await gate.told(OK, retry=True)
    await gate.told(msgspec.structs.replace(DEFERRED, retry_after_seconds=None), retry=False)
    assert gate.wait_seconds() == 60


async def test_thousands_of_mails_to_a_domain_that_defers_for_good_are_seldom_looked_at_and_never_all_together() -> (
    None
):
    """Each look is a decision, a mail that is rendered, and a schedule that is written."""
    relay, mails = Relay(), 2_000
    sources: Any = (relay.gates, Known(), *[None] * 5)
    desk: WorkerDesk = WorkerDesk("email", lambda: [relay.provider], *sources)
    gate, began, probes, looks = relay.gate("yahoo.com"), relay.clock.now, 0, list[float]()
    await gate.told(msgspec.structs.replace(DEFERRED, retry_after_seconds=None), retry=False)
    waiting = [(relay.clock.now, number, 0) for number in range(mails)]
    while waiting[0][0] < began + 4 * 3600:
        relay.clock.now, number, put_backs = heapq.heappop(waiting)
        looks.append(relay.clock.now - began)
        send = Send(None, Aim(Target("a@yahoo.com", "yahoo.com"), [relay.provider]))
        seconds = await desk.turn(a_job("email", f"n{number}", put_backs=put_backs), send)
        if seconds == 0:
            probes += 1
            relay.gates.free_place(relay.provider, "yahoo.com", send.target)
            await gate.told(msgspec.structs.replace(DEFERRED, retry_after_seconds=None), retry=False)
            put_backs, seconds = -1, 300.0
        heapq.heappush(waiting, (relay.clock.now + seconds, number, put_backs + 1))
    assert 10 <= probes <= 25
    late = [one for one in looks if one > 3600]
    assert len(late) <= mails * 3 * 3600 / 800, "each once for a wait"
    for begin in range(3600, 4 * 3600, 60):
        # What is drawn by chance: the fullest of 180 minutes once had 402 of 2000.
        assert sum(begin <= one < begin + 60 for one in late) <= mails / 4


class ByMail:
    async def find(self, job: Job, category: str | None, now: datetime) -> Target:
        return Target("a@yahoo.com", "yahoo.com")

    async def of(self, *_: Any) -> None: ...

    def render(self, job: Job, context: None) -> str:
        return "a mail"


@pytest.mark.parametrize(
    ("tried", "deferring", "over"),
    [(None, True, True), (timedelta(hours=1), True, False), (None, False, False)],
    ids=["waited", "tried of late", "it takes mails again"],
)
async def test_a_mail_that_has_waited_for_its_domain_for_three_days_ends_as_one_that_was_deferred_so_long(
    tried: timedelta | None, deferring: bool, over: bool
) -> None:
    relay, now, mail = Relay(), datetime.now(UTC), ByMail()
    relay.provider = relay.provider._replace(channel=mail)  # type: ignore[arg-type]
    sources: Any = (relay.gates, Known(), None, None, mail, mail, mail)
    desk: WorkerDesk = WorkerDesk("email", lambda: [relay.provider], *sources)
    relay.gate("yahoo.com")
    if deferring:
        await relay.gate("yahoo.com").told(DEFERRED, retry=False)
    job = a_job("email", "n1", first_at=now - timedelta(hours=73), tried_at=None if tried is None else now - tried)
    decided = await desk.aim(job)
    assert isinstance(decided, Over if over else Send)
    if isinstance(decided, Over):
        assert (decided.end, decided.why) == ("failed", DEFERRED.code)
    assert isinstance(await desk.aim(msgspec.structs.replace(job, first_at=now)), Send)


@pytest.mark.parametrize(
    ("address", "domain"),
    [
        ("a@Gmail.com", "gmail.com"),
        ('"a@b"@example.com', "example.com"),
        ("a@bücher.example", "xn--bcher-kva.example"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_domain_is_one_however_it_is_spelled(address: str, domain: str) -> None:
    assert domain_of(address) == domain
