"""What a reply of an SMTP server means for the message, and for its recipient.

The first digit is about this message only. What is said of the recipient, the enhanced code (RFC 3463) says; suppressing an
address because of a refusal that was about our reputation would lose somebody who is there. The rows are data: `replies.toml`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from engine.channels.channel import Outcome, OutcomeKind, Scope

Stage = Literal["connect", "auth", "mail", "rcpt", "data", "end"]
"""Where in the session it was said: `connect` up to the end of STARTTLS, `data` before the text is asked for, `end` after its
final dot."""

TEXT_CHARS_MAX: Final = 2000
"""What is read of a reply. Honest ones have a few lines; patterns must not be fed by whoever answers."""

RETRY_SECONDS_MAX: Final = 6 * 3600
"""The longest wait that a server can talk us into: the longest pause between two tries of an e-mail."""

_RETRY_MARGIN_SECONDS: Final = 10
"""A greylist that is asked in the very second it has named begins anew."""

_ENHANCED: Final = re.compile(r"^[ \t]*#?([245])\.(\d{1,3})\.(\d{1,3})\b")
_AGAIN: Final = re.compile(
    r"(?:retry|again|wait|resend|delay|for|in)\D{0,40}?(\d{1,5})[ -]?(s|secs?|seconds?|m|mins?|minutes?|h|hours?)\b",
    re.IGNORECASE,
)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600}

_SILENT: Final = frozenset({"3", "4", "6", "7"})
"""Subjects of enhanced codes that say nothing about a recipient: system, network, content, policy."""

_DISABLED_RECIPIENT: Final = (525, "7.13")
"""The one exception: RFC 5248 has it for accounts; at RCPT it can only be the recipient's."""


class Reply(NamedTuple):
    """A reply as it is judged. `enhanced`: subject and detail, as `1.1`; "": none, or one that says nothing (`0.0`)."""

    code: int
    enhanced: str
    text: str

    @property
    def name(self) -> str:
        """What dead letters are grouped by."""
        return f"{self.code}/{self.code // 100}.{self.enhanced}" if self.enhanced else str(self.code)


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the table; `replies.toml` says what its members mean."""

    kind: OutcomeKind
    example: str
    digit: Literal[4, 5] | None = None
    codes: tuple[int, ...] = ()
    enhanced: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    scope: Scope = "message"
    retry_after_seconds: float | None = None
    suppress_seconds: float | None = None
    soft_bounce: bool = False


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    rows: tuple[Row, ...]


@cache
def table() -> _Table:
    """The table that ships with this version."""
    return msgspec.toml.decode(Path(__file__).with_name("replies.toml").read_bytes(), type=_Table)


def parse(code: int, text: str) -> Reply:
    """A reply by its code and its text, the lines of which are joined by line ends."""
    text = text[:TEXT_CHARS_MAX]
    found = _ENHANCED.match(text)
    if found is None or found[2] == found[3] == "0":
        return Reply(code, "", text)
    return Reply(code, f"{int(found[2])}.{int(found[3])}", text)


def classify(reply: Reply, stage: Stage) -> Outcome:
    """What follows from a reply that refuses something.

    Args:
        reply: of a code from 400 on; any other is one that a server may not give here, and passes by itself.
        stage: what it was the answer to.
    """
    row = next((row for row in table().rows if _matches(row, reply, stage)), None)
    if row is None:
        kind: OutcomeKind = "permanent" if reply.code // 100 == 5 else "transient"
        return Outcome(kind=kind, code=reply.name, retry_after_seconds=_wait(kind, reply, None), known=False)
    if row.kind == "target_invalid" and not _may_accuse(reply, stage):
        return Outcome(kind="permanent", code=reply.name, known=False)
    return Outcome(
        kind=row.kind,
        code=reply.name,
        scope=row.scope,
        retry_after_seconds=_wait(row.kind, reply, row.retry_after_seconds),
        suppress_seconds=row.suppress_seconds,
        soft_bounce=row.soft_bounce and stage in ("rcpt", "end"),
    )


def _may_accuse(reply: Reply, stage: Stage) -> bool:
    """Whether a reply can say that the recipient is none, whatever a row of the table says.

    The table grows by what is seen in the wild. This holds for all it will ever say: a false suppression loses a person, a
    missed one costs a mail.
    """
    if reply.code // 100 != 5 or stage not in ("rcpt", "data", "end"):
        return False
    subject = reply.enhanced.partition(".")[0]
    return subject not in _SILENT or ((reply.code, reply.enhanced) == _DISABLED_RECIPIENT and stage == "rcpt")


def _matches(row: Row, reply: Reply, stage: Stage) -> bool:
    return (
        (row.digit is None or row.digit == reply.code // 100)
        and (not row.codes or reply.code in row.codes)
        and (not row.stages or stage in row.stages)
        and (not row.enhanced or _has_enhanced(row.enhanced, reply.enhanced))
        and (not row.text or _pattern(row.text).search(reply.text) is not None)
        and (not row.unless or _pattern(row.unless).search(reply.text) is None)
    )


def _has_enhanced(patterns: Sequence[str], enhanced: str) -> bool:
    if not enhanced:
        return "none" in patterns
    return enhanced in patterns or f"{enhanced.partition('.')[0]}.*" in patterns


@cache
def _pattern(alternatives: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE | re.DOTALL)


def _wait(kind: OutcomeKind, reply: Reply, usual: float | None) -> float | None:
    """How long the server wants us to wait, by its words or else as usual for such a reply."""
    if kind not in ("transient", "throttled"):
        return None
    found = _AGAIN.search(reply.text)
    if found is None:
        return usual
    named = int(found[1]) * _UNITS[found[2][0].lower()] + _RETRY_MARGIN_SECONDS
    return float(min(max(named, usual or 0), RETRY_SECONDS_MAX))
