"""Every error the engine raises on purpose. The docstring is the default message; facts are attributes."""

from __future__ import annotations

from seamark.protocol.errors import SeamarkError


class InvalidSetting(SeamarkError):
    """A setting is missing or malformed. The message names the variable and the remedy."""


class BrokerError(SeamarkError):
    """The broker did not do what was asked."""


class Unanswered(BrokerError):
    """The broker did not answer before the deadline: the outcome is unknown."""


class Unavailable(BrokerError):
    """Nobody answers for this subject or stream right now: nothing was stored."""


class OtherIncarnation(BrokerError):
    """The stream is another incarnation than the one this was meant for: nothing was stored."""


class ApiError(BrokerError):
    """The broker refused a request. `code` is HTTP-like, `err_code` the server's own number."""

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(f"{description} ({err_code or code})")
        self.code = code
        self.err_code = err_code
        self.description = description


class Forbidden(ApiError):
    """The broker does not let this user publish or subscribe there; nothing was done."""

    def __init__(self, description: str) -> None:
        super().__init__(403, 0, description)


class TopologyError(SeamarkError):
    """Streams on the server are not what this process needs. The message ends with the remedy."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(f"{detail}. {remedy}")
        self.detail = detail
        self.remedy = remedy


class StepDown(SeamarkError):
    """Another process owns this partition now, or its streams changed: stop working on it and wait as a standby."""


class PartitionStopped(TopologyError):
    """This partition cannot go on by itself; an operator has to repair it."""


class StoreUnavailable(SeamarkError):
    """A store (PostgreSQL, Redis) does not answer."""


class StoreBroken(StoreUnavailable):
    """The store answers what no outage explains: a constraint, a missing table or permission, an error of ours.

    A reader treats it as an outage. A writer stops, because trying again for ever would hide the fault.
    """

    def __init__(self, message: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = (
            remedy or "Mend what it names, or report it as a fault of Seamark. Then the partition goes on by itself."
        )


class VersionConflict(SeamarkError):
    """What is to be changed has another version than the caller knows. Nothing was changed.

    Attributes:
        version: what it has; 0: there is none.
    """

    def __init__(self, what: str, version: int) -> None:
        there = f"has version {version}" if version else "does not exist"
        super().__init__(f"{what} {there}: read it again, and repeat the change with the version that you see")
        self.version = version


class LimitReached(SeamarkError):
    """A tenant, or a user, may have only so many of these. Nothing was changed. The message names the number and the remedy."""
