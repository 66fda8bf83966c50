"""`seamark users`: the directory from the command line, and many users at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from engine.errors import InvalidSetting
from ops.cli.output import err, out, print_json, stages
from ops.cli.stores import urls
from ops.cli.target import DATA_FOLDER, Folder, Json, Tenant, checked_tenant
from ops.exitcode import FAILED

if TYPE_CHECKING:
    from engine.directory.bulk import Imported
    from engine.directory.changing import Directory
    from engine.directory.push_tokens import StoredToken
    from engine.directory.users import User
    from ops.users_file import Fault, UsersFile
    from projections.erasure import Deletion

EXIT_UNKNOWN = 2
FAULTS_SHOWN = 50
"""For people; `--json` prints all."""

Found = TypeVar("Found")

app = typer.Typer(help="Users of the directory: import, show, delete.", no_args_is_help=True)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CSV (with a header) or NDJSON; - is standard input.")],
    form: Annotated[
        str | None, typer.Option("--format", help="csv or ndjson; by default what the file's name ends with.")
    ] = None,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Store all users of a file, or none, with each fault and its line. What a line does not say stays as it is.

    The same file again changes nothing. Users who were deleted are passed over.

    Columns of CSV: id, email, phone, locale, timezone, attributes.<name>. A cell of an attribute that is written as a number
    (18, 12.50), true or false is one; in a column attributes.<name>:text, as attributes.zip:text, it is a text.
    """
    found = _read(file, form)
    if found.faults:
        _show_faults(file, found.faults, as_json=as_json)
        sys.exit(FAILED)
    name, total = checked_tenant(tenant), len(found.users)

    async def work(directory: Directory) -> Imported:
        from engine.directory.bulk import import_users

        with stages() as progress:
            return await import_users(directory, name, found.users, lambda done: progress("users sent", done, total))

    done = _run(folder, work)
    if as_json:
        print_json(done)
    else:
        out.print(
            f"{total} users: {done.made} made, {done.changed} changed, {done.unchanged} as they were,"
            f" {done.deleted} passed over as they were deleted"
        )


@app.command()
def show(
    user: Annotated[str, typer.Argument(help="Whose entry.")],
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Show what the directory has of a user, without his push tokens themselves; exit code 2 when it has nothing."""

    async def work(directory: Directory) -> tuple[User | None, list[StoredToken]]:
        from engine.directory.push_tokens import tokens_of
        from engine.directory.users import find_user
        from engine.postgres import asking

        async with asking(directory.pool) as connection:
            name = checked_tenant(tenant)
            return await find_user(connection, name, user), await tokens_of(connection, name, user)

    found, tokens = _run(folder, work)
    if found is None:
        err.print(f"the directory has no user {user!r}; whoever is in no directory is reached in the app", markup=False)
        sys.exit(EXIT_UNKNOWN)
    if as_json:
        print_json({"user": found, "devices": tokens})
        return
    for field in found.__struct_fields__:
        out.print(f"{field:>12}  {getattr(found, field)}", markup=False)
    for token in tokens:
        state = f"retired {token.retired_at:%Y-%m-%d}: {token.reason}" if token.retired_at is not None else "in use"
        out.print(
            f"{'device':>12}  {token.id}  {token.platform} {token.environment}  {token.app}  {state}", markup=False
        )


@app.command()
def delete(
    user: Annotated[str, typer.Argument(help="Who is deleted.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Delete a user: his entry at once; his log, receipts, inbox, deliveries and counts within minutes, by the projectors.

    It cannot be taken back. `verify-deleted` tells when nothing is left. For 31 days nothing that arrives late brings him back.
    """
    name = checked_tenant(tenant)
    if not yes:
        typer.confirm(f"Delete user {user!r} of tenant {name!r}, and all he has?", abort=True, err=True)

    async def work(directory: Directory) -> datetime:
        from engine.directory.users import checked_stored_id, delete_user

        try:
            checked_stored_id(user)
        except ValueError as error:
            raise InvalidSetting(str(error)) from error
        async with directory.changing(name, [user]) as change:
            return await delete_user(change, user)

    at = _run(folder, work)
    if as_json:
        print_json({"id": user, "deleted_at": at})
    else:
        out.print(f"deleted at {at:%Y-%m-%d %H:%M:%S}; `seamark users verify-deleted` tells what is left", markup=False)


@app.command("verify-deleted")
def verify_deleted(
    user: Annotated[str, typer.Argument(help="Who was deleted.")],
    tenant: Tenant = None,
    folder: Folder = DATA_FOLDER,
    as_json: Json = False,
) -> None:
    """Look everywhere for what is left of a user. Exit code 0: nothing is; 1: something is, or may still arrive.

    Events that are stored or wait, and dead letters, which may name others too, leave by age and are not looked at.
    """
    import uvloop

    async def run() -> tuple[Deletion | None, dict[str, int]]:
        from ops.cli.stores import stores
        from projections.erasure import Eraser, find_deletion

        name = checked_tenant(tenant)
        async with stores(folder, "seamark-users") as at:
            eraser = Eraser(at.broker, at.redis, at.pool, at.partitions)
            return await find_deletion(at.pool, name, user), await eraser.remains(name, user)

    deletion, left = uvloop.run(run())
    erased_at = deletion.erased_at if deletion is not None else None
    if as_json:
        print_json({"deleted_at": deletion and deletion.deleted_at, "erased_at": erased_at, "left": left})
    elif left:
        for place, many in left.items():
            out.print(f"{many:>8}  {place}", markup=False)
    elif deletion is None:
        out.print("nothing is stored of this user, and no deletion within the last 31 days", markup=False)
    elif erased_at is None:
        out.print(
            "nothing is left now; what was under way at the deletion may still arrive, and is erased", markup=False
        )
    else:
        out.print(f"nothing is left: erased at {erased_at:%Y-%m-%d %H:%M:%S}", markup=False)
    if left or (deletion is not None and erased_at is None):
        sys.exit(FAILED)


def _read(file: Path, form: str | None) -> UsersFile:
    from ops.users_file import FORMS, form_of, read_users

    known = form_of(file) if form is None else FORMS.get(form)
    if known is None:
        raise InvalidSetting("--format: say csv or ndjson, as the file's name ends with neither .csv nor .ndjson")
    try:
        source = sys.stdin.buffer if str(file) == "-" else file.open("rb")
        with source, stages() as progress:
            size = os.fstat(source.fileno()).st_size  # of a pipe 0
            return read_users(source, known, lambda done: progress("bytes checked", done, max(done, size)))
    except OSError as error:
        raise InvalidSetting(f"{file} cannot be read: {error.strerror}") from error


def _show_faults(file: Path, faults: list[Fault], *, as_json: bool) -> None:
    if as_json:
        for fault in faults:
            print_json(fault)
    else:
        for fault in faults[:FAULTS_SHOWN]:
            err.print(f"{file}:{fault.line}: {fault.detail}", markup=False)
        if len(faults) > FAULTS_SHOWN:
            err.print(f"… and {len(faults) - FAULTS_SHOWN} more; --json prints all")
    err.print(f"nothing was imported: mend {len(faults)} lines, then import the file again")


def _run(folder: Path, work: Callable[[Directory], Awaitable[Found]]) -> Found:
    """Do `work` on the directory of the database that the settings or the folder name."""
    import uvloop
    from redis.asyncio import Redis

    from engine.directory.changing import Directory
    from engine.profiles.cache import ProfileCache
    from engine.profiles.reader import read_profile
    from ops.postgres import opened

    url, redis_url = urls(folder)

    async def run() -> Found:
        redis = Redis.from_url(redis_url, socket_connect_timeout=2, socket_timeout=None)
        async with opened(url) as pool, redis:
            profiles = ProfileCache(redis, partial(read_profile, pool))
            try:
                return await work(Directory(pool, profiles))
            finally:
                await profiles.close()

    return uvloop.run(run())
