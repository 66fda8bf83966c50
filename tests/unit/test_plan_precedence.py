"""What wins over what: each reason alone, and each against every weaker one."""

from collections.abc import Callable
from datetime import timedelta
from itertools import combinations

import pytest
from msgspec.structs import replace

from engine.plan.choices import Effective, effective
from engine.plan.decide import WAIT_MAX, decide, plan
from engine.plan.decisions import WHYS, Decision, Inputs, Kill, Stage
from engine.plan.hours import Window
from engine.plan.preferences import QuietHours
from engine.plan.profile import Suppression
from engine.plan.rules import Cap, TypeRule
from tests.support.plans import (
    NOON,
    plain,
    with_document,
    with_facts,
    with_line,
    with_notification,
    with_profile,
)

LUNCH = (Window("11:00", "13:00"),)
EVENING = (Window("18:00", "20:00"),)
HOUR = timedelta(hours=1)
Cause = Callable[[Inputs], Inputs]

CAUSES: dict[str, tuple[Cause, Decision]] = {
    "deleted": (lambda i: with_profile(i, deleted=True), Decision("never", "user_deleted")),
    "duplicate": (lambda i: with_facts(i, duplicate=True), Decision("never", "duplicate")),
    "recalled": (lambda i: with_facts(i, recalled=True), Decision("never", "recalled")),
    "cancelled": (lambda i: with_facts(i, cancelled=True), Decision("never", "cancelled")),
    "superseded": (lambda i: with_facts(i, superseded=True), Decision("never", "superseded")),
    "expired": (lambda i: with_notification(i, expires_at=NOON), Decision("never", "expired")),
    "no rule": (lambda i: replace(i, rule=None), Decision("never", "no_rule")),
    "opted out": (lambda i: suppressed(i, "opted_out"), Decision("never", "opted_out")),
    "suppressed": (lambda i: suppressed(i, "hard_bounce"), Decision("never", "suppressed:hard_bounce")),
    "killed": (lambda i: replace(i, kills=(Kill("storm"),)), Decision("never", "killed:storm")),
    "critical": (lambda i: with_notification(i, priority="critical"), Decision("now", "critical")),
    "user's type": (lambda i: said(i, "user", "types", "order.*"), Decision("never", "type_off")),
    "user's category": (lambda i: said(i, "user", "categories", "orders"), Decision("never", "category_off")),
    "user's channel": (lambda i: with_document(i, "user", channels={"email": "off"}), Decision("never", "user_off")),
    "tenant's type": (lambda i: said(i, "tenant", "types", "order.*"), Decision("never", "tenant_off")),
    "tenant's category": (lambda i: said(i, "tenant", "categories", "orders"), Decision("never", "tenant_off")),
    "tenant's channel": (
        lambda i: with_document(i, "tenant", channels={"email": "off"}),
        Decision("never", "tenant_off"),
    ),
    "rule's default": (lambda i: with_line(i, "email", default="off"), Decision("never", "default")),
    "seen": (
        lambda i: with_facts(with_line(i, "email", unless_seen_seconds=60), seen=True),
        Decision("never", "seen_in_app"),
    ),
    "no address": (lambda i: with_profile(i, reach=("push", "sms")), Decision("never", "no_address")),
    "no template": (lambda i: replace(i, templates=("push",)), Decision("never", "no_template")),
    "digest": (
        lambda i: with_document(i, "tenant", channels={"email": "digest"}),
        Decision("digest:orders/2026-03-05T08:00:00Z", "digest"),
    ),
    "escalation": (
        lambda i: with_line(i, "email", unless_seen_seconds=60),
        Decision("unless_seen:60", "escalation"),
    ),
    "quiet hours": (
        lambda i: with_document(i, "user", quiet_hours=QuietHours(LUNCH)),
        Decision("at:2026-03-04T13:08:07.717000Z", "quiet_hours"),
    ),
    "send window": (
        lambda i: with_document(i, "tenant", send_windows=EVENING),
        Decision("at:2026-03-04T18:08:07.717000Z", "send_window"),
    ),
    "cap": (
        lambda i: with_facts(with_line(i, "email", cap=Cap(1, 3600)), capped_until=NOON + HOUR),
        Decision("at:2026-03-04T13:00:00Z", "throttled"),
    ),
}
"""Strongest first: what makes the decision of `email`, and what that is."""

NO_WAY = {"no address", "no template"}
"""Even what is critical cannot go where there is no way."""


def suppressed(inputs: Inputs, reason: str) -> Inputs:
    return with_profile(inputs, suppressions=(*inputs.profile.suppressions, Suppression("email", reason)))


def said(inputs: Inputs, whose: str, level: str, name: str, choice: str = "off") -> Inputs:
    return with_document(inputs, whose, **{level: {name: {"email": choice}}})


def test_without_any_reason_all_channels_of_the_rule_go_at_once() -> None:
    assert plan(plain()) == dict.fromkeys(("inapp", "push", "email", "sms", "webhook"), Decision("now", "default"))


@pytest.mark.parametrize("name", CAUSES)
def test_each_reason_alone_decides(name: str) -> None:
    cause, expected = CAUSES[name]
    assert decide("email", cause(plain())) == expected
    assert expected.why.partition(":")[0] in WHYS


@pytest.mark.parametrize(("stronger", "weaker"), list(combinations(CAUSES, 2)))
def test_of_two_reasons_the_stronger_decides(stronger: str, weaker: str) -> None:
    if stronger == "quiet hours" and weaker == "send window":
        expected = Decision("at:2026-03-04T18:08:07.717000Z", "quiet_hours")  # the first that forbids, the end of both
    elif (stronger, weaker) == ("rule's default", "digest"):
        expected = CAUSES["digest"][1]  # whoever says digest says that it is wanted
    elif stronger == "critical" and weaker in NO_WAY:
        expected = CAUSES[weaker][1]
    else:
        expected = CAUSES[stronger][1]
    assert decide("email", CAUSES[stronger][0](CAUSES[weaker][0](plain()))) == expected


LEVELS = [
    ("user", "types", "order.shipped"),
    ("user", "types", "order.*"),
    ("user", "types", "*"),
    ("user", "categories", "orders"),
    ("user", "channels", None),
    ("tenant", "types", "order.shipped"),
    ("tenant", "types", "order.*"),
    ("tenant", "types", "*"),
    ("tenant", "categories", "orders"),
    ("tenant", "channels", None),
]


@pytest.mark.parametrize("channel", ["email", "*"])
@pytest.mark.parametrize(("stronger", "weaker"), list(combinations(LEVELS, 2)))
def test_what_is_said_more_closely_wins_whatever_it_says(stronger: tuple, weaker: tuple, channel: str) -> None:
    for choice, when in (("on", "now"), ("off", "never")):
        inputs = say(say(plain(), weaker, channel, "off" if choice == "on" else "on"), stronger, channel, choice)
        found = decide("email", inputs)
        assert found.when == when
        if choice == "on":
            assert found.why == ("user_on" if stronger[0] == "user" else "default")


def say(inputs: Inputs, level: tuple, channel: str, choice: str) -> Inputs:
    whose, place, name = level
    document = inputs.defaults if whose == "tenant" else inputs.profile.preferences
    lines = getattr(document, place)
    line = {channel: choice}
    return with_document(inputs, whose, **{place: {**lines, **(line if name is None else {name: line})}})


def test_a_channel_that_is_named_wins_over_the_star_beside_it() -> None:
    inputs = with_document(plain(), "user", channels={"*": "off", "email": "on"})
    assert decide("email", inputs) == Decision("now", "user_on")
    assert decide("push", inputs) == Decision("never", "user_off")


def test_a_user_turns_on_what_the_rule_leaves_off() -> None:
    inputs = with_document(with_line(plain(), "email", default="off"), "user", channels={"email": "on"})
    assert decide("email", inputs) == Decision("now", "user_on")


def test_an_event_that_names_channels_narrows_the_rule_and_never_widens_it() -> None:
    asked = with_notification(with_line(plain(), "sms", default="off"), channels=("email", "sms", "fax", "email"))
    assert plan(asked) == {
        "email": Decision("now", "requested"),
        "sms": Decision("never", "default"),
        "fax": Decision("never", "no_rule"),
    }


def test_an_event_that_names_channels_needs_neither_a_rule_nor_a_template() -> None:
    asked = with_notification(replace(plain(), rule=None, templates=()), channels=("email", "webhook", "fax"))
    assert plan(asked) == {
        "email": Decision("now", "requested"),
        "webhook": Decision("now", "requested"),
        "fax": Decision("never", "no_rule"),
    }
    assert decide("email", with_document(asked, "user", channels={"email": "off"})) == Decision("never", "user_off")
    assert decide("email", suppressed(asked, "hard_bounce")) == Decision("never", "suppressed:hard_bounce")


def test_the_app_is_switched_off_only_where_the_rule_makes_it_optional() -> None:
    off = with_document(plain(), "user", channels={"inapp": "off"})
    assert decide("inapp", off) == Decision("now", "default")
    optional = replace(off, rule=replace(off.rule, inapp="optional"))
    assert decide("inapp", optional) == Decision("never", "user_off")


def test_the_app_shows_at_once_what_a_choice_for_all_channels_would_have_wait() -> None:
    waits = with_document(plain(), "user", channels={"*": "digest"})
    optional = replace(waits, rule=replace(waits.rule, inapp="optional"))
    assert decide("inapp", optional) == Decision("now", "user_on")
    held = effective("inapp", "x", None, optional.rule, optional.profile.preferences, optional.defaults)
    assert held == Effective("on", "user_channel"), "what is shown to the user is what is decided"


@pytest.mark.parametrize("cause", ["no rule", "opted out", "killed", "no address", "quiet hours", "send window"])
def test_the_app_has_the_record_whatever_holds_back_the_channels(cause: str) -> None:
    inputs = CAUSES[cause][0](plain())
    inputs = with_profile(inputs, suppressions=(Suppression("inapp", "opted_out"),))
    assert decide("inapp", inputs) == Decision("now", "default")


def test_critical_means_all_channels_of_the_rule_at_once_but_none_that_the_law_forbids() -> None:
    inputs = with_document(plain(), "user", channels={"*": "off"}, quiet_hours=QuietHours(LUNCH))
    inputs = with_line(with_line(inputs, "push", unless_seen_seconds=60), "sms", default="off")
    inputs = replace(suppressed(inputs, "opted_out"), rule=replace(inputs.rule, priority="critical"))
    now = Decision("now", "critical")
    assert plan(inputs) == {
        "inapp": now, "push": now, "sms": now, "webhook": now, "email": Decision("never", "opted_out")
    }  # fmt: skip


def test_an_event_that_says_low_is_not_made_critical_by_its_rule() -> None:
    inputs = with_notification(replace(plain(), rule=replace(plain().rule, priority="critical")), priority="low")
    assert decide("push", inputs) == Decision("now", "default")


def test_a_suppression_holds_for_its_category_and_until_it_expires() -> None:
    def decided(**of: object) -> str:
        return decide("email", with_profile(plain(), suppressions=(Suppression("email", "opted_out", **of),))).why

    assert decided(scope="orders") == "opted_out"
    assert decided(scope="offers") == "default"
    assert decided(expires_at=NOON) == "default"
    assert decided(expires_at=NOON + HOUR) == "opted_out"


def test_a_switch_holds_for_its_channel_and_category() -> None:
    assert decide("email", replace(plain(), kills=(Kill("s", channel="push"),))).why == "default"
    assert decide("email", replace(plain(), kills=(Kill("s", category="offers"),))).why == "default"
    assert decide("email", replace(plain(), kills=(Kill("s", "email", "orders"),))).why == "killed:s"


def test_a_push_without_a_token_says_so() -> None:
    assert decide("push", with_profile(plain(), reach=())) == Decision("never", "no_token")


def test_a_webhook_needs_no_template_and_knows_no_silence() -> None:
    inputs = with_document(replace(plain(), templates=()), "user", quiet_hours=QuietHours(LUNCH))
    assert decide("webhook", inputs) == Decision("now", "default")


def test_the_category_of_the_rule_is_for_events_that_name_none() -> None:
    inputs = with_notification(plain(), category=None)
    inputs = replace(inputs, rule=TypeRule(pattern="*", category="offers", channels=plain().rule.channels))
    assert decide("email", said(inputs, "user", "categories", "offers")).why == "category_off"


def test_what_was_read_meanwhile_is_not_sent_when_its_wait_is_over() -> None:
    def decided(**facts: object) -> str:
        return decide("email", with_facts(plain(), **facts)).why

    assert decided(stage="quiet_hours", read=True) == "seen_in_app"
    assert decided(stage="digest", archived=True) == "all_read"
    assert decided(stage="quiet_hours", seen=True) == "default", "shown on one device is not read"


@pytest.mark.parametrize("stage", ["quiet_hours", "send_window", "cap"])
def test_who_wakes_so_late_that_it_is_quiet_again_waits_for_the_next_hour_that_is_not(stage: Stage) -> None:
    inputs = with_document(plain(), "user", quiet_hours=QuietHours(LUNCH))
    late = with_facts(inputs, stage=stage)
    assert decide("email", late) == decide("email", with_facts(inputs, stage="first"))
    assert decide("email", late).why == "quiet_hours"
    old = with_facts(late, stored_at=NOON - WAIT_MAX)
    assert decide("email", old) == Decision("never", "quiet_hours"), "it ends"
    replayed = with_facts(old, stage="retry")
    assert decide("email", replayed) == decide("email", late), (
        "a letter may be replayed after weeks, and waits like any other"
    )
    assert decide("email", with_facts(plain(), stage=stage, stored_at=NOON - WAIT_MAX)).when == "now"


def test_a_wait_beyond_the_expiry_ends_at_once() -> None:
    inputs = with_document(plain(), "user", quiet_hours=QuietHours(LUNCH))
    assert decide("email", with_notification(inputs, expires_at=NOON + HOUR)) == Decision("never", "expired")
    brief = replace(inputs, rule=replace(inputs.rule, ttl_seconds=60))
    assert decide("email", brief) == Decision("never", "expired")
    assert decide("inapp", brief) == Decision("now", "default"), "the record stays"


def test_a_cap_that_stays_exhausted_for_a_day_throttles() -> None:
    inputs = with_line(plain(), "email", cap=Cap(1, 7 * 86_400))
    assert decide("email", with_facts(inputs, capped_until=NOON + 25 * HOUR)) == Decision("never", "throttled")


def test_a_user_chooses_digest_or_instant_whatever_the_rule_says() -> None:
    digest = with_document(with_line(plain(), "email", unless_seen_seconds=9), "user", channels={"email": "digest"})
    assert decide("email", digest).when.startswith("digest:orders/")
    instant = with_document(CAUSES["digest"][0](plain()), "user", channels={"email": "instant"})
    assert decide("email", instant) == Decision("now", "user_on")
