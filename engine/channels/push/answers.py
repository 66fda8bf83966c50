"""What the three tables of push providers have in common."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from engine.channels.channel import Outcome
from engine.channels.exchange import Silence
from engine.channels.verdicts import Table

UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for a body that is none."""

_HARMLESS: Final = re.compile(r"[A-Za-z][A-Za-z_]{0,39}", re.ASCII)
"""What an unknown code may look like to be stored: tokens and endpoints have digits or other characters in them."""


def judged(table: Table, provider: str, status: int, code: str, *, retry_after_seconds: float | None = None) -> Outcome:
    """What a table says of an answer. A code that it does not know is kept only if it cannot hold a token.

    What was accepted is, whatever its body says beside that.
    """
    if 200 <= status < 300:
        code = ""
    shown = code if not code or code in table.codes or _HARMLESS.fullmatch(code) else "other"
    return table.judged(provider, status, shown, retry_after_seconds=retry_after_seconds)


def silent(provider: str, silence: Silence) -> Outcome:
    """What a request without an answer has come to."""
    return Outcome(kind="ambiguous" if silence.left else "transient", provider=provider, code=silence.why)


def renewed(outcome: Outcome) -> Outcome:
    """The outcome of a refusal whose cause is mended: the same can be sent again at once, and the attempt counts."""
    return msgspec.structs.replace(outcome, kind="transient", scope="message", retry_after_seconds=0.0)
