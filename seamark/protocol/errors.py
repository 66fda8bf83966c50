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
