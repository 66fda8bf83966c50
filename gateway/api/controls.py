"""`/v1/controls`: operators hold, drop, pause and throttle, and see what is in force."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from engine.controls import document
from engine.controls.changing import Asked, InvalidControl, TooManyChanges
from engine.controls.document import Name, Percent
from engine.controls.store import ChangedMeanwhile, ControlStore, Read
from engine.errors import BrokerError, TopologyError
from engine.plan.rules import Channel
from gateway.access.principals import Operator
from gateway.api.directory import Version
from gateway.http.endpoint import Call, Endpoint
from gateway.http.problems import INVALID_BODY, UNAVAILABLE, VERSION_CONFLICT, Kind, Problem

TOO_MANY_CHANGES: Final = Kind(429, "too_many_changes")

RETRY_SECONDS: Final = 10
"""`Retry-After` where too much was changed in a short time."""


class NewKill(msgspec.Struct, frozen=True, tag="kill", tag_field="kind", forbid_unknown_fields=True):
    """A kill switch, for all that its members name together. `hold` puts jobs back, `drop` ends them.

    `percent`, to restore it: how many of the users are let through again, always the same ones; all, if it is not said.
    """

    tenant: Name | None = None
    channel: Channel | None = None
    provider: Name | None = None
    category: Name | None = None
    mode: document.Mode = "hold"
    percent: Percent | UnsetType = UNSET

    @property
    def switch(self) -> document.Kill:
        """The kill switch that is set, or the one to restore; `percent` counts only where it is set."""
        percent = 0 if self.percent is UNSET else self.percent
        return document.Kill(self.tenant, self.channel, self.provider, self.category, self.mode, percent)


class NewPause(document.Pause, frozen=True, tag="pause", tag_field="kind", forbid_unknown_fields=True):
    """A lane that waits, of a channel or of all."""


class NewThrottle(document.Throttle, frozen=True, tag="throttle", tag_field="kind", forbid_unknown_fields=True):
    """How many events of a type (`order.shipped`, `order.*`; none: of all) a tenant's services may publish in a minute."""


class NewRehydrate(document.Rehydrate, frozen=True, tag="rehydrate", tag_field="kind", forbid_unknown_fields=True):
    """Connected devices of a user, or of all users of a tenant, read their log again: once, and stored nowhere."""


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be done, and why. `restore`: take the control off that has the same members, or let more through."""

    control: NewKill | NewPause | NewThrottle | NewRehydrate
    why: Annotated[str, Meta(min_length=1, max_length=200)]
    restore: bool = False


class ChangeQuery(msgspec.Struct, frozen=True):
    """`version`: only if the controls still have it; 0: only if there never was one."""

    version: Version | None = None


class Shown(msgspec.Struct):
    """The controls in force, the last changes, and the version of both."""

    version: int
    controls: tuple[document.InForce, ...]
    changes: tuple[document.Change, ...]


@Endpoint("GET", "/v1/controls")
async def show_controls(call: Call[Operator, None, None]) -> Shown:
    """What is in force, since when, by whom and why; and the last changes. `seamark control log` shows older ones."""
    try:
        return _shown(await ControlStore(call.context.broker).read())
    except (BrokerError, TopologyError) as error:
        raise _away(error) from error


@Endpoint("POST", "/v1/controls", refuses=(VERSION_CONFLICT, TOO_MANY_CHANGES))
async def change_controls(call: Call[Operator, ChangeQuery, Order]) -> Shown:
    """Change a control. Every process obeys within a second; one that has not heard of it says so in its readiness.

    Somebody else may change another control at the same time. Where it is the same one, the second is refused: look again.
    """
    key = call.principal.key
    asked = _asked(call.body, f"api-key {key}" if key is not None else "operator")
    try:
        return _shown(await ControlStore(call.context.broker).change(asked, version=call.query.version))
    except InvalidControl as error:
        own = (None, "why", "who")  # the others are members of the control
        field = error.field if error.field in own else f"control.{error.field}"
        raise Problem(INVALID_BODY, str(error), field=field) from error
    except TooManyChanges as error:
        raise Problem(TOO_MANY_CHANGES, str(error), retry_after_seconds=RETRY_SECONDS) from error
    except ChangedMeanwhile as error:
        raise Problem(VERSION_CONFLICT, str(error)) from error
    except (BrokerError, TopologyError) as error:
        raise _away(error) from error


def _asked(order: Order, who: str) -> Asked:
    control = order.control
    if not isinstance(control, NewKill):
        return Asked(control, who, order.why, order.restore)
    percent = control.percent if order.restore and control.percent is not UNSET else None
    return Asked(control.switch, who, order.why, order.restore, percent)


def _shown(read: Read) -> Shown:
    return Shown(read.version, read.document.controls, read.document.changes)


def _away(error: Exception) -> Problem:
    said = (
        str(error) if isinstance(error, TopologyError) else "the control bucket does not answer: look, then try again"
    )
    return Problem(UNAVAILABLE, said, error=type(error).__name__)
