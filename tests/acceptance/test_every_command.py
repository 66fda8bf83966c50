"""Every command of `seamark --help` does what its help says, on a stack that runs as `make run` starts it, under traffic."""

from __future__ import annotations

import json
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

from engine.limits import PULL_MESSAGES_MAX
from engine.topology.files import files_folder
from ops.cli import app
from ops.dev.child import free_port
from ops.exitcode import MISCONFIGURED
from tests.support.devstack import Stack
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
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


@contextmanager
def role(reader: Manual, name: str, **env: str) -> Iterator[str]:
    """One more process of a role beside the stack's own; its health address. It must end in good order when asked to."""
    health, stack = free_port(), reader.described
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
        process = subprocess.Popen(
            [sys.executable, "-m", "ops", name],
            cwd=reader.stack.folder,
            env=reader.environment({**settings, **env}),
            stdout=output,
            stderr=output,
        )
    try:
        address = f"http://127.0.0.1:{health}"
        wait_for(lambda: process.poll() is not None or _status(f"{address}/readyz") == 200)
        assert process.poll() is None, log.read_text()
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status)
    except OSError:
        return 0


# --- what each command is held against --------------------------------------------------------------------------------


@checks("dev")
def _dev(reader: Manual, folder: Path) -> None:
    again = reader.run([sys.executable, "-m", "ops", "dev"])
    assert again.returncode == MISCONFIGURED, "two stacks on one folder would write over each other"
    assert _status(f"{reader.described.gateway_url}/readyz") == 200


@checks("publish")
def _publish(reader: Manual, folder: Path) -> None:
    fields = ["--source", "shop", "--subject", "order-17", "--transaction-id", "t1", "--time", "2026-01-31T12:00:00Z"]
    fields += ["--priority", "high", "--category", "orders", "--semantics", "effectively_once", "--channel", "inapp"]
    fields += ["--collapse-key", "order-17", "--expires-at", "2036-01-31T12:00:00Z", "--key", "order-17"]
    words = ["publish", "--to", "carol", "--type", "order.shipped", "--data", '{"order":17}', "--id", "o17", *fields]
    [stored] = lines(reader.seamark(*words, "--json"))
    assert (stored["event_id"], stored["duplicate"]) == ("o17", False)
    assert lines(reader.seamark(*words, "--json"))[0]["duplicate"] is True
    event = {"to": ["carol"], "type": "order.paid", "id": "p17", "x-unknown": 1}
    reader.seamark("publish", "--file", "-", "--category", "orders", text=json.dumps(event))
    records = wait_for(lambda: found if len(found := _records(reader, "carol")) == 2 else None)
    assert records[0].items() >= {"id": "o17", "priority": "high", "category": "orders", "data": {"order": 17}}.items()
    assert records[1].items() >= {"id": "p17", "type": "order.paid", "category": "orders"}.items()


def _records(reader: Manual, user: str) -> list[dict[str, Any]]:
    return [line["record"] for line in lines(reader.seamark("log", user, "--json"))]


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


@checks("funnel")
def _funnel(reader: Manual, folder: Path) -> None:
    steps = lines(reader.seamark("funnel", "--json"))
    ticks = next(step for step in steps if step["type"] == "demo.tick" and step["channel"] == "inapp")
    assert ticks["dispatched"] > 0
    assert ticks["emitted"] > 0


@checks("prove")
def _prove(reader: Manual, folder: Path) -> None:
    wait_for(lambda: "acknowledged" in _facts(reader))
    assert _facts(reader) >= {"emitted", "stored", "dispatched", "planned", "acknowledged"}
    reader.seamark("prove", "no-such-event", code=2)


def _facts(reader: Manual) -> set[str]:
    [proof] = lines(reader.seamark("prove", FIRST_EVENT, "--user", "alice", "--json"))
    return {fact["fact"] for fact in proof["facts"]}


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
    [dispatcher] = [child for child in stack.children() if child.cmdline()[-1] == "dispatcher"]
    dispatcher.suspend()
    try:
        wait_for(lambda: "being read" not in stack.refused("topology", "repair", "--at", "mark"))
        yield
    finally:
        dispatcher.resume()


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_command_does_what_its_help_says(reader: Manual, tmp_path: Path, name: str) -> None:
    assert len(reader.seamark(*name.split(), "--help").split()) > 5
    CHECKS[name](reader, tmp_path)


def test_no_command_is_without_a_test_here() -> None:
    assert set(commands()) == CHECKS.keys(), "write down here what a new command must do"


def test_a_log_of_more_than_one_pull_is_verified_and_rebuilt(reader: Manual) -> None:
    for _ in range(2):
        events = [{"to": ["erin"], "type": "demo.many"}] * 1000
        url = f"{reader.described.gateway_url}/v1/events/bulk"
        status, answer = answered(url, reader.described.api_key, {"events": events})
        assert (status, len(answer["results"])) == (202, 1000)
    last = f"{PULL_MESSAGES_MAX * 2}"
    wait_for(lambda: f"{len(lines(reader.seamark('log', 'erin', '--limit', '0', '--json')))}" == last, seconds=60)
    for projection in ("unread", "inbox"):
        reader.seamark("rebuild", projection)
        [result] = lines(reader.seamark("verify", projection, "--json"))
        assert result["differences"] == 0
