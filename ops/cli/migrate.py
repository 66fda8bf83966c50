"""`seamark migrate`: the schema of PostgreSQL, brought to what this version needs."""

from __future__ import annotations

from engine.errors import InvalidSetting
from ops.cli.output import out, print_json
from ops.cli.target import DATA_FOLDER, Folder, Json, postgres_url, shown


def migrate(folder: Folder = DATA_FOLDER, as_json: Json = False) -> None:
    """Bring the schema of PostgreSQL to what this version needs; loses no data, and repeating it changes nothing."""
    import uvloop

    try:
        from ops.migrate import migrate as bring
    except ModuleNotFoundError as error:
        raise InvalidSetting(
            f"{error.name} is not installed, and only this command needs it: pip install 'seamark-server[migrate]'"
        ) from error

    url = postgres_url(folder)
    done = uvloop.run(bring(url))
    if as_json:
        print_json({"database": shown(url), "before": done.before, "after": done.after})
    elif done.before == done.after:
        out.print(f"{shown(url)}: the schema is at revision {done.after}, nothing to do", markup=False)
    else:
        before = f"it was at {done.before}" if done.before else "the database had none"
        out.print(f"{shown(url)}: the schema is at revision {done.after} now, {before}", markup=False)
