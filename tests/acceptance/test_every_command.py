"""Every command of `seamark --help` does what its help says, on a stack that runs as `make run` starts it, under traffic."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import typer
from typer.testing import CliRunner

from engine.limits import PULL_MESSAGES_MAX
from engine.topology.files import files_folder
from ops.cli import app
from ops.dev.child import free_port
from ops.exitcode import MISCONFIGURED
from tests.support.commands import started
from tests.support.devstack import Stack
from tests.support.logs import connected
from tests.support.manual import FIRST_EVENT, Manual
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(300)

Check = Callable[[Manual, Path], None]
CHECKS: Final[dict[str, Check]] = {}

PROJECTIONS: Final = ("unread", "inbox", "deliveries")


def checks(name: str) -> Callable[[Check], Check]:
    """This function is what `seamark <name>` is held against."""

    def kept(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return kept


def commands(group: Any = None, before: str = "") -> Iterator[str]:
    """The names of all commands, as they are typed."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def lines(output: str) -> list[Any]:
    return [json.loads(line) for line in output.splitlines()]


def answered(url: str, token: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a request with a bearer's token."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


@contextmanager
def role(reader: Manual, name: str, **env: str) -> Iterator[str]:
    """One more process of a role beside the stack's own; its health address. It must end in good order when asked to."""
    # A gateway has a process per core, and each has a port behind this one.
    health, stack = free_port(row=1 + (os.cpu_count() or 1)), reader.described
    settings = {
        "SEAMARK_PROFILE": "dev",
        "SEAMARK_NATS_URL": stack.nats_url,
        "SEAMARK_REDIS_URL": stack.redis_url,
        "SEAMARK_POSTGRES_URL": stack.postgres_url,
        "SEAMARK_JWT_SECRET": stack.jwt_secret,
        "SEAMARK_HEALTH_PORT": str(health),
    }
    log = reader.stack.folder / f"second-{name}.log"
    with log.open("wb") as output:
        process = started(name, folder=reader.stack.folder, output=output, env=reader.environment({**settings, **env}))
    try:
        address = f"http://127.0.0.1:{health}"
        wait_for(lambda: process.poll() is not None or _status(f"{address}/readyz") == 200)
        assert process.poll() is None, log.read_text()
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return int(answer.status)
    except OSError:
        return 0


# --- what each command is held against --------------------------------------------------------------------------------


@checks("dev")
def _dev(reader: Manual, folder: Path) -> None:
    assert reader.tried("dev").returncode == MISCONFIGURED, "two stacks on one folder would write over each other"
    assert _status(f"{reader.described.gateway_url}/readyz") == 200


@checks("publish")
def _publish(reader: Manual, folder: Path) -> None:
    fields = ["--source", "shop", "--subject", "order-17", "--transaction-id", "t1", "--time", "2026-01-31T12:00:00Z"]
    fields += ["--priority", "high", "--category", "orders", "--semantics", "effectively_once", "--channel", "inapp"]
    fields += ["--collapse-key", "order-17", "--expires-at", "2036-01-31T12:00:00Z", "--key", "order-17"]
    fields += ["--send-at", "2026-01-31T12:00:00Z"]
    words = ["publish", "--to", "carol", "--type", "order.shipped", "--data", '{"order":17}', "--id", "o17", *fields]
    [stored] = lines(reader.seamark(*words, "--json"))
    assert (stored["event_id"], stored["duplicate"]) == ("o17", False)
    assert lines(reader.seamark(*words, "--json"))[0]["duplicate"] is True
    event = {"to": ["carol"], "type": "order.paid", "id": "p17", "x-unknown": 1}
    reader.seamark("publish", "--file", "-", "--category", "orders", text=json.dumps(event))
    records = wait_for(lambda: found if len(found := _records(reader, "carol")) == 2 else None)
    assert records[0].items() >= {"id": "o17", "priority": "high", "category": "orders", "data": {"order": 17}}.items()
    assert records[1].items() >= {"id": "p17", "type": "order.paid", "category": "orders"}.items()


@checks("broadcast")
def _broadcast(reader: Manual, folder: Path) -> None:
    """A device of carol sees the broadcast and a now message, neither of which her log has."""
    before = len(_records(reader, "carol"))
    program = f"""
import asyncio
from seamark import Live, Now, connect

async def main():
    async with connect({reader.described.gateway_url!r}, token={reader.seamark("token", "carol").strip()!r}) as device:
        async for item in device.events():
            if isinstance(item, Live):
                print("live", flush=True)
            if isinstance(item, Now):
                print(item.type, item.data, flush=True)
                if item.type == "chat.typing":
                    return

asyncio.run(main())
"""
    device = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                              env=reader.environment())  # fmt: skip
    try:
        assert device.stdout is not None
        assert device.stdout.readline() == "live\n"  # what is sent before is lost, and a tenant may not broadcast often
        reader.seamark("broadcast", "--type", "system.down", "--data", '{"in":5}', "--json")
        words = ["--to", "carol", "--type", "chat.typing", "--semantics", "at_most_once", "--json"]
        assert lines(reader.seamark("publish", *words))[0]["seq"] is None
        output, _ = device.communicate(timeout=90)
        told = [line for line in output.splitlines() if line != "live"]
        assert told == ["system.down {'in': 5}", "chat.typing {}"]
    finally:
        device.kill()
    assert len(_records(reader, "carol")) == before


def _records(reader: Manual, user: str, *options: str) -> list[dict[str, Any]]:
    return [line["record"] for line in lines(reader.seamark("log", user, *options, "--json"))]


@checks("tail")
def _tail(reader: Manual, folder: Path) -> None:
    frames = lines(reader.seamark("tail", "alice", "-n", "3", "--json"))
    assert [frame["prev"] for frame in frames[1:]] == [frame["seq"] for frame in frames[:-1]]
    [following] = lines(reader.seamark("tail", "alice", "-n", "1", "--cursor", frames[1]["cursor"], "--json"))
    assert following["seq"] == frames[2]["seq"]


@checks("log")
def _log(reader: Manual, folder: Path) -> None:
    found = lines(reader.seamark("log", "alice", "--limit", "0", "--json"))
    assert found[0]["record"]["id"] == FIRST_EVENT
    assert [line["seq"] for line in found] == sorted(line["seq"] for line in found)
    assert len(lines(reader.seamark("log", "alice", "--limit", "2", "--json"))) == 2


@checks("token")
def _token(reader: Manual, folder: Path) -> None:
    inbox = f"{reader.described.gateway_url}/v1/inbox"
    status, page = answered(inbox, reader.seamark("token", "bob").strip())
    assert status == 200
    assert {item["user"] for item in page["items"]} <= {"bob"}
    assert answered(inbox, reader.seamark("token", "bob").strip() + "x")[0] == 401


@checks("gateway")
def _gateway(reader: Manual, folder: Path) -> None:
    port = free_port()
    with role(reader, "gateway", SEAMARK_GATEWAY_PORT=str(port)):
        assert answered(f"http://127.0.0.1:{port}/v1/inbox", reader.described.token)[0] == 200


@checks("dispatcher")
def _dispatcher(reader: Manual, folder: Path) -> None:
    with role(reader, "dispatcher") as health:
        assert _status(f"{health}/healthz") == 200


@checks("projector")
def _projector(reader: Manual, folder: Path) -> None:
    with role(reader, "projector") as health:
        assert _status(f"{health}/healthz") == 200


@checks("pager")
def _pager(reader: Manual, folder: Path) -> None:
    with role(reader, "pager") as health:
        assert _status(f"{health}/healthz") == 200


@checks("campaign start")
def _campaign_start(reader: Manual, folder: Path) -> None:
    """Three users of whom one is excluded have it in their logs, and a repetition adds nothing."""
    users = ["erin", "frank", "grace"]
    asked = {"id": "c1", "audience": {"users": users}, "exclude": {"users": ["grace"]}}
    asked["message"] = {"type": "sale.autumn", "data": {"off": 20}}
    words = ["campaign", "start", "--file", "-", "--json"]
    [size] = lines(reader.seamark(*words, "--dry-run", text=json.dumps(asked)))
    decided = {"sample": 2, "decisions": {"inapp": {"now: default": 2}}}
    assert size == {"audience": 3, "recipients": 2, "reasons": {"excluded": 1}, **decided}
    assert lines(reader.seamark(*words, text=json.dumps(asked))) == [{"id": "c1", "created": True}]
    wait_for(lambda: all(_records(reader, user) for user in users[:2]))
    assert lines(reader.seamark(*words, text=json.dumps(asked))) == [{"id": "c1", "created": False}]
    over = {"state": "done", "audience": 3, "dispatched": 2, "excluded": 1}.items()  # what is counted comes after it
    wait_for(lambda: lines(reader.seamark("campaign", "progress", "c1", "--follow", "--json"))[-1].items() >= over)
    assert [len(_records(reader, user)) for user in users] == [1, 1, 0]
    reader.seamark("campaign", "start", "--id", "no blanks", "--everyone", "--type", "a", code=MISCONFIGURED)


@checks("campaign ls")
def _campaign_ls(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c2")
    assert "c2" in [each["id"] for each in lines(reader.seamark("campaign", "ls", "--json"))]


@checks("campaign show")
def _campaign_show(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c3")
    [asked] = lines(reader.seamark("campaign", "show", "c3"))
    assert asked["message"] == {"type": "sale.winter", "data": {}}
    reader.seamark("campaign", "show", "no-such-campaign", code=1)


@checks("campaign progress")
def _campaign_progress(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c4")
    assert "c4  running" in reader.seamark("campaign", "progress", "c4")


@checks("campaign channels")
def _campaign_channels(reader: Manual, folder: Path) -> None:
    reader.seamark("campaign", "start", "--id", "c8", "--type", "sale.autumn", "--user", "heidi")
    counted = {"channels": {"inapp": {"total": 1, "states": {"stored": 1}, "reasons": {}}}}
    wait_for(lambda: lines(reader.seamark("campaign", "channels", "c8", "--json")) == [counted])
    reader.seamark("campaign", "channels", "no-such-campaign", code=1)


@checks("campaign pause")
def _campaign_pause(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c5")
    assert _state(reader, "pause", "c5") == "paused"
    assert _state(reader, "resume", "c5") == "running"


@checks("campaign resume")
def _campaign_resume(reader: Manual, folder: Path) -> None:
    _campaign_pause(reader, folder)


@checks("campaign cancel")
def _campaign_cancel(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c6")
    assert _state(reader, "cancel", "c6") == "cancelled"


@checks("campaign rate")
def _campaign_rate(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c7")
    [progress] = lines(reader.seamark("campaign", "rate", "c7", "10", "--json"))
    assert progress["rate"] == 10


def _campaign(reader: Manual, id: str) -> None:
    """One that begins in ten years."""
    words = ["--type", "sale.winter", "--user", "erin", "--start-at", "2036-01-31T12:00:00Z"]
    reader.seamark("campaign", "start", "--id", id, *words)


def _state(reader: Manual, change: str, id: str) -> str:
    [progress] = lines(reader.seamark("campaign", change, id, "--json"))
    return str(progress["state"])


@checks("planner")
def _planner(reader: Manual, folder: Path) -> None:
    with role(reader, "planner") as health:
        assert _status(f"{health}/healthz") == 200


@checks("worker")
def _worker(reader: Manual, folder: Path) -> None:
    file = folder / "providers.toml"
    file.write_text("[webhook]\n")
    with role(reader, "worker", SEAMARK_PROVIDERS=str(file)) as health:
        assert _status(f"{health}/healthz") == 200


@checks("funnel")
def _funnel(reader: Manual, folder: Path) -> None:
    def counted() -> bool:
        steps = lines(reader.seamark("funnel", "--json"))
        ticks = [step for step in steps if step["type"] == "demo.tick" and step["channel"] == "inapp"]
        return any(step["dispatched"] > 0 and step["emitted"] > 0 for step in ticks)

    wait_for(counted)


@checks("prove")
def _prove(reader: Manual, folder: Path) -> None:
    wait_for(lambda: _facts(reader) >= {"emitted", "stored", "dispatched", "planned", "acknowledged"})
    reader.seamark("prove", "no-such-event", code=2)


def _facts(reader: Manual) -> set[str]:
    [proof] = lines(reader.seamark("prove", FIRST_EVENT, "--user", "alice", "--json"))
    return {fact["fact"] for fact in proof["facts"]}


@checks("explain")
def _explain(reader: Manual, folder: Path) -> None:
    (folder / "explained.json").write_text('{"type":"demo.explained"}')
    [explained] = lines(
        reader.seamark("explain", "--event", str(folder / "explained.json"), "--user", "alice", "--json")
    )
    assert explained["plan"] == {"inapp": {"when": "now", "why": "default"}}
    (folder / "low.json").write_text('{"type":"demo.explained","priority":"low"}')
    [low] = lines(reader.seamark("explain", "--event", str(folder / "low.json"), "--user", "alice", "--json"))
    assert low["inputs"]["notification"]["type"] == "demo.explained"
    assert explained["inputs"]["notification"]["user"] == "alice"


@checks("rebuild")
def _rebuild(reader: Manual, folder: Path) -> None:
    for projection in PROJECTIONS:
        reader.seamark("rebuild", projection)
        reader.traffic.check()
        [result] = lines(reader.seamark("verify", projection, "--json"))
        assert result["differences"] == 0
    reader.seamark("rebuild", "inbox", "--tenant", "default")


@checks("verify")
def _verify(reader: Manual, folder: Path) -> None:
    for projection in PROJECTIONS:
        [result] = lines(reader.seamark("verify", projection, "--json"))
        assert result["differences"] == 0
        assert result["compared"] > 0


@checks("migrate")
def _migrate(reader: Manual, folder: Path) -> None:
    [done] = lines(reader.seamark("migrate", "--json"))
    assert done["before"] == done["after"]
    env = {"SEAMARK_POSTGRES_URL": reader.empty_database()}
    [made] = lines(reader.seamark("migrate", "--json", env=env))
    assert (made["before"], made["after"]) == (None, done["after"])


@checks("seal")
def _seal(reader: Manual, folder: Path) -> None:
    reader.seamark("seal", code=2)
    key = base64.b64encode(bytes(32)).decode()
    env = {"SEAMARK_STORAGE_KEYS": key, "SEAMARK_POSTGRES_URL": reader.empty_database()}
    reader.seamark("migrate", env=env)
    [sealed] = lines(reader.seamark("seal", "--json", env=env))
    assert (sealed["endpoints"], sealed["sealed"]) == (0, 0)
    assert key not in sealed["key"]


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


@checks("topology plan")
def _plan(reader: Manual, folder: Path) -> None:
    assert "files and server agree" in reader.seamark("topology", "plan")


@checks("topology apply")
def _apply(reader: Manual, folder: Path) -> None:
    assert "nothing to do" in reader.seamark("topology", "apply")


@checks("topology check")
def _check(reader: Manual, folder: Path) -> None:
    said = reader.seamark("topology", "check")
    assert "sync_always" in said
    assert "refuse" not in said
    reader.seamark("topology", "check", "--profile", "production", code=2)


@checks("topology render")
def _render(reader: Manual, folder: Path) -> None:
    written = lines(reader.seamark("topology", "render", str(folder / "files"), "--json"))[0]
    assert len(written) > 8
    assert all(json.loads(Path(path).read_bytes()) for path in written)


@checks("topology size")
def _size(reader: Manual, folder: Path) -> None:
    files = folder / "sized"
    [found] = lines(reader.seamark("topology", "size", "--rate", "1000", "--write", str(files), "--json"))
    assert found["written"]
    assert all(Path(path).is_relative_to(files) for path in found["written"])
    written = [json.loads(path.read_bytes()) for path in (files / "streams").glob("*.production.json")]
    assert len(written) > 4


@checks("topology publisher")
def _publisher(reader: Manual, folder: Path) -> None:
    accounts = folder / "accounts.conf"
    accounts.write_bytes((files_folder() / "accounts.conf").read_bytes())
    [made] = lines(reader.seamark("topology", "publisher", "shop", "--add-to", str(accounts), "--json"))
    assert made["block"].strip() in accounts.read_text()
    assert "events.shop.>" in made["block"]


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


def _dead(reader: Manual, key: str) -> list[dict[str, Any]]:
    """The letters of events of this ordering key; there is at least one."""

    async def publish() -> None:
        async with connected(reader.described.nats_url) as broker:
            await broker.append(f"events.default.{key}.demo.dead", b"no json")

    def found() -> list[dict[str, Any]]:
        listed = lines(reader.seamark("dlq", "ls", "--kind", "event", "--class", "json", "--json"))
        return [one for one in listed if f".{key}." in one["subject"]]

    if not found():
        asyncio.run(publish())
    return wait_for(found) or []


@checks("dlq ls")
def _dlq_ls(reader: Manual, folder: Path) -> None:
    [letter] = _dead(reader, "ls")
    assert letter.items() >= {"kind": "event", "tenant": "default", "class": "json", "type": "demo.dead"}.items()
    assert f"{letter['seq']}" in reader.seamark("dlq", "ls", "--tenant", "default", "--since", "2h", "--limit", "1000")
    assert lines(reader.seamark("dlq", "ls", "--until", "2026-01-31T12:00:00Z", "--json")) == []
    reader.seamark("dlq", "ls", "--since", "yesterday", code=MISCONFIGURED)


@checks("dlq show")
def _dlq_show(reader: Manual, folder: Path) -> None:
    [letter] = _dead(reader, "show")
    [shown] = lines(reader.seamark("dlq", "show", str(letter["seq"]), "--json"))
    assert shown == {"letter": letter, "payload": "no json"}
    assert reader.tried("dlq", "show", "99999999").returncode == 2


@checks("dlq triage")
def _dlq_triage(reader: Manual, folder: Path) -> None:
    [letter] = _dead(reader, "triage")
    groups = lines(reader.seamark("dlq", "triage", "--kind", "event", "--json"))
    [group] = [one for one in groups if one["code"] == "json"]
    assert group["known"]
    assert group["count"] >= 1
    assert group["example"] >= letter["seq"]


@checks("dlq replay")
def _dlq_replay(reader: Manual, folder: Path) -> None:
    [letter] = _dead(reader, "replay")
    reader.seamark("dlq", "replay", code=MISCONFIGURED)
    assert lines(reader.seamark("dlq", "replay", str(letter["seq"]), "--json")) == [{"replayed": 1}]
    assert lines(reader.seamark("dlq", "replay", str(letter["seq"]), "--json")) == [{"gone": 1}]
    again = wait_for(lambda: [one for one in _dead(reader, "replay") if one["seq"] != letter["seq"]])
    assert again[0]["class"] == "json", "it is as wrong as before"


@checks("dlq drop")
def _dlq_drop(reader: Manual, folder: Path) -> None:
    [letter] = _dead(reader, "drop")
    assert lines(reader.seamark("dlq", "drop", str(letter["seq"]), "--json")) == [{"dropped": 1}]
    assert reader.tried("dlq", "show", str(letter["seq"])).returncode == 2


@checks("control show")
def _control_show(reader: Manual, folder: Path) -> None:
    [shown] = lines(reader.seamark("control", "show", "--json"))
    assert shown["version"] >= 0
    assert all(each["why"] for each in shown["controls"])


@checks("control kill")
def _control_kill(reader: Manual, folder: Path) -> None:
    reader.seamark("control", "kill", "--why", "everything", code=MISCONFIGURED)
    reader.seamark("control", "kill", "--channel", "pusj", "--why", "a typo", code=MISCONFIGURED)
    [made] = lines(reader.seamark("control", "kill", "--channel", "sms", "--mode", "drop", "--why", "price", "--json"))
    assert made["change"]["after"] == {"kind": "kill", "channel": "sms", "mode": "drop"}
    [shown] = lines(reader.seamark("control", "show", "--json"))
    assert made["change"]["after"] in [each["control"] for each in shown["controls"]]
    reader.seamark("control", "restore", "kill", "--channel", "sms", "--why", "paid")


@checks("control pause")
def _control_pause(reader: Manual, folder: Path) -> None:
    reader.seamark("control", "pause", "--lane", "fast", "--why", "no lane", code=MISCONFIGURED)
    [made] = lines(reader.seamark("control", "pause", "--lane", "normal", "--channel", "push", "--why", "x", "--json"))
    assert made["change"]["action"] == "pause"
    reader.seamark("control", "restore", "pause", "--lane", "normal", "--channel", "push", "--why", "y")


@checks("control throttle")
def _control_throttle(reader: Manual, folder: Path) -> None:
    words = ["--tenant", "default", "--type", "stop.*"]
    reader.seamark("control", "throttle", *words, "--per-minute", "0", "--why", "a loop")
    url, event = f"{reader.described.gateway_url}/v1/events", {"to": ["alice"], "type": "stop.this"}
    wait_for(lambda: answered(url, reader.described.api_key, event)[0] == 429)
    assert answered(url, reader.described.api_key, {**event, "type": "go.on"})[0] == 202
    reader.seamark("control", "restore", "throttle", *words, "--why", "mended")
    wait_for(lambda: answered(url, reader.described.api_key, event)[0] == 202)


@checks("control restore")
def _control_restore(reader: Manual, folder: Path) -> None:
    reader.seamark("control", "restore", "kill", "--tenant", "nobody", "--why", "x", code=MISCONFIGURED)
    reader.seamark("control", "kill", "--category", "promo", "--why", "x")
    words = ["control", "restore", "kill", "--category", "promo", "--why", "y", "--json"]
    [half] = lines(reader.seamark(*words, "--percent", "50"))
    assert half["change"]["after"]["percent"] == 50
    [whole] = lines(reader.seamark(*words))
    assert "after" not in whole["change"]


@checks("control rehydrate")
def _control_rehydrate(reader: Manual, folder: Path) -> None:
    reader.seamark("control", "rehydrate", "--why", "nobody", code=MISCONFIGURED)
    words = ["control", "rehydrate", "--tenant", "default", "--user", "alice", "--why", "rebuilt", "--json"]
    [made] = lines(reader.seamark(*words))
    assert made["change"]["after"] == {"kind": "rehydrate", "tenant": "default", "user": "alice"}
    reader.traffic.check()


@checks("control log")
def _control_log(reader: Manual, folder: Path) -> None:
    reader.seamark("control", "rehydrate", "--tenant", "nobody", "--who", "ann", "--why", "to be found")
    assert any(
        row["who"] == "ann" and row["why"] == "to be found" for row in lines(reader.seamark("control", "log", "--json"))
    )


@checks("topology restore")
def _restore(reader: Manual, folder: Path) -> None:
    """On a stack of its own: whoever followed a log before is told to begin anew, and its dispatcher goes on by itself."""
    stack = Stack(folder)
    stack.start()
    try:
        stack.run("publish", "--to", "alice", "--id", "before")
        [before] = lines(stack.run("tail", "alice", "-n", "1", "--json"))
        [rotated] = lines(stack.run("topology", "restore", "LOG-2", "--json"))
        assert rotated["LOG-2"]["before"] != rotated["LOG-2"]["after"]
        stack.run("publish", "--to", "alice", "--id", "after")
        wait_for(lambda: "after" in stack.run("log", "alice"))
        [again, after] = lines(stack.run("tail", "alice", "-n", "2", "--json"))
        assert after["cursor"].startswith(rotated["LOG-2"]["after"])
        assert not before["cursor"].startswith(rotated["LOG-2"]["after"])
        assert again["record"]["id"] == "before"
        with dispatcher_frozen(stack):
            assert "replace epochs: LOG-2" in stack.run("topology", "repair", "--at", "mark", "--yes")
    finally:
        stack.close()


@checks("topology repair")
def _repair(reader: Manual, folder: Path) -> None:
    assert reader.seamark("topology", "repair", "--at", "mark", "--yes").strip(), "it says that there is nothing to do"


@contextmanager
def dispatcher_frozen(stack: Stack) -> Iterator[None]:
    """Without a dispatcher at work, once the broker has noticed: one that ends would be started again at once."""
    dispatcher = stack.child("dispatcher")
    dispatcher.suspend()
    try:
        wait_for(lambda: "being read" not in stack.refused("topology", "repair", "--at", "mark"), seconds=90)
        yield
    finally:
        dispatcher.resume()


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_command_does_what_its_help_says(reader: Manual, tmp_path: Path, name: str) -> None:
    CHECKS[name](reader, tmp_path)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_command_says_what_it_does_when_asked_for_help(name: str) -> None:
    said = CliRunner().invoke(app, [*name.split(), "--help"])
    assert (said.exit_code, len(said.stdout.split()) > 5) == (0, True), said.output


def test_no_command_is_without_a_test_here() -> None:
    assert set(commands()) == CHECKS.keys(), "write down here what a new command must do"


def test_a_log_of_more_than_one_pull_is_verified_and_rebuilt(reader: Manual) -> None:
    for _ in range(2):
        events = [{"to": ["oscar"], "type": "demo.many"}] * 1000  # nobody else publishes to oscar
        url = f"{reader.described.gateway_url}/v1/events/bulk"
        status, answer = answered(url, reader.described.api_key, {"events": events})
        assert (status, len(answer["results"])) == (202, 1000)
    wait_for(lambda: len(_records(reader, "oscar", "--limit", "0")) == PULL_MESSAGES_MAX * 2, seconds=60)
    for projection in ("unread", "inbox"):
        reader.seamark("rebuild", projection)
        [result] = lines(reader.seamark("verify", projection, "--json"))
        assert result["differences"] == 0
