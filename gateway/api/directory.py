"""What the endpoints of the directory have in common: places, connections, problems."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Final, TypeVar

import msgspec

from engine.directory.changing import Directory
from engine.directory.users import checked_stored_id, checked_user_id
from engine.postgres import Connection, asking
from gateway.access.shares import Shares
from gateway.context import Context
from gateway.http.problems import INVALID_BODY, NOT_FOUND, SEE_OPENAPI, UNAVAILABLE, Problem, field_of
from gateway.limits import DIRECTORY_REQUESTS, DIRECTORY_REQUESTS_PER_TENANT, DIRECTORY_SECONDS

PLACES: Final = Shares(DIRECTORY_REQUESTS, DIRECTORY_REQUESTS_PER_TENANT)

T = TypeVar("T")

VERSION_MAX: Final = 2**63 - 1
"""PostgreSQL's columns hold no more."""

Version = Annotated[int, msgspec.Meta(ge=0, le=VERSION_MAX)]
"""Only if this is still the version of what is there; 0: only if there is nothing."""


class StoredUserAt(msgspec.Struct, frozen=True):
    """A user in the path who is read or deleted. `version`: only if he still has it; 0: only if there is no such user."""

    id: str
    version: Version | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where nobody can be stored so."""
        checked_stored_id(self.id)


class UserAt(StoredUserAt, frozen=True):
    """A user in the path who is made or changed."""

    def __post_init__(self) -> None:
        """Raise ValueError where no user can be called so."""
        checked_user_id(self.id)


def directory_of(context: Context) -> Directory:
    """The directory, where there is one.

    Raises:
        Problem: 503, this gateway has no database.
    """
    if context.directory is None:
        raise Problem(UNAVAILABLE, "this gateway has no database: there is no directory")
    return context.directory


@asynccontextmanager
async def reading(context: Context) -> AsyncIterator[Connection]:
    """A connection for questions. Raises StoreUnavailable."""
    async with asking(directory_of(context).pool, DIRECTORY_SECONDS) as connection:
        yield connection


@contextmanager
def checked() -> Iterator[None]:
    """Answer 400 where the block finds that what was sent does not go together with what is stored."""
    try:
        yield
    except ValueError as error:
        raise Problem(INVALID_BODY, str(error) + SEE_OPENAPI, field=field_of(error)) from error


def there(found: T | None, what: str) -> T:
    """What was found.

    Raises:
        Problem: 404, nothing was.
    """
    if found is None:
        raise Problem(NOT_FOUND, f"there is no {what}")
    return found
