"""What a message carries to its provider and back: which try of which notification a report is about.

A provider's own id would have to be looked for, in every partition's rows, for each report. What comes back is believed only
where we have sealed it: a report names no notification that its sender has made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from engine.channels.channel import Job, claim_key_of, key_of
from engine.channels.sealed import Sealer

NAME: Final = "seamark"
"""Of the field at providers that keep fields with a message."""

TOKEN_CHARS_MAX: Final = 800
"""Postmark keeps ten fields of 80 characters with a mail, which is the least of all."""

PIECES_MAX: Final = 10


class Reference(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A try of a job.

    Args:
        attempt: as in the job, and the tries of its former lives.
        category: of the notification, which a wish to get no more holds for.
        trace: of the notification, as in the job.
        tries_before: of these attempts those of former lives.
        stored_at: when the notification was stored, in Unix seconds. Messages from before this was said
            have none of the last three.
    """

    tenant: str
    user: str
    id: str
    channel: str
    target: str
    attempt: int
    category: str
    trace: str = ""
    tries_before: int = 0
    stored_at: int = 0

    @property
    def key(self) -> str:
        """The key of the job."""
        return key_of(self.tenant, self.id, self.user, self.channel, self.target)

    @property
    def claim_key(self) -> str:
        """What the claim of the job is named by."""
        return claim_key_of(self.key, self.tries_before)


class References(Sealer[Reference]):
    """Makes and reads references. Raises ValueError as `Sealer`."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__(secrets, purpose=b"seamark reference 1", form=Reference, chars_max=TOKEN_CHARS_MAX)

    def of(self, job: Job) -> str:
        """The reference of a job's try.

        What is too long beside long names is left out: the trace first, of which only a span is missing then, and then the
        category: a wish to get no more then holds for everything.
        """
        what = Reference(
            tenant=job.tenant,
            user=job.user,
            id=job.id,
            channel=job.channel,
            target=job.target,
            attempt=job.tries_before + job.attempt,
            category=job.category,
            trace=job.trace,
            tries_before=job.tries_before,
            stored_at=int((job.stored_at or job.first_at).timestamp()),
        )
        for shorter in (what, replace(what, trace="", stored_at=0)):
            try:
                return self.make(shorter)
            except ValueError:
                continue
        return self.make(replace(what, trace="", stored_at=0, category=""))


def pieces(reference: str, chars_max: int) -> dict[str, str]:
    """A reference in fields of so many characters: `seamark-0`, `seamark-1` …; none of an empty one."""
    return {
        f"{NAME}-{number}": reference[begin : begin + chars_max]
        for number, begin in enumerate(range(0, len(reference), chars_max))
    }


def joined(fields: Mapping[str, Any]) -> str:
    """The reference in such fields; "": there is none. A field may be a list of one text, as SES has it."""
    parts: list[str] = []
    for number in range(PIECES_MAX):
        part = fields.get(f"{NAME}-{number}")
        text = part[0] if isinstance(part, list) and part else part
        if not isinstance(text, str):
            break
        parts.append(text[:TOKEN_CHARS_MAX])
    return "".join(parts)
