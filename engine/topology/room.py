"""How long the room of a stream lasts at its recent rate."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from engine.broker.answers import StreamState
from engine.broker.jetstream import Broker
from engine.errors import ApiError

INTAKE_WINDOW_SECONDS: Final = 3600.0
"""Long enough to even out bursts, short enough to show what has changed today."""

INTAKE_SECONDS_MIN: Final = 60.0
"""A shorter time says nothing about a rate yet."""

SOON_SECONDS: Final = 14 * 86_400.0
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
        messages_per_second_max: the highest rate at which age frees room in time; None where messages are kept for ever.
        full_at: when it is full at the earliest; None when age frees room before then.
        soon: whether something should be done about it now.
    """

    messages_per_second: float
    messages_per_second_max: float | None
    full_at: datetime | None = None
    soon: bool = False

    def detail(self) -> str:
        """The same in words."""
        said = f"{self.messages_per_second:.3g} messages/s lately"
        if self.messages_per_second_max is not None:
            said += f", room for {self.messages_per_second_max:.3g}/s over its age"
        if self.full_at is None:
            return f"{said}: age frees room before it is full"
        return f"{said}: full on {self.full_at:%Y-%m-%d %H:%M} UTC at the earliest"


def room(stream: StreamState, intake: Intake) -> Room | None:
    """The room of a stream; None where it has no bound, and while its rate is not known."""
    bound, age = stream.config.get("max_bytes", -1), stream.config.get("max_age", 0) / 1e9
    if bound <= 0 or not stream.messages or intake.seconds < INTAKE_SECONDS_MIN:
        return None
    bytes_each = stream.bytes / stream.messages
    rate = intake.messages / intake.seconds
    most = bound / bytes_each / age if age else None
    if rate == 0 or (most is not None and rate <= most):
        return Room(rate, most)
    seconds = max(0.0, bound - stream.bytes) / (rate * bytes_each)
    try:
        return Room(rate, most, datetime.fromtimestamp(stream.asked_at + seconds, UTC), seconds < SOON_SECONDS)
    except (OverflowError, ValueError):  # beyond the calendar
        return Room(rate, most)


async def read_intake(broker: Broker, stream: StreamState) -> Intake:
    """What a stream has taken in the last hour, or since its first message if that is younger."""
    if not stream.messages:
        return Intake(0, 0.0)
    since = max(stream.oldest_at, stream.asked_at - INTAKE_WINDOW_SECONDS)
    first: int | None = stream.first_seq
    if since > stream.oldest_at:
        at = datetime.fromtimestamp(since, UTC).isoformat().replace("+00:00", "Z")
        try:
            first = (await broker.api(f"STREAM.MSG.GET.{stream.name}", {"start_time": at}))["message"]["seq"]
        except ApiError as error:
            if error.err_code != _NO_MESSAGE:
                raise
            first = None
    taken = 0 if first is None else max(0, stream.last_seq - first + 1)
    return Intake(taken, stream.asked_at - since)
