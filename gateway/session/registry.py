"""The sessions of this process: a bound for each user, a bound for all, and the way to reach them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.limits import SESSIONS_PER_PROCESS, SESSIONS_PER_USER
from seamark.protocol.close_codes import TOO_MANY_SESSIONS, CloseCode


class Member(Protocol):
    """A session, as the registry knows it."""

    tenant: str
    user: str
    device: str
    carrier: str
    id: str
    issued_at: float

    @property
    def heard_at(self) -> float:
        """When its client last showed life."""

    def now(self, frame: bytes) -> None:
        """Send it a message that is never stored."""

    def end(self, code: CloseCode, detail: str) -> None:
        """Close it."""

    def rehydrate(self) -> None:
        """Have it read its log again."""

    def bye(self, retry_after_ms: int) -> None:
        """Close it as the process leaves."""


class Sessions:
    """All open sessions.

    Args:
        per_user: sessions that one user may have here, and as many polls beside them; `one_too_many` says which one goes.
        at_most: sessions in all; `full` says when there are as many.
    """

    def __init__(self, *, per_user: int = SESSIONS_PER_USER, at_most: int = SESSIONS_PER_PROCESS) -> None:
        self._per_user = per_user
        self._at_most = at_most
        self._all: set[Member] = set()
        self._users: dict[tuple[str, str, bool], list[Member]] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """No further session is taken."""
        return len(self._all) >= self._at_most

    def open(self, session: Member) -> None:
        """A connection has come; who it is for is not known yet."""
        self._all.add(session)

    def admit(self, session: Member) -> None:
        """`session` belongs to its user from now on; another one of the user makes room for it where it must."""
        mine = self._users.setdefault(_key(session), [])
        mine.append(session)
        if len(mine) > self._per_user:
            one_too_many(mine).end(TOO_MANY_SESSIONS, f"a user may have {self._per_user} sessions, and has a newer one")

    def leave(self, session: Member) -> None:
        """`session` is over."""
        self._all.discard(session)
        key = _key(session)
        mine = self._users.get(key)
        if mine is not None and session in mine:
            mine.remove(session)
            if not mine:
                del self._users[key]

    def of_user(self, tenant: str, user: str) -> list[Member]:
        """The sessions of a user."""
        return [session for polls in (False, True) for session in self._users.get((tenant, user, polls), ())]

    def of_tenant(self, tenant: str) -> list[Member]:
        """The sessions of all users of a tenant."""
        return [session for key, mine in self._users.items() if key[0] == tenant for session in mine]

    def everyone(self) -> list[Member]:
        """All sessions, as they are now."""
        return list(self._all)


def _key(session: Member) -> tuple[str, str, bool]:
    """The sessions with this key share a bound. Polls have one of their own: they come and go, and must end no session."""
    return session.tenant, session.user, session.carrier == "poll"


def one_too_many(sessions: Sequence[Member]) -> Member:
    """The session of a user that makes room for the newest one, which is the last in `sessions`.

    It is the oldest of the same device: a phone that reconnects again and again leaves dead connections behind, and must
    not stop the desktop. Else it is the one that was silent for longest: its client is the likeliest to be gone.
    """
    *older, newest = sessions
    of_device = next((session for session in older if session.device == newest.device), None)
    return of_device or min(older, key=lambda session: session.heard_at, default=newest)
