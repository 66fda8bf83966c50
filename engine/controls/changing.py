"""What a change makes of the document: pure, and where everything that is refused is refused."""

from __future__ import annotations

from typing import Final, cast

import msgspec

from engine.controls.document import (
    BYTES_MAX,
    CHANGE_SECONDS_MIN,
    CHANGES_KEPT,
    Action,
    Change,
    Control,
    Document,
    InForce,
    Kill,
    Pause,
    Rehydrate,
    Throttle,
)
from seamark.protocol.errors import InvalidToken, SeamarkError
from seamark.protocol.subjects import check_type, encode_token, encode_user

_encode: Final = msgspec.json.Encoder().encode


class InvalidControl(SeamarkError):
    """A change that cannot be made. `field` is the member at fault; the message names it, and the remedy."""

    def __init__(self, field: str | None, detail: str) -> None:
        super().__init__(detail)
        self.field = field


class TooManyChanges(SeamarkError):
    """There is no room for another control, or for another change at this moment. The message says what to do."""


class Asked(msgspec.Struct, frozen=True):
    """What somebody asks for.

    Args:
        target: the control to set or to restore, or what is to be done once.
        restore: take `target` off, or let more through.
        percent: of the users who are let through by a kill switch that is restored, in place of `Kill.percent`; None: all.
    """

    target: Control | Rehydrate
    who: str
    why: str
    restore: bool = False
    percent: int | None = None

    @property
    def action(self) -> Action:
        """What is done, in a word."""
        return "restore" if self.restore else cast("Action", self.target.__struct_config__.tag)


def change(document: Document, asked: Asked, *, id: str, now: float) -> Document:
    """The document with what was asked for.

    Args:
        id: of the change.
        now: Unix time.

    Raises:
        InvalidControl: it names nothing that there is, or cannot be.
        TooManyChanges: there is no room.
    """
    check(asked.target)
    _check_text(asked)
    if isinstance(asked.target, Rehydrate):
        return _with_change(document, asked, document.controls, asked.target, None, id, now)
    found = document.find(asked.target.scope)
    if asked.restore and found is None:
        raise InvalidControl(None, f"{asked.target.name} is not in force: `seamark control show` lists what is")
    after = _restored(found.control, asked.percent) if asked.restore and found else asked.target
    others = tuple(each for each in document.controls if each is not found)
    kept = others if after is None else (*others, InForce(after, now, asked.who, asked.why))
    return _with_change(document, asked, kept, after, found.control if found else None, id, now)


def check(target: Control | Rehydrate) -> None:
    """Pass what can be obeyed.

    Raises:
        InvalidControl: otherwise.
    """
    match target:
        case Kill():
            _check_kill(target)
        case Throttle():
            _check_name("tenant", target.tenant)
            if target.type is not None:
                _check_pattern(target.type)
        case Rehydrate():
            _check_name("tenant", target.tenant)
            if target.user is not None:
                _check_name("user", target.user)
        case Pause():
            if target.channel == "inapp":
                said = "`channel` inapp has no lanes: what is stored is shown at once. Leave it out to pause the lane of all"
                raise InvalidControl("channel", said)


def _check_kill(kill: Kill) -> None:
    for field, name in (("provider", kill.provider), ("category", kill.category)):
        if name is not None and not name.isprintable():
            raise InvalidControl(field, f"`{field}` must be printable")
    if not kill.name:
        said = "a kill switch names at least one of `tenant`, `channel`, `provider` and `category`"
        raise InvalidControl("tenant", said)
    if kill.channel == "inapp":
        said = "`channel` inapp cannot be killed, as records are always stored: throttle those who publish"
        raise InvalidControl("channel", said)
    if kill.tenant is not None:
        _check_name("tenant", kill.tenant)


def _check_name(field: str, name: str) -> None:
    if "\0" in name:  # PostgreSQL cannot hold it, and so `control_log` could not
        raise InvalidControl(field, f"`{field}` holds a NUL")
    try:
        encode_user(name) if field == "user" else encode_token(name)
    except InvalidToken as error:
        raise InvalidControl(field, f"`{field}`: {error}") from error


def _check_pattern(pattern: str) -> None:
    try:
        check_type(pattern.removesuffix(".*"))
    except InvalidToken as error:
        raise InvalidControl("type", f"`type`: {error}; `order.*` stands for all that begin with `order.`") from error


def _check_text(asked: Asked) -> None:
    for field, text in (("why", asked.why), ("who", asked.who)):
        if not text.strip() or len(text) > 200:
            raise InvalidControl(
                field, f"`{field}` must be 1 to 200 characters: it is what others will read in the log"
            )
        if not text.isprintable():
            raise InvalidControl(field, f"`{field}` must be one printable line")


def _restored(found: Control, percent: int | None) -> Control | None:
    """What is left of a control; None: nothing."""
    if percent is None:
        return None
    if not isinstance(found, Kill):
        raise InvalidControl("percent", "`percent`: only kill switches are restored step by step: leave it out")
    if not 0 <= percent <= 100:
        raise InvalidControl("percent", f"`percent` must be 0 to 100, not {percent}")
    if percent <= found.percent:
        said = f"`percent` is {found.percent} already: restore more (100, or none said: all), or set the switch anew"
        raise InvalidControl("percent", f"{said} to let fewer through")
    return None if percent == 100 else msgspec.structs.replace(found, percent=percent)


def _with_change(
    document: Document,
    asked: Asked,
    controls: tuple[InForce, ...],
    after: Control | Rehydrate | None,
    before: Control | None,
    id: str,
    now: float,
) -> Document:
    changes = document.changes
    # One from the future was made by a clock that is wrong: it must not keep everybody from changing anything until then.
    if len(changes) >= CHANGES_KEPT and 0 <= now - changes[-CHANGES_KEPT].at < CHANGE_SECONDS_MIN:
        raise TooManyChanges(f"more than {CHANGES_KEPT} changes in {CHANGE_SECONDS_MIN:g} s: wait a moment")
    number = changes[-1].number + 1 if changes else 1
    made = Change(id, number, now, asked.who, asked.why, asked.action, after, before)
    changed = Document(controls, (*changes, made)[-CHANGES_KEPT:])
    if len(_encode(changed)) > BYTES_MAX:
        raise TooManyChanges("there is no room for another control: restore some that are no longer needed")
    return changed
