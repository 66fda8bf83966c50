"""What the documentation shows works, on a stack that runs as `make run` starts it, while events are published."""

from __future__ import annotations

import asyncio
import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from engine.campaigns.draft import Draft
from engine.plan.decide import plan
from engine.plan.decisions import Facts, Inputs, Notification
from engine.plan.profile import Profile
from engine.plan.rules import ChannelRule, TypeRule
from ops.cli import app
from seamark.protocol.receipts import PLANNED, Receipt
from tests.support.chromium import Chromium, Page
from tests.support.documents import NOT_RUN, Block, blocks, named_commands
from tests.support.forks import ROOT
from tests.support.logs import all_records, connected
from tests.support.manual import FIRST_EVENT, Manual
from tests.support.natscli import PARTITIONS, ask
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(240)

ALL = blocks()
SHIPPED = Inputs(
    now=datetime(2026, 11, 29, 8, tzinfo=UTC),
    notification=Notification(id="order-17-shipped", tenant="default", user="alice", type="order.shipped"),
    facts=Facts(stored_at=datetime(2026, 11, 29, 8, tzinfo=UTC)),
    rule=TypeRule(pattern="order.*", channels={"email": ChannelRule(), "push": ChannelRule()}),
    profile=Profile(version=1, reach=("inapp", "email")),
    templates=("email", "push"),
)
"""What the plan that docs/planner.md shows is made from: a user with an address and without a push token."""

ENDLESS = ("tail",)
"""Commands that go on until Ctrl-C."""


def of_kind(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in ALL if block.kind == kind], ids=str)


def test_every_block_is_run_by_a_test_or_has_a_reason_why_not() -> None:
    unknown = [f"{block}\n{block.text}" for block in ALL if block.kind == "unknown"]
    assert unknown == [], "say in tests/support/documents.py what these blocks are"
    first_lines = {(block.document, block.text.strip().partition("\n")[0].strip()) for block in ALL}
    assert first_lines >= NOT_RUN.keys(), "a reason is left for a block that is gone"


@of_kind("commands")
def test_a_block_of_commands_does_what_it_shows(reader: Manual, block: Block) -> None:
    env: dict[str, str] = {}
    for program, *shown in block.commands:
        if program == "export":
            env |= {name: reader.stood_in(value) for name, _, value in (word.partition("=") for word in shown)}
            continue
        words = [reader.stood_in(word) for word in shown]
        if program == "seamark":
            output = reader.seamark(*words, env=env, ends=words[0] not in ENDLESS or "-n" in words)
            assert output.strip(), f"{words} printed nothing"
        elif program == "nats":
            asyncio.run(asked(reader, words))
        else:
            makes(words)


async def asked(reader: Manual, words: list[str]) -> None:
    async with connected(reader.described.nats_url) as broker:
        await ask(broker, words)


def makes(words: list[str]) -> None:
    """`make` would make another environment, or run all tests from inside one: what it would run is looked at instead."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    if words == ["run"]:
        assert "/seamark dev" in done.stdout, "then the stack here was not started as `make run` does"


@of_kind("python")
def test_a_block_of_python_runs_as_it_stands(reader: Manual, block: Block) -> None:
    done = reader.python(block.text)
    assert done.returncode == 0, done.stdout
    if "publish(" in block.text:
        wait_for(lambda: "order-17-shipped" in reader.seamark("log", "alice", "--limit", "0"))
    if "async for" in block.text:
        assert "demo." in done.stdout, "no record came"


@of_kind("json")
def test_a_block_of_json_looks_like_what_is_answered_or_stored(reader: Manual, block: Block) -> None:
    shown = json.loads(block.text)
    if "audience" in shown:
        msgspec.json.decode(block.text, type=Draft).check("default")
        return
    if "quiet_hours" in shown:
        headers = {"Authorization": f"Bearer {reader.described.api_key}", "Content-Type": "application/json"}
        url = f"{reader.described.gateway_url}/v1/users/nobody-else/preferences"
        request = urllib.request.Request(url, block.text.encode(), headers, method="PATCH")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["document"] == shown
        return
    if "timezone" in shown or "platform" in shown:
        path, key = (
            ("users/alice", reader.described.api_key)
            if "timezone" in shown
            else ("devices/phone", reader.described.token)
        )
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        url = f"{reader.described.gateway_url}/v1/{path}"
        request = urllib.request.Request(url, block.text.encode(), headers, method="PUT")
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)
        assert {name: said[name] for name in shown if name != "token"} == {
            n: v for n, v in shown.items() if n != "token"
        }
        return
    if "request_id" in shown:
        headers = {"Authorization": f"Bearer {reader.described.token}", "X-Request-Id": shown["request_id"]}
        request = urllib.request.Request(f"{reader.described.gateway_url}/v1/inbox?limit=0", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert json.load(refused.value) == shown
        return
    if "too_late" in shown:
        url = f"{reader.described.gateway_url}/v1/transactions/{urllib.parse.quote(shown['id'])}"
        headers = {"Authorization": f"Bearer {reader.described.api_key}"}
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers, method="DELETE"), timeout=60
        ) as answer:
            said = json.load(answer)
        assert {name: type(value) for name, value in said.items()} == {name: type(shown[name]) for name in shown}
        return

    if "plan" in shown and "state" in shown:  # a record has a plan, too
        receipt = msgspec.json.decode(block.text, type=Receipt)
        assert json.loads(msgspec.json.encode(receipt)) == shown, "nothing that no receipt has"
        assert receipt.state == PLANNED
        decided = {channel: (one.when, one.why) for channel, one in plan(SHIPPED).items() if channel != "inapp"}
        assert {channel: (one.when, one.why) for channel, one in (receipt.plan or {}).items()} == decided
        return

    async def stored() -> dict[str, object]:
        async with connected(reader.described.nats_url) as broker:
            return next(one.record for one in await all_records(broker, PARTITIONS) if one.id == FIRST_EVENT)

    record = asyncio.run(stored())
    assert shown.keys() - {"trace"} == record.keys() - {"trace"}
    assert {name: type(value) for name, value in shown["event"].items()} == {"epoch": str, "seq": int}


@of_kind("toml")
def test_a_block_of_toml_is_a_file_that_can_be_applied(reader: Manual, block: Block, tmp_path: Path) -> None:
    file = tmp_path / ("tenant.toml" if "timezone" in block.text else "types/order.*.toml")
    file.parent.mkdir(exist_ok=True)
    file.write_text(block.text)
    tenant = ("--tenant", f"toml-{block.line}")
    assert reader.seamark("config", "apply", str(tmp_path), *tenant).startswith("+ ")
    reader.seamark("config", "export", str(tmp_path / "exported"), *tenant)
    assert (tmp_path / "exported" / file.relative_to(tmp_path)).read_text() == block.text


# --- JavaScript, in the browser it is for ---------------------------------------------------------------------------

STAND_INS = """
  window.got = [];
  window.note = (value) => got.push(value);
  window.fetchToken = () => TOKEN;
  window.show = window.apply = window.replaceAll = window.showState = note;
  const real = window.fetch;
  window.fetch = (url, ...rest) => url === "/my/token" ? Promise.resolve(new Response(TOKEN)) : real(url, ...rest);
"""


@of_kind("js")
async def test_a_block_of_javascript_follows_a_log_in_a_browser(
    reader: Manual, block: Block, browser: Chromium
) -> None:
    page = await stood_in(browser, reader)
    imports = block.text.replace('import { Seamark } from "./seamark.js"', "", 1)
    imports = imports.replace('import { Seamark } from "/seamark.js"', "", 1)
    assert imports != block.text, "the block imports the SDK from somewhere else"
    await page.evaluate(f'import("/seamark.js").then(({{ Seamark }}) => {{ {imports} }})')
    await page.until("got.some((value) => value?.type?.startsWith('demo.'))")


async def stood_in(browser: Chromium, reader: Manual) -> Page:
    """A page of the gateway where the functions that the blocks leave to the application are there."""
    page = await browser.open(f"{reader.described.gateway_url}/seamark.js")
    await page.evaluate(STAND_INS.replace("TOKEN", json.dumps(reader.described.token)))
    return page


# --- commands named in sentences and tables -------------------------------------------------------------------------


def test_commands_that_sentences_name_exist_with_the_options_named() -> None:
    seamark = typer.main.get_command(app)
    assert [fault for where, words in named_commands() if (fault := missing(seamark, where, words))] == []


def missing(command: Any, where: str, words: list[str]) -> str:
    """What of this command there is not."""
    left = words[1:]
    while left and hasattr(command, "commands"):
        name = left.pop(0)
        if name not in command.commands:
            return f"{where}: there is no `{' '.join(words)}`"
        command = command.commands[name]
    options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    named = {word.strip("[]") for word in left if word.strip("[]").startswith("--")}
    return f"{where}: `{' '.join(words)}` has no {', '.join(sorted(named - options))}" if named - options else ""
