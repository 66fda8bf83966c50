"""A campaign as a service asks for it: what is sent, to whom, how fast and when. Everything is checked before it is stored."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from seamark.protocol.errors import InvalidEvent, InvalidToken, SeamarkError
from seamark.protocol.events import Channels, Encoded, Label, Priority, encode
from seamark.protocol.moments import check_moment
from seamark.protocol.subjects import bulk_subject, encode_user

ID_CHARS_MAX: Final = 100
"""A page's event is called `<campaign>:<page>`, and that must be an ordering key: 128 bytes once encoded."""

USERS_MAX: Final = 50_000
"""Users that an audience may name one by one: their names are kept in one row. Larger ones are topics or segments."""

CONDITIONS_MAX: Final = 16
"""Conditions of a segment: each is looked at for each user."""

RATE_MAX: Final = 1_000_000
"""Recipients a second: more than any installation can do, and still a number whose seconds can be calculated with."""

_ID: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{ID_CHARS_MAX}}}", re.ASCII)
_PAGES_MAX: Final = 10**9

Scalar = str | int | float | bool
Op = Literal["eq", "ne", "in", "lt", "le", "gt", "ge", "exists"]


class InvalidCampaign(SeamarkError):
    """A campaign cannot be as it was asked for. `field` names the member at fault; the message says the remedy."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a user's attribute must be. A user without the attribute meets no condition but `ne` and `exists: false`.

    Args:
        attribute: its name among the user's attributes; `locale` and `timezone` are the user's own.
        op: `lt`, `le`, `gt`, `ge` compare numbers with numbers and texts with texts; `in` takes a list, `exists` true or false.
    """

    attribute: Label
    op: Op
    value: Scalar | Annotated[list[Scalar], Meta(min_length=1, max_length=100)]

    def __post_init__(self) -> None:
        """Raise ValueError where the value does not go with `op`."""
        if (self.op == "in") != isinstance(self.value, list):
            raise ValueError("`value` is a list for `in`, and no list for all others")
        if (self.op == "exists") and not isinstance(self.value, bool):
            raise ValueError("`exists` takes true or false")
        if self.op in ("lt", "le", "gt", "ge") and (isinstance(self.value, bool) or not isinstance(self.value, Scalar)):
            raise ValueError(f"`{self.op}` takes a number or a text")


class Audience(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Whom a campaign is for: exactly one of these.

    Args:
        topic: the members of a topic.
        segment: the users of the directory who meet all conditions.
        users: these users, in the directory or not.
        everyone: all users of the directory.
    """

    topic: Label | None = None
    segment: Annotated[tuple[Condition, ...], Meta(min_length=1, max_length=CONDITIONS_MAX)] | None = None
    users: Annotated[tuple[str, ...], Meta(max_length=USERS_MAX)] | None = None
    everyone: bool | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless one is given."""
        if sum(given is not None for given in (self.topic, self.segment, self.users, self.everyone)) != 1:
            raise ValueError("give exactly one of `topic`, `segment`, `users`, `everyone`")
        if self.everyone is False:
            raise ValueError("`everyone` can only be true")


class Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What everybody of the audience gets; the members are those of an event."""

    type: str
    data: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    category: Label | None = None
    priority: Priority | None = None
    collapse_key: Label | None = None
    expires_at: datetime | None = None
    channels: Channels | None = None


class Draft(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A campaign as it was asked for.

    Args:
        id: chosen by the service; asking for the same campaign again changes nothing.
        exclude: who gets nothing although the audience holds them.
        rate: recipients a second, at most; none: as fast as dispatchers can.
        start_at: nothing is sent before it. not_after: no page is begun after it.
    """

    id: str
    audience: Audience
    message: Message
    exclude: Audience | None = None
    rate: Annotated[int, Meta(ge=1, le=RATE_MAX)] | None = None
    start_at: datetime | None = None
    not_after: datetime | None = None

    def check(self, tenant: str) -> None:
        """Everything that could fail later.

        Raises:
            InvalidCampaign: with the member and the remedy.
        """
        if _ID.fullmatch(self.id) is None:
            raise InvalidCampaign("id", f"`id` must be 1 to {ID_CHARS_MAX} letters, digits, _ and -")
        for field, moment in (("start_at", self.start_at), ("not_after", self.not_after)):
            try:
                check_moment(field, moment)
            except ValueError as error:
                raise InvalidCampaign(field, str(error)) from error
        if self.audience.users == ():
            raise InvalidCampaign("audience.users", "`audience.users` names nobody: give at least one user")
        if self.exclude is not None and self.exclude.everyone:
            raise InvalidCampaign("exclude.everyone", "`exclude` leaves nobody: name a topic, a segment or users")
        for field, audience in (("audience", self.audience), ("exclude", self.exclude)):
            _check_names(field, audience)
        try:
            page_event(tenant, self.id, self.message, _PAGES_MAX, ["someone"])
        except InvalidEvent as error:
            raise InvalidCampaign(f"message.{error.reason}", error.detail) from error
        if self.start_at is not None:
            self.check_time(self.start_at)

    def check_time(self, now: datetime) -> None:
        """Whether it could still be sent at this moment.

        Raises:
            InvalidCampaign: nobody would ever get it.
        """
        for field, moment in (("not_after", self.not_after), ("message.expires_at", self.message.expires_at)):
            if moment is not None and moment <= now:
                raise InvalidCampaign(
                    field, f"`{field}` must be later than `start_at` and than now: else nobody gets it"
                )


def _check_names(field: str, audience: Audience | None) -> None:
    if audience is None:
        return
    if b"\\u0000" in msgspec.json.encode(audience):
        raise InvalidCampaign(field, f"`{field}`: a text with a NUL cannot be stored")
    for index, user in enumerate(audience.users or ()):
        try:
            encode_user(user)
        except InvalidToken as error:
            raise InvalidCampaign(f"{field}.users[{index}]", f"`{field}.users[{index}]`: {error}") from error


def page_event(
    tenant: str, campaign: str, message: Message, number: int, to: list[str], *, stored: bool = False, **inside: Any
) -> Encoded:
    """The event of a page, on its subject below `bulk.`.

    Its ordering key is its own id, so that pages spread over partitions. `transaction_id` is what all pages have in common.

    Args:
        stored: the campaign was accepted before, perhaps by an earlier version.
        inside: what else is noted about the page, in the event's member `campaign`.

    Raises:
        InvalidEvent: a dispatcher would refuse it; or, unless `stored`, nobody may publish it any more.
    """
    fields = {name: getattr(message, name) for name in _PASSED_ON}
    id = event_id(campaign, number)
    event = encode(
        to=to,
        type=message.type,
        tenant=tenant,
        data=message.data,
        id=id,
        key=id,
        unknown={"campaign": {"id": campaign, "page": number, **inside}},
        transaction_id=transaction_id(campaign),
        stored=stored,
        **fields,
    )
    return event._replace(subject=bulk_subject(tenant, id, message.type))


_PASSED_ON: Final = ("category", "priority", "collapse_key", "expires_at", "channels")


def event_id(campaign: str, number: int) -> str:
    """The id of a page's event, and so of everybody's notification of that page."""
    return f"{campaign}:{number}"


def transaction_id(campaign: str) -> str:
    """What all events of a campaign belong to: by it they are cancelled and recalled."""
    return f"campaign:{campaign}"
