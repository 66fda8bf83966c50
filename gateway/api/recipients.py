"""Recipients of an event that bring what is known of them: `{"id": "alice", "email": …}` in place of `"alice"`.

They are stored in the directory before the event is, so that whoever plans it finds them. In the event only the id stays. Over
plain NATS there are only ids, as nobody could answer there that an address is wrong: an event with more becomes a dead letter.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine.directory.users import UserFields, UserPatch, checked_user_id, merge_user, merged
from gateway.access.principals import Scope, Service
from gateway.api.directory import directory_of
from gateway.context import Context
from gateway.http.problems import FORBIDDEN, Problem
from gateway.limits import DIRECTORY_SECONDS, INLINE_RECIPIENTS_MAX
from seamark.protocol.errors import InvalidEvent


class InlineRecipient(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipient, and what is known of him: a member that is left out stays as it is stored, null takes it away."""

    id: str
    email: str | msgspec.UnsetType | None = msgspec.UNSET
    phone: str | msgspec.UnsetType | None = msgspec.UNSET
    locale: str | msgspec.UnsetType | None = msgspec.UNSET
    timezone: str | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def patch(self) -> UserPatch:
        """What is to be merged into the user."""
        return UserPatch(email=self.email, phone=self.phone, locale=self.locale, timezone=self.timezone)


SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {
                "id": {"type": "string"},
                **{
                    name: {"anyOf": [{"type": "string"}, {"type": "null"}]}
                    for name in ("email", "phone", "locale", "timezone")
                },
            },
            "required": ["id"],
            "additionalProperties": False,
        },
    ]
}
"""How a recipient is written over HTTP."""


class _Names(msgspec.Struct):
    to: list[str]


class _Given(msgspec.Struct):
    to: list[str | InlineRecipient]


_plain: Final = msgspec.json.Decoder(_Names).decode
_given: Final = msgspec.json.Decoder(_Given).decode
_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Inline:
    """The recipients of one request that bring something.

    Args:
        principal: who publishes; needs the scope `users:write` where there are any.
    """

    def __init__(self, context: Context, principal: Service) -> None:
        self._context, self._principal = context, principal
        self.found: list[InlineRecipient] = []

    def split(self, body: bytes) -> bytes:
        """The event with ids only. Most recipients bring nothing: then it is the body as it came.

        Raises:
            InvalidEvent: a recipient is not valid, or too many of the request bring something.
        """
        if body.count(b"{") < 2 or _is_plain(body):
            return body
        try:
            given, members = _given(body), _members(body)
        except msgspec.ValidationError as error:
            if "`$.to" not in str(error):
                return body  # others say better what is wrong with it
            raise InvalidEvent("schema", f"{error}; a recipient is an id, or an object with `id`") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return body
        inline = [one for one in given.to if isinstance(one, InlineRecipient)]
        if len(self.found) + len(inline) > INLINE_RECIPIENTS_MAX:
            said = f"one request may have {INLINE_RECIPIENTS_MAX} recipients with more than an id"
            raise InvalidEvent("to", f"{said}: store the others before, with PUT /v1/users/{{id}}")
        for one in inline:
            _check(one)
        self.found += inline
        ids = [one if isinstance(one, str) else one.id for one in given.to]
        return msgspec.json.encode({**members, "to": ids})

    async def store(self) -> None:
        """Have the recipients in the directory, all or none. What is stored already is not written again.

        Raises:
            Problem: the key may not change users, or there is no directory. UserDeleted: what one of them had is being erased.
            StoreUnavailable: try again.
        """
        if not self.found:
            return
        if Scope.USERS_WRITE not in self._principal.scopes:
            said = f"the API key lacks the scope {Scope.USERS_WRITE}, which recipients with more than an id need"
            raise Problem(FORBIDDEN, said, field="to")
        ids = [one.id for one in self.found]
        directory = directory_of(self._context)
        async with directory.changing(self._principal.tenant, ids, DIRECTORY_SECONDS) as change:
            for one in self.found:
                await merge_user(change, one.id, one.patch)


def _is_plain(body: bytes) -> bool:
    """Whether all recipients are ids."""
    try:
        _plain(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _check(one: InlineRecipient) -> None:
    try:
        checked_user_id(one.id)
        merged(UserFields(), one.patch)
    except ValueError as error:
        raise InvalidEvent("to", f"`to`: {error}") from error
