"""Whether an endpoint still takes webhooks: what has to happen until it is disabled, as a pure state machine.

Several workers report about an endpoint, in any order. A state keeps times and no counts, so a report that comes late or twice can put
off the end of an endpoint, and never bring it forward.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from engine.channels.channel import Outcome

FAILING: Final = timedelta(days=5)
"""How long an endpoint may only fail: longer than the whole retry schedule of a message (75 h), so all of it was tried."""

Reason = Literal["gone", "failing"]


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of an endpoint.

    Args:
        enabled_at: when it was made, or enabled again. What was sent before says nothing of it.
        ok_at: when the last message was sent that it took.
        failing_since: when the first message was sent that failed since then.
        failed_at: when the last one was.
        failed_id: the first message that failed.
        several: another one failed, too: one alone may be at fault itself.
        disabled: why it is.
        disabled_at: since when.
    """

    enabled_at: datetime
    ok_at: datetime | None = None
    failing_since: datetime | None = None
    failed_at: datetime | None = None
    failed_id: str = ""
    several: bool = False
    disabled: Reason | None = None
    disabled_at: datetime | None = None


def reported(health: Health, outcome: Outcome, message: str, sent_at: datetime) -> Health:
    """What is known after an attempt. The endpoint is to be told `endpoint.disabled` where `disabled` has come new.

    Args:
        health: before it.
        outcome: of the attempt.
        message: the `webhook-id`.
        sent_at: when the attempt began.
    """
    if sent_at < health.enabled_at or health.disabled is not None:
        return health
    match outcome.kind:
        case "ok":
            return _taken(health, sent_at)
        case "target_invalid":
            return msgspec.structs.replace(health, disabled="gone", disabled_at=sent_at)
        case "transient" | "throttled" | "permanent":
            return _failed(health, message, sent_at)
        case _:
            return health  # nothing was sent, or the fault is ours


def enabled(at: datetime) -> Health:
    """What is known of an endpoint that is made, or enabled again: nothing that was before."""
    return Health(enabled_at=at)


def _taken(health: Health, sent_at: datetime) -> Health:
    if health.ok_at is not None and sent_at <= health.ok_at:
        return health
    if health.failed_at is None or health.failed_at <= sent_at:
        return Health(enabled_at=health.enabled_at, ok_at=sent_at)
    if health.failing_since is not None and sent_at < health.failing_since:
        return msgspec.structs.replace(health, ok_at=sent_at)
    # A report that is late: of what has failed after this, only the last one's time is known for certain, and no message.
    return Health(
        enabled_at=health.enabled_at, ok_at=sent_at, failing_since=health.failed_at, failed_at=health.failed_at
    )


def _failed(health: Health, message: str, sent_at: datetime) -> Health:
    if health.ok_at is not None and sent_at <= health.ok_at:
        return health
    since = min(health.failing_since or sent_at, sent_at)
    last = max(health.failed_at or sent_at, sent_at)
    first_id = health.failed_id or message
    several = health.several or message != first_id
    changed = {"failing_since": since, "failed_at": last, "failed_id": first_id, "several": several}
    failed = msgspec.structs.replace(health, **changed)
    if several and last - since >= FAILING:
        return msgspec.structs.replace(failed, disabled="failing", disabled_at=last)
    return failed
