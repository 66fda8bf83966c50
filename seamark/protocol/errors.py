"""What can be wrong with what crosses a process boundary. The docstring is the default message; facts are attributes."""

from __future__ import annotations


class SeamarkError(Exception):
    """Something in Seamark failed."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class InvalidToken(SeamarkError):
    """A tenant, user or key is empty, longer than 128 bytes, or not in canonical form."""


class InvalidCursor(SeamarkError):
    """A cursor has the form <epoch>.<seq>; this one has not."""


class InvalidEvent(SeamarkError):
    """An event cannot be accepted. `reason` is a stable word, `detail` names the field and the remedy."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BadFrame(SeamarkError, ValueError):
    """This is no frame of seamark.v1. The message says which field is wrong and why; `field` names it where it is one."""

    def __init__(self, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.field = field


class UnknownOp(SeamarkError):
    """A frame has an `op` that this version does not know: the other side is newer. `id` is that of the frame, if it has one."""

    def __init__(self, op: str, id: str | None = None) -> None:
        super().__init__(f"`op` {op[:64]!r} is not known here")
        self.id = id
