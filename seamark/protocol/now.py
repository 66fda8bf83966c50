"""Now messages: what is shown to whoever is connected and never stored (`at_most_once`): typing, presence, a maintenance soon.

One user's go over core NATS on `now.<tenant>.<user>.<type>`, those for everybody of a tenant on `broadcast.<tenant>.<type>`. Who
may publish there decides the broker, by the tenant in the subject; everything else is checked by whoever passes them on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from seamark.protocol.errors import InvalidEvent, InvalidToken
from seamark.protocol.events import Event, check_data, check_event_moment, is_event_id, new_event_id
from seamark.protocol.frames import NowFrame
from seamark.protocol.frames import encode as encode_frame
from seamark.protocol.limits import EVENT_ID_BYTES_MAX, NOW_BYTES_MAX, NOW_RECIPIENTS_MAX
from seamark.protocol.records import one_line
from seamark.protocol.subjects import check_type, decode_token, encode_token, encode_user

MEANINGLESS: Final = ("channels", "collapse_key", "ordering_key", "send_at", "transaction_id")
"""Fields of an event that promise something which only stored events can keep."""

_REMEDY: Final = "`at_most_once` messages are never stored"


class NowMessage(msgspec.Struct):
    """The body of a now message. Other members are passed over."""

    id: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")
    expires_at: datetime | None = None


class Passing(NamedTuple):
    """A now message on its way: where it is published, and its bytes."""

    subject: str
    payload: bytes


_decode: Final = msgspec.json.Decoder(NowMessage).decode


def encode(
    *, to: Sequence[str], type: str, tenant: str, id: str | None = None, data: Any = None, fields: Mapping[str, Any]
) -> list[Passing]:
    """One message for each user.

    Args:
        fields: the other fields of the event.

    Raises:
        InvalidEvent: with the field and the remedy.
    """
    for name in MEANINGLESS:
        if fields.get(name) is not None:
            raise InvalidEvent(name, f"`{name}` can be kept for stored events only, and {_REMEDY}: leave it out")
    if not 1 <= len(to) <= NOW_RECIPIENTS_MAX:
        raise InvalidEvent(
            "to", f"`to` names {len(to)} users, 1 to {NOW_RECIPIENTS_MAX} are allowed at a time, as {_REMEDY}"
        )
    payload = _payload(type, id, data, fields)
    try:
        subjects = [f"now.{encode_token(tenant)}.{encode_user(user)}.{check_type(type)}" for user in dict.fromkeys(to)]
    except InvalidToken as error:
        raise InvalidEvent("subject", str(error)) from error
    return [Passing(subject, payload) for subject in subjects]


def encode_broadcast(*, type: str, tenant: str, id: str | None = None, data: Any = None) -> Passing:
    """The message for all who are connected.

    Raises:
        InvalidEvent: with the field and the remedy.
    """
    payload = _payload(type, id, data, {})
    try:
        return Passing(f"broadcast.{encode_token(tenant)}.{check_type(type)}", payload)
    except InvalidToken as error:
        raise InvalidEvent("type", str(error)) from error


def _payload(type: str, id: str | None, data: Any, fields: Mapping[str, Any]) -> bytes:
    body = {"id": id or new_event_id(), **{name: value for name, value in fields.items() if value is not None}}
    if data is not None:
        body["data"] = data
    try:
        payload = msgspec.json.encode(body)
    except (TypeError, ValueError, msgspec.EncodeError) as error:
        raise InvalidEvent("json", f"the message cannot be written as JSON: {error}") from error
    frame_of(type, payload)
    return payload


def frame_of(type: str, payload: bytes, now: datetime | None = None) -> bytes | None:
    """The frame that devices get; None: the message has expired by `now`.

    Raises:
        InvalidEvent: the message is not as it should be.
    """
    if len(payload) > NOW_BYTES_MAX:
        raise InvalidEvent("size", f"the message has {len(payload)} bytes, at most {NOW_BYTES_MAX} are allowed")
    try:
        payload.decode()  # a browser would close the socket on broken UTF-8
        message = _decode(payload)
    except msgspec.ValidationError as error:
        raise InvalidEvent("schema", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent("json", f"the body is not JSON in UTF-8, or nested too deeply: {error}") from error
    if message.id is not None and not is_event_id(message.id):
        raise InvalidEvent("id", f"`id` must be 1 to {EVENT_ID_BYTES_MAX} printable ASCII characters without blanks")
    check_data(bytes(message.data))
    expires_at = message.expires_at
    if expires_at is not None:
        check_event_moment("expires_at", expires_at)
    if expires_at is not None and now is not None and expires_at <= now:
        return None
    return encode_frame(NowFrame(type, one_line(message.data), message.id))


class NowSubject(NamedTuple):
    """Whom a message is for, as tokens, and its type."""

    tenant: str
    user: str
    type: str


def parse_subject(subject: bytes) -> NowSubject:
    """The parts of `now.<tenant>.<user>.<type>`.

    Raises:
        InvalidToken: a part is not canonical, or no user can be called so.
    """
    try:
        _, tenant, user, type = subject.decode().split(".", 3)
    except ValueError as error:  # UnicodeDecodeError is one
        raise InvalidToken("not the subject of a now message") from error
    decode_token(tenant)
    encode_user(decode_token(user))
    return NowSubject(tenant, user, check_type(type))


def parse_broadcast(subject: bytes) -> tuple[str, str]:
    """Tenant, as text, and type of `broadcast.<tenant>.<type>`.

    Raises:
        InvalidToken: a part is not canonical.
    """
    try:
        _, tenant, type = subject.decode().split(".", 2)
    except ValueError as error:
        raise InvalidToken("not the subject of a broadcast") from error
    return decode_token(tenant), check_type(type)


def is_now(event: Event) -> bool:
    """Whether it is one that is never stored."""
    return event.semantics == "at_most_once"


def utc_now() -> datetime:
    """What expiry is compared with."""
    return datetime.now(UTC)
