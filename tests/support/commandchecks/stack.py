"""What the commands of a stack are held against: its roles, events and their records, projections."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from ops.dev.child import free_port
from ops.exitcode import MISCONFIGURED
from tests.support.commandchecks.checking import answered, checks, lines, records, role, status_of
from tests.support.manual import FIRST_EVENT, Manual
from tests.support.waiting import wait_for

PROJECTIONS: Final = ("unread", "inbox", "deliveries")


@checks("dev")
def _dev(reader: Manual, folder: Path) -> None:
    assert reader.tried("dev").returncode == MISCONFIGURED, "two stacks on one folder would write over each other"
    assert status_of(f"{reader.described.gateway_url}/readyz") == 200


@checks("publish")
def _publish(reader: Manual, folder: Path) -> None:
    fields = ["--source", "shop", "--subject", "order-17", "--transaction-id", "t1", "--time", "2026-01-31T12:00:00Z"]
    fields += ["--priority", "high", "--category", "orders", "--semantics", "effectively_once", "--channel", "inapp"]
    fields += ["--collapse-key", "order-17", "--expires-at", "2036-01-31T12:00:00Z", "--key", "order-17"]
    fields += ["--send-at", "2026-01-31T12:00:00Z"]
    words = ["publish", "--to", "carol", "--type", "order.shipped", "--data", '{"order":17}', "--id", "o17", *fields]
    [accepted] = lines(reader.seamark(*words, "--json"))
    assert (accepted["event_id"], accepted["duplicate"]) == ("o17", False)
    assert lines(reader.seamark(*words, "--json"))[0]["duplicate"] is True
    event = {"to": ["carol"], "type": "order.paid", "id": "p17", "x-unknown": 1}
    reader.seamark("publish", "--file", "-", "--category", "orders", text=json.dumps(event))
    stored = wait_for(lambda: found if len(found := records(reader, "carol")) == 2 else None)
    assert stored[0].items() >= {"id": "o17", "priority": "high", "category": "orders", "data": {"order": 17}}.items()
    assert stored[1].items() >= {"id": "p17", "type": "order.paid", "category": "orders"}.items()


@checks("broadcast")
def _broadcast(reader: Manual, folder: Path) -> None:
    """A device of carol sees the broadcast and a now message, neither of which her log has."""
    before = len(records(reader, "carol"))
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
    assert len(records(reader, "carol")) == before


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
        assert status_of(f"{health}/healthz") == 200


@checks("projector")
def _projector(reader: Manual, folder: Path) -> None:
    with role(reader, "projector") as health:
        assert status_of(f"{health}/healthz") == 200


@checks("pager")
def _pager(reader: Manual, folder: Path) -> None:
    with role(reader, "pager") as health:
        assert status_of(f"{health}/healthz") == 200


@checks("planner")
def _planner(reader: Manual, folder: Path) -> None:
    with role(reader, "planner") as health:
        assert status_of(f"{health}/healthz") == 200


@checks("worker")
def _worker(reader: Manual, folder: Path) -> None:
    file = folder / "providers.toml"
    file.write_text("[webhook]\n")
    with role(reader, "worker", SEAMARK_PROVIDERS=str(file)) as health:
        assert status_of(f"{health}/healthz") == 200


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
    reader.seamark("seal", code=MISCONFIGURED)
    key = base64.b64encode(bytes(32)).decode()
    env = {"SEAMARK_STORAGE_KEYS": key, "SEAMARK_POSTGRES_URL": reader.empty_database()}
    reader.seamark("migrate", env=env)
    [sealed] = lines(reader.seamark("seal", "--json", env=env))
    assert (sealed["endpoints"], sealed["sealed"], sealed["unopened"]) == (0, 0, [])
    assert sealed["key"] not in key
