"""Events: what services publish. Decoding is strict about what we act on and lenient about what we do not know.

Names follow CloudEvents. Tenant, ordering key and type come from the subject, which the broker has authorised; a body that
disagrees is refused, or a service allowed to publish for one tenant could write another's name into its records.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from seamark.protocol import subjects
from seamark.protocol.errors import InvalidEvent, InvalidToken
from seamark.protocol.limits import (
    CHANNELS_MAX,
    DATA_DEPTH_MAX,
    EVENT_BYTES_MAX,
    EVENT_DATA_BYTES_MAX,
    EVENT_ID_BYTES_MAX,
    FANOUT_BYTES_MAX,
    LABEL_CHARS_MAX,
    RECIPIENTS_MAX,
    SEND_AHEAD_SECONDS_MAX,
)
from seamark.protocol.moments import check_moment
from seamark.protocol.unfit import Unfit, pass_over

Priority = Literal["critical", "high", "normal", "low"]
Semantics = Literal["at_most_once", "at_least_once", "effectively_once"]
Label = Annotated[str, msgspec.Meta(max_length=LABEL_CHARS_MAX)]
EventId = Annotated[str, msgspec.Meta(max_length=EVENT_ID_BYTES_MAX)]
INAPP = "inapp"
"""The channel that shows a record on connected devices."""

CHANNELS: Final = (INAPP, "push", "email", "sms", "webhook")
"""What an event may name as its `channels`."""

_ALL_CHANNELS: Final = dict.fromkeys(CHANNELS)

Channels = Annotated[
    list[Annotated[Label, msgspec.Meta(extra_json_schema={"enum": list(CHANNELS)})]],
    msgspec.Meta(max_length=CHANNELS_MAX, extra_json_schema={"minItems": 1}),
]

NOT_HERE = (
    "`at_most_once` messages are never stored, so not by bulk or on events.>: use the SDK, `POST /v1/events`, "
    "or on now.<tenant>.<user>.<type>"
)

_TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE = re.compile(rb"[\x20-\x7e]{1,512}")
_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')
_EMPTY = msgspec.Raw(b"{}")


class Event(msgspec.Struct, kw_only=True):
    """An event as a service wrote it. Fields are only ever appended; unknown ones stay in the stored bytes."""

    id: str
    to: list[str]
    data: msgspec.Raw = _EMPTY
    source: str | None = None
    time: datetime | None = None
    tenant: str | None = None
    type: str | None = None
    subject: str | None = None
    priority: Priority = "normal"
    category: Label | None = None
    semantics: Semantics = "at_least_once"
    ordering_key: str | None = None
    collapse_key: Label | None = None
    expires_at: datetime | None = None
    send_at: datetime | None = None
    channels: Channels | None = None
    transaction_id: str | None = None


class Recipient(msgspec.Struct, frozen=True, gc=False):
    """A user an event is for, as text and as the token that orders recipients."""

    token: str
    user: str


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """An event that passed every check, with what its subject says and its recipients once each, by token.

    Attributes:
        unfit: what earlier versions let pass in it, each as whoever publishes such an event is told (`unfit.pass_over`).
    """

    event: Event
    at: subjects.EventSubject
    recipients: list[Recipient]
    traceparent: bytes
    tracestate: bytes
    unfit: tuple[Unfit, ...] = ()


class Encoded(NamedTuple):
    """An event ready to publish. `critical`: its priority is."""

    subject: str
    payload: bytes
    msg_id: str
    critical: bool = False


_decode = msgspec.json.Decoder(Event).decode
_decode_data = msgspec.json.Decoder(Any).decode


STEP_USERS: Final = 1000
"""Users of an event who are looked at in one step: 2 ms on an idle core."""


def accept(
    stored_subject: str,
    payload: bytes,
    traceparent: bytes | None = None,
    tracestate: bytes | None = None,
    recipients: list[Recipient] | None = None,
) -> Accepted:
    """The event stored under `ev.<q>.<tenant>.<key>.<type>`, checked in every respect that could fail later.

    What earlier versions let pass is passed over, and told in `unfit`.

    Args:
        recipients: what `recipients_by_steps` made of `payload`.

    Raises:
        InvalidEvent: with a stable `reason` for the dead letter and a `detail` that names the field and the remedy.
    """
    try:
        at = subjects.parse_stored_event(stored_subject)
    except InvalidToken as error:
        raise InvalidEvent("subject", str(error)) from error
    event, wrong = _read(payload)
    _check_identity(event, at)
    recipients = recipients or _recipients(event, at)
    trace = traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else b""
    state = tracestate if trace and tracestate and _TRACESTATE.fullmatch(tracestate) else b""
    return Accepted(event, at, recipients, trace, state, wrong)


def _read(payload: bytes) -> tuple[Event, tuple[Unfit, ...]]:
    event = _decoded(payload)
    return event, pass_over(event, payload, _ALL_CHANNELS)


def _decoded(payload: bytes) -> Event:
    try:
        if not payload.isascii():
            # msgspec skips over `data` without looking at its text; a browser would close the socket on broken UTF-8.
            payload.decode()
        return _decode(payload)
    except msgspec.ValidationError as error:
        raise InvalidEvent("schema", f"{error}; see the event fields in docs/protocol.md") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent("json", f"the body is not JSON in UTF-8, or nested too deeply: {error}") from error


def _check_identity(event: Event, at: subjects.EventSubject) -> None:
    if not is_event_id(event.id):
        raise InvalidEvent("id", f"`id` must be 1 to {EVENT_ID_BYTES_MAX} printable ASCII characters without blanks")
    if event.tenant is not None or event.type is not None or event.ordering_key is not None:
        _check_agreement(event, at)
    if event.semantics == "at_most_once":
        raise InvalidEvent("semantics", NOT_HERE)
    if event.send_at is not None:
        check_event_moment("send_at", event.send_at)
    if event.transaction_id is not None:
        _check_transaction(event.transaction_id)
    if event.time is not None:
        check_event_moment("time", event.time)
    if event.expires_at is not None:
        check_event_moment("expires_at", event.expires_at)
    check_data(bytes(event.data))


def check_data(data: bytes) -> None:
    """Pass `data`, some valid JSON, that is small and flat enough for all who read it, and has no number that they cannot read.

    Raises:
        InvalidEvent: it is not.
    """
    size = len(data)
    if size > EVENT_DATA_BYTES_MAX:
        raise InvalidEvent("data", f"`data` has {size} bytes, at most {EVENT_DATA_BYTES_MAX} are allowed")
    # A level has an opening and a closing bracket.
    deep = size > 2 * DATA_DEPTH_MAX and data.count(b"[") + data.count(b"{") > DATA_DEPTH_MAX
    if deep and _depth(data) > DATA_DEPTH_MAX:
        raise InvalidEvent("data", f"`data` is nested more than {DATA_DEPTH_MAX} levels deep")
    try:
        # Read as workers read it: 0.1 to 3 us for 1 KB. To search it for such numbers took several times as long.
        _decode_data(data)
    except msgspec.DecodeError as error:
        raise InvalidEvent(
            "data", f"`data` holds a number that is out of range: send it as a text ({error})"
        ) from error


def _check_transaction(transaction: str) -> None:
    try:
        subjects.encode_token(transaction)
    except InvalidToken as error:
        raise InvalidEvent("transaction_id", f"`transaction_id`: {error}") from error


def _check_agreement(event: Event, at: subjects.EventSubject) -> None:
    for name, said, meant in (
        ("tenant", event.tenant, at.tenant),
        ("type", event.type, at.type),
        ("ordering_key", event.ordering_key, at.key),
    ):
        if said is not None and said != meant:
            raise InvalidEvent(
                "disagreement", f"`{name}` is {said[:80]!r} but the subject says {meant[:80]!r}: leave it out"
            )


def check_event_moment(name: str, moment: datetime) -> None:
    """As `check_moment`.

    Raises:
        InvalidEvent: the moment does not pass.
    """
    try:
        check_moment(name, moment)
    except ValueError as error:
        raise InvalidEvent(name, str(error)) from error


def check_send_at(event: Event, now: datetime) -> None:
    """Refuse what is to be sent too far ahead of `now`.

    Raises:
        InvalidEvent: with the remedy.
    """
    if event.send_at is not None and event.send_at > now + timedelta(seconds=SEND_AHEAD_SECONDS_MAX):
        days = SEND_AHEAD_SECONDS_MAX // 86_400
        raise InvalidEvent("send_at", f"`send_at` lies more than {days} days ahead: publish the event later")


def _depth(data: bytes) -> int:
    """How deep arrays and objects are nested in valid JSON."""
    depth = deepest = 0
    for found in _BRACKET.finditer(data):
        first = data[found.start()]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    return deepest


def recipients_by_steps(payload: bytes) -> Generator[None, None, list[Recipient] | None]:
    """The recipients of an event for very many, for `accept`; between two steps, of a millisecond or two, others may be served.

    None: there is something wrong with the event, and `accept` says what.
    """
    try:
        return (yield from _by_steps(_read(payload)[0]))
    except InvalidEvent:
        return None


def _recipients(event: Event, at: subjects.EventSubject) -> list[Recipient]:
    """The users named, once each, in the byte order of their tokens: the order in which a mark counts them."""
    if len(event.to) == 1:
        [user] = event.to
        # A personal event's key is its user, whose token stands in the subject.
        personal = user == at.key and not user.startswith(subjects.NO_USERS)
        return [Recipient(at.key_token if personal else _tokens(event.to)[0], user)]
    steps = _by_steps(event)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: list[Recipient] = end.value
            return found


def _by_steps(event: Event) -> Generator[None, None, list[Recipient]]:
    if not event.to:
        raise InvalidEvent("to", "`to` names nobody: give at least one user")
    if len(event.to) > RECIPIENTS_MAX:
        raise InvalidEvent("to", f"`to` names {len(event.to)} users, at most {RECIPIENTS_MAX} are allowed in one event")
    found: dict[str, str] = {}
    for start in range(0, len(event.to), STEP_USERS):
        some = event.to[start : start + STEP_USERS]
        found.update(zip(_tokens(some), some, strict=True))
        yield
    if len(bytes(event.data)) * len(found) > FANOUT_BYTES_MAX:
        raise InvalidEvent("to", f"`to` times `data` is above {FANOUT_BYTES_MAX >> 20} MiB: split the audience")
    tokens, recipients = sorted(found), list[Recipient]()
    for start in range(0, len(tokens), STEP_USERS):
        some = tokens[start : start + STEP_USERS]
        recipients += map(Recipient, some, map(found.__getitem__, some))
        yield
    return recipients


def _refuse_impossible(users: Sequence[str]) -> None:
    for user in users:
        if user.startswith(subjects.NO_USERS):
            said = f"`to` may name users only, not {user[:80]!r}"
            raise InvalidEvent("to", f"{said}: a topic is named in `POST /v1/events`, or start a campaign")


def _tokens(users: Sequence[str]) -> list[str]:
    named = "\n" + "\n".join(users)
    # One search through all names takes less than one for each. A name may hold a line break: then they are looked at one by one.
    if any(f"\n{beginning}" in named for beginning in subjects.NO_USERS):
        _refuse_impossible(users)
    try:
        return [subjects.encode_token(users[0])] if len(users) == 1 else subjects.encode_tokens(users)
    except InvalidToken as error:
        raise InvalidEvent("to", f"`to` holds an impossible user: {error}") from error


def is_event_id(text: str) -> bool:
    """Whether an event, and so a notification, can have this id: 1 to 128 printable ASCII characters without blanks."""
    # Half the time of an expression, and each event is asked. Of ASCII, what is printable are the characters from blank to tilde.
    return text.isascii() and text.isprintable() and 1 <= len(text) <= EVENT_ID_BYTES_MAX and " " not in text


def new_event_id() -> str:
    """A random id for an event whose publisher gave none."""
    return uuid.uuid4().hex


def encode(
    *,
    to: Sequence[str],
    type: str,
    tenant: str = "default",
    data: Any = None,
    id: str | None = None,
    key: str | None = None,
    unknown: Mapping[str, Any] | None = None,
    topics: bool = False,
    stored: bool = False,
    **fields: Any,
) -> Encoded:
    """An event as subject, payload and message id, refused here rather than in the dead letters.

    Args:
        to: users.
        type: dot-separated words, such as `order.shipped`.
        data: anything JSON, or `msgspec.Raw`.
        id: given by the publisher so that publishing again adds nothing; random by default.
        key: the ordering key; by default the user, or for several users the event's id (no order among events).
        unknown: members that are kept as they stand, whatever they are called.
        topics: whether `to` may name topics: it goes to a gateway, which puts their members in their place.
        stored: it was accepted before, perhaps by an earlier version, so what those let pass is let pass.
        fields: the other fields of `Event`.

    Raises:
        InvalidEvent: with the field and the remedy.
    """
    id = id if id is not None else new_event_id()
    users = list(to)
    key = key if key is not None else (users[0] if len(users) == 1 else id)
    given = {**(unknown or {}), **fields}
    body = {"id": id, "to": users, **{name: value for name, value in given.items() if value is not None}}
    if data is not None:
        body["data"] = data
    try:
        payload = msgspec.json.encode(body)
        subject = subjects.event_subject(tenant, key, type)
    except InvalidToken as error:
        raise InvalidEvent("subject", str(error)) from error
    except (TypeError, ValueError, msgspec.EncodeError) as error:
        raise InvalidEvent("json", f"the event cannot be written as JSON: {error}") from error
    if len(payload) > EVENT_BYTES_MAX - 1024:
        raise InvalidEvent("size", f"the event has {len(payload)} bytes, at most {EVENT_BYTES_MAX - 1024} are allowed")
    named = [user for user in users if not user.startswith(subjects.TOPIC)] if topics else users
    checked = payload if len(named) == len(users) else msgspec.json.encode({**body, "to": named or ["somebody"]})
    accepted = accept(subjects.stored_event(subject, 0), checked)
    if accepted.unfit and not stored:
        raise InvalidEvent(*accepted.unfit[0])
    check_send_at(accepted.event, datetime.now(UTC))
    if accepted.event.priority == "low":
        subject = subjects.bulk_subject(tenant, key, type)
    return Encoded(subject, payload, message_id(tenant, id), accepted.event.priority == "critical")


def message_id(tenant: str, event_id: str) -> str:
    """`Nats-Msg-Id` of an event: the tenant is part of it, so that tenants cannot collide. A token holds no colon."""
    return f"{subjects.encode_token(tenant)}:{event_id}"
