"""What commands about tenants and users are held against: keys, configuration, retention, the directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ops.exitcode import MISCONFIGURED
from tests.support.commandchecks.checking import answered, checks, lines
from tests.support.manual import Manual
from tests.support.waiting import wait_for


@checks("api-key create")
def _create(reader: Manual, folder: Path) -> None:
    _used_and_revoked(reader)


@checks("api-key list")
def _list(reader: Manual, folder: Path) -> None:
    made = _made(reader)
    assert made["id"] in [key["id"] for key in lines(reader.seamark("api-key", "list", "--json"))]
    assert made["key"] not in reader.seamark("api-key", "list", "--json"), "only the hash is kept"


@checks("api-key revoke")
def _revoke(reader: Manual, folder: Path) -> None:
    _used_and_revoked(reader)
    reader.seamark("api-key", "revoke", "999999", code=2)


def _made(reader: Manual) -> dict[str, Any]:
    [made] = lines(reader.seamark("api-key", "create", "--tenant", "default", "--name", "shop", "--json"))
    assert isinstance(made, dict)
    return made


def _used_and_revoked(reader: Manual) -> None:
    made, events = _made(reader), f"{reader.described.gateway_url}/v1/events"
    status, answer = answered(events, made["key"], {"to": ["dave"], "type": "demo.hello"})
    assert (status, bool(answer["event_id"])) == (202, True)
    [revoked] = lines(reader.seamark("api-key", "revoke", str(made["id"]), "--json"))
    assert revoked["revoked_at"]


@checks("config apply")
def _config_apply(reader: Manual, folder: Path) -> None:
    (folder / "types").mkdir()
    (folder / "types" / "order.*.toml").write_text("ttl_seconds = 60\n")
    words = [str(folder), "--tenant", "shop", "--json"]
    added = {"kind": "type", "name": "order.*", "action": "add"}
    assert lines(reader.seamark("config", "diff", *words, code=2)) == [added]
    assert lines(reader.seamark("config", "apply", *words)) == [added]
    assert lines(reader.seamark("config", "apply", *words)) == lines(reader.seamark("config", "diff", *words)) == []
    made = lines(reader.seamark("api-key", "create", "--tenant", "shop", "--scope", "config:read", "--json"))[0]
    status, rule = answered(f"{reader.described.gateway_url}/v1/types/order.*", made["key"])
    assert (status, rule["ttl_seconds"]) == (200, 60)
    reader.seamark("config", "apply", *words, "--prune")


@checks("config diff")
def _config_diff(reader: Manual, folder: Path) -> None:
    reader.seamark("config", "diff", str(folder), code=MISCONFIGURED)
    (folder / "tenant.toml").write_text("unknown = 1\n")
    said = reader.seamark("config", "diff", str(folder), "--json", code=MISCONFIGURED)
    assert "unknown" in lines(said)[0]["fault"]
    (folder / "tenant.toml").write_text('timezone = "Mars"\n')
    said = reader.seamark("config", "diff", str(folder), "--json", code=MISCONFIGURED)
    assert "`timezone`" in lines(said)[0]["fault"]


@checks("config export")
def _config_export(reader: Manual, folder: Path) -> None:
    (folder / "tenant.toml").write_text('timezone = "Europe/Vienna"\n')
    reader.seamark("config", "apply", str(folder), "--tenant", "exported")
    [done] = lines(reader.seamark("config", "export", str(folder / "new"), "--tenant", "exported", "--json"))
    assert [Path(path).read_text() for path in done["written"]] == ['timezone = "Europe/Vienna"\n']
    reader.seamark("config", "export", str(folder / "new"), "--tenant", "exported", code=MISCONFIGURED)


@checks("config preview")
def _config_preview(reader: Manual, folder: Path) -> None:
    words = ["config", "preview", "order.shipped", "sms", "--data", '{"title": "Shipped", "text": "10 €"}']
    [shown] = lines(reader.seamark(*words, "--json"))
    assert (shown["text"], shown["encoding"], shown["units"]) == ("Shipped\n10 €", "gsm-7", 13)
    assert "Shipped" in reader.seamark(*words)
    reader.seamark("config", "preview", "order.*", "sms", code=MISCONFIGURED)


@checks("retention list")
def _retention_list(reader: Manual, folder: Path) -> None:
    [everybody, *_] = lines(reader.seamark("retention", "list", "--json"))
    assert everybody["tenant"] is None
    assert everybody["days"] > 0


@checks("retention set")
def _retention_set(reader: Manual, folder: Path) -> None:
    [kept] = lines(reader.seamark("retention", "set", "30", "--tenant", "shop", "--json"))
    assert (kept["tenant"], kept["days"]) == ("shop", 30)
    assert kept in lines(reader.seamark("retention", "list", "--json"))
    reader.seamark("retention", "set", "0", code=2)


def _imported(reader: Manual, folder: Path, *ids: str) -> None:
    file = folder / "users.ndjson"
    file.write_text("".join(json.dumps({"id": id, "email": f"{id}@example.com"}) + "\n" for id in ids))
    reader.seamark("users", "import", str(file))


@checks("users import")
def _users_import(reader: Manual, folder: Path) -> None:
    file = folder / "people.csv"
    file.write_text("id,email\nzoe,zoe@example.com\nyves,nobody\n")
    [fault] = lines(reader.seamark("users", "import", str(file), "--json", code=1))
    assert (fault["line"], fault["field"]) == (3, "email")
    reader.seamark("users", "show", "zoe", code=2)
    file.write_text("id,email\nzoe,zoe@example.com\nyves,yves@example.com\n")
    for made in (2, 0):
        [done] = lines(reader.seamark("users", "import", str(file), "--json"))
        assert (done["made"], done["unchanged"]) == (made, 2 - made)
    reader.seamark("users", "import", str(folder / "people.txt"), code=MISCONFIGURED)


@checks("suppressions lift")
def _suppressions_lift(reader: Manual, folder: Path) -> None:
    chosen = ("suppressions", "lift", "--reason", "hard_bounce", "--channel", "email", "--since", "2h")
    assert reader.seamark(*chosen, "--dry-run") == "0 would be lifted\n"
    assert lines(reader.seamark(*chosen, "--json")) == [{"lifted": 0}]
    reader.seamark("suppressions", "lift", "--reason", "opted_out", code=MISCONFIGURED)


@checks("users show")
def _users_show(reader: Manual, folder: Path) -> None:
    _imported(reader, folder, "xaver")
    [shown] = lines(reader.seamark("users", "show", "xaver", "--json"))
    assert (shown["user"]["email"], shown["devices"]) == ("xaver@example.com", [])
    assert "xaver@example.com" in reader.seamark("users", "show", "xaver")


@checks("users delete")
def _users_delete(reader: Manual, folder: Path) -> None:
    _imported(reader, folder, "willi")
    [deleted] = lines(reader.seamark("users", "delete", "willi", "--yes", "--json"))
    assert deleted["id"] == "willi"
    reader.seamark("users", "show", "willi", code=2)
    reader.seamark("users", "delete", "segment:x", "--yes")  # an earlier version let him be


@checks("users verify-deleted")
def _users_verify_deleted(reader: Manual, folder: Path) -> None:
    _imported(reader, folder, "vera")
    reader.seamark("publish", "--to", "vera", "--type", "demo.hello", "--data", "{}")
    [found] = lines(reader.seamark("users", "verify-deleted", "vera", "--json", code=1))
    assert found["left"]["users"] == 1
    reader.seamark("users", "delete", "vera", "--yes")

    def gone() -> bool:
        return bool(lines(reader.tried("users", "verify-deleted", "vera", "--json").stdout)[0]["left"] == {})

    wait_for(gone)
