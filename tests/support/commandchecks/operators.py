"""What commands for operators are held against: topology, dead letters, controls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.topology.files import files_folder
from ops.exitcode import MISCONFIGURED
from tests.support.commandchecks.checking import answered, checks, lines
from tests.support.devstack import Stack
from tests.support.logs import connected
from tests.support.manual import Manual
from tests.support.waiting import wait_for


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
    reader.seamark(*words, "--percent", "0", code=MISCONFIGURED)
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
