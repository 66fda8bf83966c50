"""Dead letters: whole events that cannot be delivered, kept with the reason and their original bytes."""

from __future__ import annotations

from engine.broker import wire
from engine.broker.jetstream import WRONG_LAST_SEQUENCE, After, Broker
from engine.dispatch.rounds import Dead
from engine.errors import ApiError
from engine.limits import APPEND_BUDGET_SECONDS
from seamark.protocol.subjects import DEAD_LETTERS_STREAM, dead_letter_subject

DETAIL_CHARS_MAX = 512


async def bury(
    broker: Broker, dead: Dead, event_partition: int, epoch: str, *, budget_seconds: float = APPEND_BUDGET_SECONDS
) -> None:
    """Store a dead letter, once per event however often it is tried: its subject may hold one message only.

    Raises:
        Unavailable, Unanswered, ApiError: it could not be stored; the event must not be passed over then.
    """
    delivered = dead.delivered
    headers = {
        "Seamark-Reason": dead.reason,
        "Seamark-Detail": _header_text(dead.detail),
        "Seamark-Original": f"{epoch}.{delivered.seq}",
        "Seamark-Subject": _header_text(delivered.subject.decode("utf-8", "replace")),
    }
    for name in (b"traceparent", b"tracestate"):
        if value := wire.header(delivered.headers, name):
            headers[name.decode()] = _header_text(value.decode("utf-8", "replace"))
    subject = dead_letter_subject(event_partition, epoch, delivered.seq)
    try:
        after = After(DEAD_LETTERS_STREAM, 0)
        await broker.append(subject, delivered.payload, headers, after=after, budget_seconds=budget_seconds)
    except ApiError as error:
        if error.err_code != WRONG_LAST_SEQUENCE:
            raise


def _header_text(text: str) -> str:
    """`text` as one line of printable ASCII: it came from outside and must not smuggle a header."""
    return text.encode("ascii", "backslashreplace").decode().translate(_CONTROLS)[:DETAIL_CHARS_MAX]


_CONTROLS = dict.fromkeys((*range(32), 127), " ")
