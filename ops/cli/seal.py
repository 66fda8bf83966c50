"""`seamark seal`: secrets of webhooks in PostgreSQL, sealed by the first of the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from engine.errors import InvalidSetting
from engine.settings import load_settings
from ops.cli.output import err, out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, postgres_url
from ops.exitcode import FAILED

if TYPE_CHECKING:
    from engine.directory.sealing import Seal
    from engine.directory.webhooks import Sealed

POOL_CONNECTIONS = 1
CONNECT_SECONDS = 5.0


def seal(folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Seal the secrets of webhooks by the first of SEAMARK_STORAGE_KEYS: those stored before, and those sealed by another key.

    Those that none of the keys opens are named, and stay as they are; the command fails then.
    """
    import uvloop

    from engine.directory.sealing import seal_of

    settings = load_settings()
    if settings.storage_keys is None:
        raise InvalidSetting("SEAMARK_STORAGE_KEYS is not set: openssl rand -base64 32 makes a key")
    found = seal_of(settings)
    done = uvloop.run(_seal(postgres_url(folder), found))
    if as_json:
        unopened = [{"why": str(one), "remedy": one.remedy} for one in done.unopened]
        print_json({"endpoints": done.endpoints, "sealed": done.sealed, "unopened": unopened, "key": found.name})
    else:
        for one in done.unopened:
            err.print(f"{one}. {one.remedy}", style="red")
        out.print(f"{done.endpoints} webhook endpoints, {done.sealed} of them sealed anew by the key {found.name}")
    if done.unopened:
        raise typer.Exit(FAILED)


async def _seal(url: str, found: Seal) -> Sealed:
    from engine.directory.webhooks import seal_anew
    from engine.postgres import lazy_pool

    pool = await lazy_pool(url, POOL_CONNECTIONS, connect_seconds=CONNECT_SECONDS)
    try:
        return await seal_anew(pool, found)
    finally:
        pool.terminate()
