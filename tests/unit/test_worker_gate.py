"""The gate in front of a provider: whose fault closes it, and whose does not."""

import pytest
import structlog

from engine.channels.channel import Outcome
from engine.jobs.breaker import CONFIG_PAUSE_SECONDS, IN_A_ROW, Breaker
from engine.jobs.redisbucket import BucketUnavailable
from engine.jobs.worker import AT_A_TIME
from engine.worker.domains import DomainGate
from engine.worker.gate import SLOT_SECONDS_MAX, SLOTS_MAX, SLOW_SECONDS, Gate
from engine.worker.gates import SLOW_AT_ONCE, UNKNOWN_AT_ONCE, Gates
from engine.worker.providers import Provider


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bucket:
    """A bucket that answers what a test says."""

    def __init__(self) -> None:
        self.answer: tuple[bool, float] | None = (True, 0.0)
        self.halved = 0

    async def take(self, *, wait_seconds_max: float) -> tuple[bool, float]:
        if self.answer is None:
            raise BucketUnavailable
        return self.answer

    async def refused(self) -> None:
        self.halved += 1

    async def close(self) -> None: ...


def gate(clock: Clock, bucket: Bucket | None = None) -> Gate:
    return Gate("apple", bucket=bucket, clock=clock)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(kind="transient", code="503"),
        Outcome(kind="ambiguous", code="timeout"),
        Outcome(kind="transient", code="450", scope="provider"),
    ],
)
async def test_failures_of_the_provider_in_a_row_close_it_until_one_probe_is_taken(outcome: Outcome) -> None:
    clock = Clock()
    one = gate(clock)
    for _ in range(IN_A_ROW):
        assert await one.enter() == 0
        await one.told(outcome, retry=False)
    wait = -await one.enter()
    assert wait > 0
    clock.now += wait
    assert await one.enter() == 0, "the probe"
    assert await one.enter() < 0, "nothing but the probe"
    await one.told(Outcome(kind="ok"), retry=True)
    assert await one.enter() == 0


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(kind="config", code="blocked", scope="target"),
        Outcome(kind="config", code="403", scope="domain"),
        Outcome(kind="transient", code="452", soft_bounce=True),
        Outcome(kind="transient", code="busy", begun=False),
        Outcome(kind="transient", code="451", scope="domain"),
        Outcome(kind="target_invalid", code="410"),
        Outcome(kind="permanent", code="413"),
        Outcome(kind="throttled", code="429", scope="target", retry_after_seconds=60),
    ],
)
async def test_what_one_tenant_or_recipient_can_bring_about_closes_no_gate(outcome: Outcome) -> None:
    one = gate(Clock(), bucket := Bucket())
    for _ in range(50):
        await one.told(outcome, retry=False)
    assert await one.enter() == 0
    assert bucket.halved == 0


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(kind="throttled", code="429", scope="target"),
        Outcome(kind="config", code="blocked", scope="target"),
    ],
)
async def test_an_endpoint_that_is_asked_too_much_or_leads_nowhere_is_asked_less_often(outcome: Outcome) -> None:
    """Ten thousand jobs for it would each be tried, and cost an attempt."""
    clock = Clock()
    one = Gate("webhook", "acme/a", single=True, clock=clock)
    for _ in range(IN_A_ROW):
        assert await one.enter() == 0
        await one.told(outcome, retry=False)
    tries, began = 0, clock.now
    while clock.now < began + 60:
        if (seconds := await one.enter()) == 0:
            tries += 1
            await one.told(outcome, retry=True)
        clock.now += -seconds or 0.1
    assert tries <= 6, "probes, each after twice as long"
    clock.now += 60
    assert await one.enter() == 0
    await one.told(Outcome(kind="ok"), retry=True)
    assert [await one.enter() for _ in range(50)] == [0] * 50


async def test_a_push_service_that_is_away_stops_its_own_pushes_only_and_what_is_ours_those_of_all() -> None:
    """Whoever registers a subscription chooses its push service."""
    gates, browsers = Gates(None), Provider("browsers", None, None, "webpush")  # type: ignore[arg-type]
    dead, good = gates.of(browsers, "webpush/dead.example"), gates.of(browsers, "webpush/good.example")
    for _ in range(IN_A_ROW):
        await dead.told(Outcome(kind="transient", code="dns"), retry=False)
    assert await dead.enter() < 0
    assert await good.enter() == 0
    assert gates.of(browsers).wait_seconds() == 0, "its lanes stay open"
    for _ in range(50):
        await good.told(Outcome(kind="config", code="UnauthorizedRegistration", scope="target"), retry=False)
        await good.told(Outcome(kind="transient", code="403", scope="target"), retry=False)
    assert await good.enter() == 0, "a key of his own, with which somebody subscribed, is nobody else's fault"
    await good.told(Outcome(kind="throttled", scope="key", retry_after_seconds=60), retry=False)
    assert await good.enter() < -50
    assert await gates.of(browsers, "webpush/other.example").enter() < -50


async def test_a_probe_by_a_token_that_is_gone_lets_another_begin_and_retries_by_all_push_services_count_together() -> (
    None
):
    clock, browsers = Clock(), Provider("browsers", None, None, "webpush")  # type: ignore[arg-type]
    gates = Gates(None)  # type: ignore[arg-type]
    whole, one = gates.of(browsers), gates.of(browsers, "webpush/good.example")
    whole._clock = one._clock = clock
    await one.told(Outcome(kind="config", code="vapid", scope="key"), retry=False)
    clock.now += CONFIG_PAUSE_SECONDS
    assert await one.enter() == 0, "the probe of all"
    assert await one.enter() < 0
    await one.told(Outcome(kind="target_invalid", code="410"), retry=False)
    assert await one.enter() == 0, "nobody waits for half a minute because of a token"
    await one.told(Outcome(kind="ok"), retry=False)
    assert whole.breaker.state == "closed"
    assert whole.slower() == 1
    for _ in range(30):
        await one.told(Outcome(kind="ok"), retry=True)
    assert whole.slower() > 1


async def test_a_probe_that_was_not_made_lets_another_begin() -> None:
    clock = Clock()
    one = gate(clock)
    await one.told(Outcome(kind="config", code="403", scope="key"), retry=False)
    clock.now += CONFIG_PAUSE_SECONDS
    assert await one.enter() == 0
    one.unused()
    assert await one.enter() == 0, "the probe's turn is free again"
    assert await one.enter() < 0
    await one.told(Outcome(kind="config", code="400", scope="target"), retry=False)
    assert await one.enter() == 0, "nor has one told anything that failed by its own fault"
    await one.told(Outcome(kind="ok"), retry=False)
    one.unused()
    assert await one.enter() == 0, "it is closed, and stays so"


async def test_a_key_that_is_wrong_closes_it_for_a_minute_at_once() -> None:
    one = gate(Clock())
    await one.told(Outcome(kind="config", code="403", scope="key"), retry=False)
    assert await one.enter() == -CONFIG_PAUSE_SECONDS


async def test_who_was_asked_too_much_is_asked_half_as_often_and_left_alone_as_long_as_it_says() -> None:
    clock, bucket = Clock(), Bucket()
    one = gate(clock, bucket)
    await one.told(Outcome(kind="throttled", scope="key", retry_after_seconds=7), retry=False)
    assert bucket.halved == 1
    assert await one.enter() == -7
    clock.now += 7
    assert await one.enter() == 0


async def test_a_slot_is_waited_for_or_said_to_be_too_far_away_and_unknown_limits_stop_nothing() -> None:
    clock, bucket = Clock(), Bucket()
    one = gate(clock, bucket)
    bucket.answer = (True, 0.4)
    assert await one.enter() == 0.4
    assert not one.full
    bucket.answer = (False, 2.0)
    assert await one.enter() == -2.0
    assert one.full
    clock.now += SLOT_SECONDS_MAX
    assert not one.full
    bucket.answer = None
    assert await one.enter() == 0


async def test_who_comes_too_late_for_his_slot_takes_another_one_and_none_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, bucket = Clock(), Bucket()
    one, late = gate(clock, bucket), [1.0, 1.0, 0.0]
    bucket.answer = (True, 0.5)

    async def sleep(seconds: float) -> None:
        clock.now += seconds + late.pop(0)

    monkeypatch.setattr("engine.worker.gate.asyncio.sleep", sleep)
    assert await one.slot() == 0
    assert late == []
    late += [1.0] * SLOTS_MAX
    assert await one.slot() < 0


@pytest.mark.parametrize("probed", [False, True])
async def test_who_waits_for_his_slot_while_the_provider_goes_down_is_no_further_probe(
    probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, bucket = Clock(), Bucket()
    one, bucket.answer = gate(clock, bucket), (True, 0.5)

    async def sleep(seconds: float) -> None:
        for _ in range(IN_A_ROW):
            await one.told(Outcome(kind="transient", code="503"), retry=False)
        if probed:  # the pause is over, and somebody else has begun the probe
            clock.now += one.wait_seconds()
            assert await one.enter() == 0.5
        clock.now += seconds

    monkeypatch.setattr("engine.worker.gate.asyncio.sleep", sleep)
    assert await one.slot() < 0


@pytest.mark.parametrize("probed", [False, True])
async def test_who_waits_for_a_slot_of_his_domain_while_the_provider_goes_down_is_no_further_probe(
    probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty jobs that wait for slots would all be sent to a provider that is down, and each cost an attempt."""
    clock, bucket, gates, relay = Clock(), Bucket(), Gates(None), Provider("relay", None, channel_name="email")  # type: ignore[arg-type]
    whole, one = gates.of(relay), gates.of(relay, "gmail.com")
    whole._clock = one._clock = clock
    one._bucket, bucket.answer = bucket, (True, 0.5)  # type: ignore[assignment]

    async def sleep(seconds: float) -> None:
        for _ in range(IN_A_ROW):
            await whole.told(Outcome(kind="transient", code="connect/refused"), retry=False)
        if probed:
            clock.now += whole.wait_seconds()
            assert await whole.enter() == 0
        clock.now += seconds

    monkeypatch.setattr("engine.worker.gate.asyncio.sleep", sleep)
    assert await one.slot() < 0
    assert whole.breaker.state == ("half_open" if probed else "open"), "the probe of somebody else goes on"
    assert one.down is not probed


@pytest.mark.parametrize("how", ["refused", "opened", "late"])
async def test_a_probe_of_the_provider_that_its_domain_or_a_late_slot_keeps_from_being_made_is_given_back(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would send anything to the provider for half a minute."""
    clock, bucket, gates, relay = Clock(), Bucket(), Gates(None), Provider("relay", None, channel_name="email")  # type: ignore[arg-type]
    whole, one = gates.of(relay), gates.of(relay, "gmail.com")
    whole._clock = one._clock = clock
    whole._bucket, bucket.answer = bucket, (True, 0.5)  # type: ignore[assignment]
    await whole.told(Outcome(kind="config", code="535", scope="key"), retry=False)
    clock.now += CONFIG_PAUSE_SECONDS
    deferring = Breaker("open", clock.now + 60, 60, "421")

    if how == "refused":

        async def take(*, wait_seconds_max: float) -> tuple[bool, float]:
            one.breaker = deferring
            return True, 0.0

        bucket.take = take  # type: ignore[method-assign]

    async def sleep(seconds: float) -> None:
        clock.now += seconds + (1.0 if how == "late" else 0.0)
        if how == "opened":
            one.breaker = deferring

    monkeypatch.setattr("engine.worker.gate.asyncio.sleep", sleep)
    assert -60 <= await one.slot() < 0
    assert whole.wait_seconds() == 0
    assert whole.breaker.state == "open"


async def test_the_probe_itself_waits_for_its_slot_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bucket = Clock(), Bucket()
    one, bucket.answer = gate(clock, bucket), (True, 0.5)
    for _ in range(IN_A_ROW):
        await one.told(Outcome(kind="transient", code="503"), retry=False)
    clock.now += one.wait_seconds()

    async def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr("engine.worker.gate.asyncio.sleep", sleep)
    assert await one.slot() == 0


async def test_providers_of_two_channels_that_have_one_name_have_a_gate_each() -> None:
    """The examples of e-mail and of SMS both call one `spare`."""
    gates = Gates(None)  # type: ignore[arg-type]
    mails, texts = (Provider("spare", None, channel_name=channel) for channel in ("email", "sms"))  # type: ignore[arg-type]
    await gates.of(mails).told(Outcome(kind="config", code="403", scope="key"), retry=False)
    assert gates.of(mails).wait_seconds() > 0
    assert gates.of(texts).wait_seconds() == 0
    await gates.close()


async def test_a_tenant_whose_endpoints_are_slow_has_few_sends_at_a_time_and_others_as_many_as_there_are() -> None:
    """An endpoint that answers late takes everything, so no breaker opens; but it holds what others wait for."""
    gates, hooks = Gates(None), Provider("webhook", None)  # type: ignore[arg-type]
    for key in ("acme/a", "acme/b"):
        await gates.of(hooks, key).told(Outcome(kind="ok"), retry=False, seconds=SLOW_SECONDS + 1)
    sends = [object() for _ in range(SLOW_AT_ONCE)]
    await gates.of(hooks, "acme/quick").told(Outcome(kind="ok"), retry=False, seconds=0.1)
    assert [gates.take_place(hooks, "acme/a", one) for one in sends] == [0] * SLOW_AT_ONCE
    assert gates.take_place(hooks, "acme/b", late := object()) > 0
    assert gates.take_place(hooks, "acme/quick", object()) == 0
    assert gates.take_place(hooks, "other/a", object()) == 0
    gates.free_place(hooks, "acme/a", sends[0])
    assert gates.take_place(hooks, "acme/b", late) == 0
    await gates.of(hooks, "acme/a").told(Outcome(kind="ok"), retry=False, seconds=0.1)
    assert gates.take_place(hooks, "acme/a", object()) == 0, "it is quick again"


@pytest.mark.parametrize(
    ("gate", "of"),
    [
        (Gate("own"), "provider"),
        (Gate("webhook", "acme/a", single=True), "endpoint"),
        (Gate("browsers", "webpush/push.example"), "service"),
        (DomainGate("own", "private.example"), "domain"),
    ],
)
async def test_the_log_says_whose_breaker_has_changed_and_names_no_domain(gate: Gate, of: str) -> None:
    """`provider=own state=open` is read as: nothing goes out any more."""
    with structlog.testing.capture_logs() as lines:
        gate._changed(Breaker("open", 1.0, 1.0, "421"))
    assert [(one["event"], one["of"]) for one in lines] == [("breaker_changed", of)]
    assert "private.example" not in str(lines)


async def test_endpoints_of_which_nothing_is_known_yet_leave_half_of_a_workers_places_to_others() -> None:
    """A worker that has just begun would give all it has to the first burst, and see twenty seconds later that it is slow."""
    gates, hooks = Gates(None), Provider("webhook", None)  # type: ignore[arg-type]
    sends = [object() for _ in range(AT_A_TIME)]
    began = [one for number, one in enumerate(sends) if gates.take_place(hooks, f"acme/{number % 3}", one) == 0]
    assert len(began) == UNKNOWN_AT_ONCE == AT_A_TIME / 2
    await gates.of(hooks, "acme/0").told(Outcome(kind="ok"), retry=False, seconds=0.1)
    assert gates.take_place(hooks, "acme/0", object()) == 0
    assert gates.take_place(hooks, "acme/1", object()) > 0


async def test_a_tenant_with_many_endpoints_has_none_of_others_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A breaker that is forgotten is closed: an endpoint that is down would cost its jobs attempts again."""
    monkeypatch.setattr("engine.worker.gates.KEYS_MAX", 100)
    gates, hooks = Gates(None), Provider("webhook", None)  # type: ignore[arg-type]
    kept = {key: gates.of(hooks, key) for key in ("small/a", "small/b", *(f"other/{number}" for number in range(40)))}
    for number in range(1_000):
        gates.of(hooks, f"large/{number}")
    assert [key for key, gate in kept.items() if gates.of(hooks, key) is not gate] == []
    newest = gates.of(hooks, "large/999")
    for number in range(1_000):
        gates.of(hooks, f"tenant-{number}/a")
    assert gates.of(hooks, "large/999") is not newest, (
        "where all have one, whoever was not asked for longest is forgotten"
    )
