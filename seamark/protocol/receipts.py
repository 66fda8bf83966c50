"""Receipts: stored facts about delivery, as JSON on `rcpt.<p>.<tenant>.<user>`."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec

from seamark.protocol.events import EventId, Label

PLANNED: Final = "planned"
"""State of the receipt in which a planner says what it has decided. It is about all channels, so it names none."""

NO_INPUTS: Final = msgspec.Raw(b"null")


class Planned(msgspec.Struct, frozen=True, gc=False):
    """What was decided of a channel: when it is used, and why."""

    when: str
    why: str


class Receipt(msgspec.Struct, omit_defaults=True, gc=False):
    """That something is in `state` on a channel: one notification (`id`), or a range of the log; or what was planned.

    Fields are only ever appended.

    Args:
        device: where, for channels that tell devices apart.
        epoch, after, up_to: the range: all of the user's records with `after < seq <= up_to` of this incarnation; -1: none.
        sent_at: when it was sent, where that is not told by a receipt of its own.
        attempt: the number of the try, from 1.
        term, plan: of a plan: the planner's term, and what it has decided of each channel.
        inputs: what that was decided from; whoever decides from it again decides the same.
        provider_id: what the provider calls the message.
        segments: of an SMS, how many the price is for.
    """

    user: str
    channel: Label
    state: str
    at: datetime
    device: Label = ""
    id: EventId | None = None
    epoch: Label | None = None
    after: int = -1
    up_to: int = 0
    sent_at: datetime | None = None
    reason: str | None = None
    attempt: int = 0
    provider: str | None = None
    trace: str | None = None
    term: int = 0
    plan: dict[Label, Planned] | None = None
    inputs: msgspec.Raw = NO_INPUTS
    provider_id: str | None = None
    segments: int = 0


decode_receipt = msgspec.json.Decoder(Receipt).decode
