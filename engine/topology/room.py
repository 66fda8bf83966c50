"""How long the room of a stream lasts at its recent rate."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from engine.broker.jetstream import Broker
from engine.errors import ApiError
from engine.topology.plan import ObservedStream

INTAKE_WINDOW: Final = timedelta(hours=1)
"""Long enough to even out bursts, short enough to show what has changed today."""

INTAKE_SECONDS_MIN: Final = 60.0
"""A shorter time says nothing about a rate yet."""

SOON: Final = timedelta(days=14)
"""Time to order a disk."""

_NO_MESSAGE: Final = 10037


@dataclass(frozen=True, slots=True)
class Intake:
    """Messages that a stream has taken in the last `seconds`."""

    messages: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Room:
    """How long a stream's room lasts at its recent rate.

    Attributes:
        messages_per_second: the recent rate.
        messages_per_second_max: the highest rate at which age frees room in time; None where messages are kept for ever.
        full_at: when it is full at the earliest; None when age frees room before then.
    """

    messages_per_second: float
    messages_per_second_max: float | None
    full_at: datetime | None

    def soon(self, now: datetime) -> bool:
        """Whether something should be done about it now."""
        return self.full_at is not None and self.full_at - now < SOON

    def detail(self) -> str:
        """The same in words."""
        said = f"{self.messages_per_second:.3g} messages/s lately"
        if self.messages_per_second_max is not None:
            said += f", room for {self.messages_per_second_max:.3g}/s over its age"
        if self.full_at is None:
            return f"{said}: age frees room before it is full"
        return f"{said}: full on {self.full_at:%Y-%m-%d %H:%M} UTC at the earliest"


def room(stream: ObservedStream, intake: Intake) -> Room | None:
    """The room of a stream; None where it has no bound, and while its rate is not known."""
    bound, age = stream.config.get("max_bytes", -1), stream.config.get("max_age", 0) / 1e9
    if bound <= 0 or not stream.messages or intake.seconds < INTAKE_SECONDS_MIN or stream.asked_at is None:
        return None
    bytes_each = stream.bytes / stream.messages
    rate = intake.messages / intake.seconds
    most = bound / bytes_each / age if age else None
    if rate == 0 or (most is not None and rate <= most):
        return Room(rate, most, None)
    seconds = max(0.0, bound - stream.bytes) / (rate * bytes_each)
    try:
        return Room(rate, most, stream.asked_at + timedelta(seconds=seconds))
    except OverflowError:  # beyond the calendar
        return Room(rate, most, None)


async def read_intake(broker: Broker, name: str, stream: ObservedStream) -> Intake:
    """What a stream has taken in the last hour, or since its first message if that is younger.

    Raises:
        ApiError, Unavailable, Unanswered: the stream cannot be read.
    """
    if not stream.messages or stream.asked_at is None or stream.first_at is None:
        return Intake(0, 0.0)
    since = max(stream.first_at, stream.asked_at - INTAKE_WINDOW)
    seconds = (stream.asked_at - since).total_seconds()
    if since == stream.first_at:
        return Intake(stream.last_seq - stream.first_seq + 1, seconds)
    first = await _first_since(broker, name, since)
    return Intake(0 if first is None else max(0, stream.last_seq - first + 1), seconds)


async def _first_since(broker: Broker, name: str, since: datetime) -> int | None:
    at = since.astimezone(UTC).isoformat().replace("+00:00", "Z")
    try:
        answer = await broker.api(f"STREAM.MSG.GET.{name}", {"start_time": at})
    except ApiError as error:
        if error.err_code == _NO_MESSAGE:
            return None
        raise
    return int(answer["message"]["seq"])
