"""What earlier versions let pass in events and nobody may publish any more, and how events are read that hold it.

It is refused where events are published: by `encode`, and so by the SDK, HTTP and campaigns. Whoever reads a stored event cannot
tell how old it is, nor whether it came over plain NATS, where nobody looks at it before. So all are read alike, as earlier
versions did: what there is not is passed over, and an event of which nothing is left then is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from seamark.protocol.errors import InvalidEvent


class Event(Protocol):
    """What of an event is looked at: see `seamark.protocol.events.Event`."""

    to: list[str]
    channels: list[str] | None
    category: str | None
    collapse_key: str | None
    transaction_id: str | None


class Unfit(NamedTuple):
    """What is unfit in an event, in the terms of `InvalidEvent`.

    Whoever reads events keeps these, so they are no exceptions: once raised, an exception has a traceback, which refers to the
    frame that keeps it. Both would stay in memory for ever.
    """

    reason: str
    detail: str


def pass_over(event: Event, payload: bytes, known: Mapping[str, object]) -> tuple[Unfit, ...]:
    """Take out of `event` what there is not; what was unfit, each as its publisher would be told.

    Users whose names have a NUL go, channels that are not among `known`, and a transaction that nobody can cancel. In a
    category a NUL is replaced, since an opt-out from it must be stored. A collapse key stays as it is: devices group by it.

    Args:
        payload: the event as it is stored.

    Raises:
        InvalidEvent: no user is left, or no channel of those named.
    """
    unfit = () if event.channels is None else tuple(_channels(event, event.channels, known))
    # JSON has no other way to write it.
    return unfit if payload.find(b"\\u0000") < 0 else (*unfit, *_nuls(event))


def _channels(event: Event, named: list[str], known: Mapping[str, object]) -> Iterator[Unfit]:
    remedy = f"name some of {', '.join(known)}"
    if not named:
        raise InvalidEvent("channels", f"`channels` names none: leave it out, or {remedy}")
    if all(map(known.__contains__, named)):  # nearly always
        return
    kept = [channel for channel in named if channel in known]
    unknown = next(channel for channel in named if channel not in known)
    wrong = Unfit("channels", f"`channels`: there is no channel {unknown[:80]!r}; {remedy}")
    if not kept:
        raise InvalidEvent(*wrong)
    event.channels = kept
    yield wrong


def _nuls(event: Event) -> Iterator[Unfit]:
    for name, label in (("category", event.category), ("collapse_key", event.collapse_key)):
        if label is not None and "\0" in label:
            yield Unfit(name, f"`{name}` holds a NUL, which cannot be stored: leave it out")
    if event.category is not None:
        event.category = event.category.replace("\0", "\ufffd")
    if event.transaction_id is not None and "\0" in event.transaction_id:
        event.transaction_id = None
        yield Unfit("transaction_id", "`transaction_id`: a name with a NUL cannot be stored")
    users = [user for user in event.to if "\0" not in user]
    if len(users) < len(event.to):
        wrong = Unfit("to", "`to` holds an impossible user: a name with a NUL cannot be stored")
        if not users:
            raise InvalidEvent(*wrong)
        event.to = users
        yield wrong
