"""The decision: by which channels a notification goes to a user, when, and why. Pure: the same inputs give the same answer.

What comes first wins: what has become of the notification > legal opt-out and suppression > kill switch > critical > the
user's type > his category > his channel > the tenant's the same > the rule. Who would be sent something is then looked at for an
address and a template, and at last for a reason to wait.

A decision that waits is made again when it is due. What has woken is not put into a digest and not escalated again. It waits for
a silence again only where it has come too late for the hour that it waited for, so every notification ends. A cap may ask again,
for a day.
"""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar, cast

import msgspec

from engine.plan.choices import Effective, Source, effective
from engine.plan.decisions import Decision, Inputs, Stage
from engine.plan.hours import HORIZON, Digest, Window, open_from, silent_until, spread, window_end
from engine.plan.patterns import patterns_of
from engine.plan.preferences import QUIETABLE, Preferences
from engine.plan.profile import OPTED_OUT, SCOPE_ALL
from engine.plan.rules import CHANNELS, Channel, ChannelRule, TypeRule
from seamark.protocol.events import INAPP

CAP_WAIT: Final = timedelta(days=1)
"""How long a notification waits for a cap, counted from when the log stored it: then it is no news any more."""

TEMPLATED: Final = frozenset({"push", "email", "sms"})
"""Channels whose messages are made from a template. A webhook's receiver gets the record itself."""

WAIT_MAX: Final = 2 * HORIZON
"""A notification that wakes in a silence again waits for no longer than this, counted from when the log stored it. A wait ends
outside of any silence, but whoever is held up by an operator or an outage may come into the next one, and the one after that."""

_WAITED_FOR_TIME: Final = frozenset({"quiet_hours", "send_window", "cap"})
"""Stages whose wait ends at a time when sending is allowed. `retry` is none: a letter may be replayed after weeks."""

_OFF: Final[dict[Source, str]] = {
    "user_type": "type_off",
    "user_category": "category_off",
    "user_channel": "user_off",
    "tenant_type": "tenant_off",
    "tenant_category": "tenant_off",
    "tenant_channel": "tenant_off",
}


def plan(inputs: Inputs) -> dict[str, Decision]:
    """The decision of each channel: those that the event asks for, else the app and all of the rule."""
    channels, inputs = channels_of(inputs), _with_rule(inputs)
    return {channel: _decided(channel, inputs) for channel in channels}


def channels_of(inputs: Inputs) -> tuple[str, ...]:
    """The channels there is something to decide about, each once."""
    if inputs.notification.channels is not None:
        return tuple(dict.fromkeys(inputs.notification.channels))
    return tuple(dict.fromkeys((INAPP, *(inputs.rule.channels if inputs.rule is not None else ()))))


def decide(channel: str, inputs: Inputs) -> Decision:
    """When `channel` is used, and why. There is an answer for all inputs."""
    return _decided(channel, _with_rule(inputs))


def _decided(channel: str, inputs: Inputs) -> Decision:
    choice = _choice(channel, inputs)
    if channel == INAPP:
        return _ended(channel, inputs) or _shown(choice, inputs)
    return _ended(channel, inputs) or _sent(channel, choice, inputs)


def _shown(choice: Effective, inputs: Inputs) -> Decision:
    """In the app. The record is in the log, whatever is decided, so what holds up other channels does not concern it."""
    if inputs.critical:
        return Decision("now", "critical")
    return _switched_off(choice) or Decision("now", _reason(choice, inputs))


def _sent(channel: str, choice: Effective, inputs: Inputs) -> Decision:
    """By a channel beyond the app."""
    line = None if inputs.rule is None else inputs.rule.channels.get(cast("Channel", channel))
    if line is None:
        return _never("no_rule")
    return (
        _forbidden(channel, inputs)
        or _critical(channel, inputs)
        or _switched_off(choice)
        or _noticed(line, inputs)
        or _unreachable(channel, inputs)
        or _crowded_out(channel, line, choice, inputs)
        or _later(channel, line, choice, inputs)
        or Decision("now", _reason(choice, inputs))
    )


def _with_rule(inputs: Inputs) -> Inputs:
    """A type of which the tenant has said nothing goes by the channels that its event names: the first try needs no set-up."""
    named = inputs.notification.channels
    if inputs.rule is not None or named is None:
        return inputs
    return msgspec.structs.replace(inputs, rule=_rule_of(named))


@functools.lru_cache(maxsize=256)  # who publishes may name whatever he likes
def _rule_of(named: tuple[str, ...]) -> TypeRule:
    known = {channel: ChannelRule() for channel in CHANNELS if channel in named and channel != INAPP}
    return TypeRule(pattern="*", channels=known)


def _never(why: str) -> Decision:
    return Decision("never", why)


def _ended(channel: str, inputs: Inputs) -> Decision | None:
    """What has become of the notification or its user, so that nothing of it is sent any more."""
    facts = inputs.facts
    if inputs.profile.deleted:
        return _never("user_deleted")
    if facts.duplicate:
        return _never("duplicate")
    if facts.recalled:
        return _never("recalled")
    if facts.cancelled and channel != INAPP:  # what the log has, the app shows until it is recalled
        return _never("cancelled")
    if facts.superseded:
        return _never("superseded")
    expires_at = _expires_at(channel, inputs)
    return _never("expired") if expires_at is not None and expires_at <= inputs.now else None


def _expires_at(channel: str, inputs: Inputs) -> datetime | None:
    """A rule's `ttl_seconds` is for the channels: the record itself stays."""
    return inputs.notification.expires_at if channel == INAPP else inputs.expires_at


def _forbidden(channel: str, inputs: Inputs) -> Decision | None:
    """What holds even for critical notifications."""
    if suppressions := inputs.profile.suppressions:
        held = [each.reason for each in suppressions if each.holds(channel, inputs.category, inputs.now)]
        if OPTED_OUT in held:
            return _never("opted_out")
        if held:
            return _never(f"suppressed:{min(held)}")
    if not inputs.kills:
        return None
    kills = [kill.switch for kill in inputs.kills if kill.holds(channel, inputs.category)]
    return _never(f"killed:{min(kills)}") if kills else None


def _critical(channel: str, inputs: Inputs) -> Decision | None:
    if not inputs.critical:
        return None
    crowded_out = _never("throttled") if inputs.throttled else None
    return _unreachable(channel, inputs) or crowded_out or Decision("now", "critical")


def _switched_off(choice: Effective) -> Decision | None:
    return _never(_OFF.get(choice.source, "default")) if choice.choice == "off" else None


def _noticed(line: ChannelRule, inputs: Inputs) -> Decision | None:
    """Nobody needs to be told by another channel what was shown, or read, meanwhile."""
    facts = inputs.facts
    done = facts.read or facts.archived
    if done and facts.stage == "digest":
        return _never("all_read")
    escalated = line.unless_seen_seconds is not None
    if (done and (escalated or facts.stage != "first")) or (facts.seen and escalated):
        return _never("seen_in_app")
    return None


def _unreachable(channel: str, inputs: Inputs) -> Decision | None:
    if channel not in inputs.profile.reach:
        return _never("no_token" if channel == "push" else "no_address")
    # Who names a channel gets the plain default where there is no template.
    plain = inputs.notification.channels is not None
    if channel in TEMPLATED and channel not in inputs.templates and not plain:
        return _never("no_template")
    return None


def _crowded_out(channel: str, line: ChannelRule, choice: Effective, inputs: Inputs) -> Decision | None:
    """No more jobs for a tenant that has too many. What joins a digest is none: all of its window share one."""
    if not inputs.throttled:
        return None
    later = _later(channel, line, choice, inputs)
    return None if later is not None and later.when.startswith(("digest:", "never")) else _never("throttled")


def _reason(choice: Effective, inputs: Inputs) -> str:
    if choice.source.startswith("user_"):
        return "user_on"
    return "default" if inputs.notification.channels is None else "requested"


def _choice(channel: str, inputs: Inputs) -> Effective:
    preferences, defaults = inputs.profile.preferences, inputs.defaults
    return effective(channel, inputs.notification.type, inputs.category, inputs.rule, preferences, defaults)


def _later(channel: str, line: ChannelRule, choice: Effective, inputs: Inputs) -> Decision | None:
    """Why to wait, if there is a reason. What would wait until after it has expired is over now."""
    facts, found = inputs.facts, None
    if facts.stage == "first":
        found = _gathered(line, choice, inputs)
    if found is None and channel in QUIETABLE:
        found = _in_silence(channel, inputs)
    if found is None:
        found = _capped(line, inputs)
    if found is None or (woken := wakes(found, inputs)) is None:
        return found
    if inputs.expires_at is not None and inputs.expires_at <= woken[1]:
        return _never("expired")
    if facts.stage in _WAITED_FOR_TIME and woken[1] > facts.stored_at + WAIT_MAX:
        return _never(found.why)
    return found


def _gathered(line: ChannelRule, choice: Effective, inputs: Inputs) -> Decision | None:
    """To be sent together with others, or only if nobody has seen it."""
    if choice.choice == "digest" or (choice.choice == "on" and line.digest is not None):
        end = window_end(line.digest or Digest(), inputs.facts.stored_at, inputs.zone)
        return Decision(f"digest:{inputs.category or ''}/{_text(end)}", "digest")
    if line.unless_seen_seconds is not None:
        return Decision(f"unless_seen:{line.unless_seen_seconds}", "escalation")
    return None


def _in_silence(channel: str, inputs: Inputs) -> Decision | None:
    """Not now: the user's quiet hours, or outside the tenant's send windows.

    Where quiet hours leave no hour to send in, there is none: whoever asks for silence all the time gets it.
    """
    windows = inputs.defaults.send_windows
    quiet = _quiet_windows(channel, inputs)
    if not quiet and not windows:
        return None
    moment, why = inputs.now, ""
    while moment - inputs.now <= HORIZON:
        until = silent_until(quiet, moment, inputs.zone)
        if until is None:
            return _never("quiet_hours")
        opens = open_from(windows, until, inputs.zone) if windows else until
        if opens is None:
            return _never("send_window")
        why = why or ("quiet_hours" if until > moment else "send_window")
        if opens == moment:
            return None if moment == inputs.now else Decision(f"at:{_text(_spread_out(moment, quiet, inputs))}", why)
        moment = opens
    return _never(why)


def _quiet_windows(channel: str, inputs: Inputs) -> tuple[Window, ...]:
    own = inputs.profile.preferences.quiet_hours
    quiet = own if own is not None else inputs.defaults.quiet_hours
    return quiet.windows if quiet is not None and channel in quiet.channels else ()


def _spread_out(moment: datetime, quiet: tuple[Window, ...], inputs: Inputs) -> datetime:
    """This user's turn after `moment`; `moment` itself, if sending would be forbidden again by then."""
    turn = moment + spread(inputs.notification.tenant, inputs.notification.user)
    windows = inputs.defaults.send_windows
    clear = silent_until(quiet, turn, inputs.zone) == turn
    return turn if clear and (not windows or open_from(windows, turn, inputs.zone) == turn) else moment


def _capped(line: ChannelRule, inputs: Inputs) -> Decision | None:
    until = inputs.facts.capped_until
    if line.cap is None or until is None or until <= inputs.now:
        return None
    return (
        Decision(f"at:{_text(until)}", "throttled")
        if until <= inputs.facts.stored_at + CAP_WAIT
        else _never("throttled")
    )


def wakes(decision: Decision, inputs: Inputs) -> tuple[Stage, datetime] | None:
    """Which stage decides again, and when; None where the decision is the last."""
    if decision.when == "now":
        return None
    kind, _, rest = decision.when.partition(":")
    if kind == "at":
        stage: Stage = "cap" if decision.why == "throttled" else "quiet_hours"
        return "send_window" if decision.why == "send_window" else stage, datetime.fromisoformat(rest)
    if kind == "unless_seen":
        return "escalation", inputs.facts.stored_at + timedelta(seconds=int(rest))
    if kind == "digest":
        end = datetime.fromisoformat(rest.rpartition("/")[2])
        return "digest", end + spread(inputs.notification.tenant, inputs.notification.user)
    return None


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def has_moments(inputs: Inputs) -> bool:
    """Whether the decision may be another one at another time, even if the notification is not over by then."""
    preferences, defaults = inputs.profile.preferences, inputs.defaults
    return (
        preferences.quiet_hours is not None
        or defaults.quiet_hours is not None
        or bool(defaults.send_windows)
        or any(one.expires_at is not None for one in inputs.profile.suppressions)
    )


def narrowed(inputs: Inputs) -> Inputs:
    """The inputs without what has no say in this plan: small enough to be stored with it, and it gives the same plan."""
    profile, preferences, suppressions = inputs.profile, inputs.profile.preferences, inputs.profile.suppressions
    named = frozenset(channels_of(inputs)) if suppressions or inputs.templates else frozenset()
    narrow, held = _narrowed(preferences, inputs), suppressions
    if suppressions:
        held = tuple(one for one in held if one.channel in named and one.scope in {SCOPE_ALL, inputs.category})
    if narrow is not preferences or held is not suppressions:
        profile = msgspec.structs.replace(profile, preferences=narrow, suppressions=held)
    defaults, templates = _narrowed(inputs.defaults, inputs), inputs.templates
    if not named.issuperset(templates):
        templates = tuple(channel for channel in templates if channel in named)
    if profile is inputs.profile and defaults is inputs.defaults and templates is inputs.templates:
        return inputs  # mostly
    return msgspec.structs.replace(inputs, profile=profile, defaults=defaults, templates=templates)


_Document = TypeVar("_Document", bound=Preferences)


def _narrowed(document: _Document, inputs: Inputs) -> _Document:
    """The lines that are about the notification's type and category."""
    if not document.types and not document.categories:
        return document
    patterns, category = patterns_of(inputs.notification.type), inputs.category
    return msgspec.structs.replace(
        document,
        types={pattern: document.types[pattern] for pattern in patterns if pattern in document.types},
        categories={name: line for name, line in document.categories.items() if name == category},
    )
