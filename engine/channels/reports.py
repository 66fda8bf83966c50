"""What providers report of a message later, in one form for all of them."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Literal

import msgspec

from engine.channels.channel import Outcome

State = Literal["sent", "failed", "delivered"]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What has become of a message, as its provider says.

    Args:
        id: of the report; the same one may be posted again.
        provider_id: which message, as in the outcome of its sending.
        reference: what we gave with it, see `engine.channels.references`; "": nothing came back.
        address: whom it was for.
        state: `delivered`: the recipient's server or phone has it. A complaint says that, too.
        outcome: where more follows from it than the state: what it means for the address.
        at: when it happened.
    """

    id: str
    provider_id: str
    reference: str = ""
    address: str
    state: State
    outcome: Outcome | None = None
    at: datetime

    def __repr__(self) -> str:
        """Without the address."""
        return (
            f"Report(id={self.id!r}, provider_id={self.provider_id!r}, state={self.state!r}, outcome={self.outcome!r})"
        )


def report_id(*parts: object) -> str:
    """The id of a report, made of what it says."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "replace")).hexdigest()
