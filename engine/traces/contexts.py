"""W3C trace contexts as they go with events and records: read without a dictionary, decided without a random number."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from opentelemetry.trace import SpanContext, TraceFlags

SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)

_LINE: Final = b"\r\ntraceparent:"
_IDS: Final = rb" *00-([0-9a-f]{32})-([0-9a-f]{16})-"
_ANY: Final = re.compile(_IDS + rb"([0-9a-f]{2}) *(?:\r\n|\Z)").match
# The last bit of the flags says that it is followed, so their last digit is odd. All messages are looked at, and nearly none is
# followed: most are told by `_UNFOLLOWED` alone, without an expression.
_FOLLOWED: Final = re.compile(_IDS + rb"([0-9a-f][13579bdf]) *(?:\r\n|\Z)").match
_LATER: Final = re.compile(
    rb"(?!00|ff)[0-9a-f]{2}(-[0-9a-f]{32}-[0-9a-f]{16}-)([0-9a-f]{2})(?:-[\x20-\x7e]*)?"
).fullmatch
_UNFOLLOWED: Final = b"-00"
"""The flags of nearly every context that is not followed."""

_FLAGS_AT: Final = len(_LINE) + len(" 00-") + 32 + len("-") + 16
"""How far behind the start of `_LINE` the flags are, as dispatchers write the header: with one blank after the colon."""

_FLAGS: Final = re.compile(rb"(00-[0-9a-f]{32}-[0-9a-f]{16}-)([0-9a-f]{2})")


def followed_in(headers: bytes) -> SpanContext | None:
    """The context in a block of headers, if it says that it is followed; else None. Every message is looked at by this.

    `traceparent:` is not found in the first line: of headers without `NATS/1.0`, put a line break before.
    """
    start = headers.find(_LINE)
    if start < 0 or headers.startswith(_UNFOLLOWED, start + _FLAGS_AT):
        return None
    return _context(_FOLLOWED(headers, start + len(_LINE)))


def context_of(traceparent: bytes | str | None) -> SpanContext | None:
    """The context of a `traceparent`, sampled or not; None: there is none that is valid."""
    return _context(_ANY(_bytes_of(traceparent))) if traceparent else None


def followed(traceparent: bytes | str | None) -> SpanContext | None:
    """The context of a `traceparent` that says it is followed."""
    given = _bytes_of(traceparent) if traceparent else b""
    return None if not given or given.endswith(_UNFOLLOWED) else _context(_FOLLOWED(given))


def traceparent_of(context: SpanContext) -> str:
    """The context as a header's value."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def as_version_00(traceparent: bytes) -> bytes:
    """A `traceparent` of a version that nobody has written yet as one of ours; any other as it is.

    Its first four fields mean the same, and of its flags the first alone is known (W3C Trace Context, "Versioning").
    """
    if traceparent.startswith(b"00-"):
        return traceparent
    found = _LATER(traceparent)
    return traceparent if found is None else b"00%b%02x" % (found[1], int(found[2], 16) & TraceFlags.SAMPLED)


def trace_line(traceparent: str) -> bytes:
    """The header of a message to be stored, with its line break; empty where the context is not followed or not valid."""
    found = followed(traceparent)
    return b"" if found is None else b"traceparent: %b\r\n" % traceparent_of(found).encode()


def unfollowed(traceparent: bytes) -> bytes:
    """The same text, whose first context now says that it is not followed."""
    return _FLAGS.sub(lambda found: b"%b%02x" % (found[1], int(found[2], 16) & ~TraceFlags.SAMPLED), traceparent, 1)


def first_context(tenant: str, event_id: str, one_in: int, *, always: bool = False) -> SpanContext | None:
    """The context that a trace begins with, of an event whose publisher has sent none; None: the event is not followed.

    Whoever is asked says the same, so that a gateway need not write down that it has decided against it.

    Args:
        tenant: its token.
        one_in: of so many events one is followed.
        always: whatever is said of the others.
    """
    digest = hashlib.blake2b(f"{tenant}:{event_id}".encode(), digest_size=32, person=b"seamark.trace").digest()
    if not always and int.from_bytes(digest[24:]) % one_in:
        return None
    trace_id, span_id = int.from_bytes(digest[:16]), int.from_bytes(digest[16:24])
    return SpanContext(trace_id or 1, span_id or 1, is_remote=True, trace_flags=SAMPLED)


def url_of(template: str | None, trace_id: str | None) -> str | None:
    """Where a trace can be looked at; None where nobody has said where traces are, or there is no trace."""
    return None if template is None or trace_id is None else template.replace("{trace_id}", trace_id)


def _bytes_of(traceparent: bytes | str) -> bytes:
    return traceparent.encode() if isinstance(traceparent, str) else traceparent


def _context(found: re.Match[bytes] | None) -> SpanContext | None:
    if found is None:
        return None
    flags = TraceFlags(int(found[3], 16))
    context = SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=flags)
    return context if context.is_valid else None
