"""The sessions of this process: a bound for each user, a bound for all, and the way to reach them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.close_codes import TOO_MANY_SESSIONS
from gateway.limits import SESSIONS_PER_PROCESS, SESSIONS_PER_USER

if TYPE_CHECKING:
    from gateway.session import Session


class Sessions:
    """All open sessions.

    Args:
        per_user: sessions one user may have here; one more closes the oldest with 4409.
        at_most: sessions in all; `full` says when there are as many.
    """

    def __init__(self, *, per_user: int = SESSIONS_PER_USER, at_most: int = SESSIONS_PER_PROCESS) -> None:
        self._per_user = per_user
        self._at_most = at_most
        self._all: set[Session] = set()
        self._users: dict[tuple[str, str], list[Session]] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """No further session is taken."""
        return len(self._all) >= self._at_most

    def open(self, session: Session) -> None:
        """A connection has come; who it is for is not known yet."""
        self._all.add(session)

    def admit(self, session: Session) -> None:
        """`session` belongs to its user from now on; the user's oldest makes room for it where it must."""
        mine = self._users.setdefault((session.tenant, session.user), [])
        mine.append(session)
        while len(mine) > self._per_user:
            mine[0].end(TOO_MANY_SESSIONS, f"a user may have {self._per_user} sessions; the oldest makes room")

    def leave(self, session: Session) -> None:
        """`session` is over."""
        self._all.discard(session)
        key = (session.tenant, session.user)
        mine = self._users.get(key)
        if mine is not None and session in mine:
            mine.remove(session)
            if not mine:
                del self._users[key]

    def everyone(self) -> list[Session]:
        """All sessions, as they are now."""
        return list(self._all)
