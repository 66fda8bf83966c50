"""`seamark seal`: secrets of webhooks in PostgreSQL, sealed by the first of the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import InvalidSetting
from engine.settings import load_settings
from ops.cli.output import out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, postgres_url

if TYPE_CHECKING:
    from engine.directory.sealing import Seal

POOL_CONNECTIONS = 1
CONNECT_SECONDS = 5.0


def seal(folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Seal the secrets of webhooks by the first of SEAMARK_STORAGE_KEYS: those stored before, and those sealed by another key."""
    import uvloop

    from engine.directory.sealing import seal_of

    settings = load_settings()
    if settings.storage_keys is None:
        raise InvalidSetting("SEAMARK_STORAGE_KEYS is not set: openssl rand -base64 32 makes a key")
    found = seal_of(settings)
    endpoints, sealed = uvloop.run(_seal(postgres_url(folder), found))
    if as_json:
        print_json({"endpoints": endpoints, "sealed": sealed, "key": found.name})
    else:
        out.print(f"{endpoints} webhook endpoints, {sealed} of them sealed anew by the key {found.name}")


async def _seal(url: str, found: Seal) -> tuple[int, int]:
    from engine.directory.webhooks import seal_anew
    from engine.postgres import lazy_pool

    pool = await lazy_pool(url, POOL_CONNECTIONS, connect_seconds=CONNECT_SECONDS)
    try:
        return await seal_anew(pool, found)
    finally:
        pool.terminate()
