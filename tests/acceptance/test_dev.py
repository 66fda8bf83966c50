"""`seamark dev` and the commands around it, as a newcomer runs them: real processes, real servers."""

import asyncio
import contextlib
import fcntl
import json
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import msgspec
import psutil
import pytest

from engine.plan.preferences import Preferences
from engine.profiles.preferences import merged
from ops.dev.servers import NatsServer, Valkey
from ops.exitcode import MISCONFIGURED
from seamark.protocol.subjects import log_subject, partition_of
from tests.support.chromium import Chromium, Page
from tests.support.commands import seamark
from tests.support.devstack import Stack
from tests.support.documents import blocks
from tests.support.logs import all_records, connected, eventually
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that several tests use, each as a user of its own."""
    with _running(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that several tests hurt and end and that has to get over it, each with a user of its own."""
    with _running(tmp_path_factory.mktemp("battered")) as running:
        yield running


@pytest.fixture(scope="module")
def peculiar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack in a folder of another name, started from a shell in which settings of another one were left."""
    folder = tmp_path_factory.mktemp("peculiar")
    (folder / "settings.toml").write_text('jwt_issuer = "https://issuer"\npartitions = 8\n')
    left = {
        "SEAMARK_SETTINGS": str(folder / "settings.toml"),
        "SEAMARK_HEALTH_PORT": "9100",
        "SEAMARK_JWT_AUDIENCE": "audience",
        "SEAMARK_POSTGRES_URL": "",
    }
    with _running(folder, data="data here", **left) as running:
        yield running


@contextmanager
def _running(folder: Path, data: str = ".seamark", **env: str) -> Iterator[Stack]:
    stack = Stack(folder, data, **env)
    stack.start()
    yield stack
    if stack.process is not None and stack.process.poll() is None:
        stack.stop()


def test_the_printed_command_delivers_a_first_notification(shared: Stack) -> None:
    printed = re.search(r"seamark (publish .*)$", shared.output.read_text(), re.MULTILINE)
    assert printed is not None
    subprocess.run(
        f"{sys.executable} -m ops {printed[1]}", shell=True, cwd=shared.folder, env=shared.env, check=True, timeout=90
    )
    [line] = shared.run("tail", "alice", "-n", "1", "--json").splitlines()
    frame = json.loads(line)
    assert frame["record"]["data"] == {"text": "hi"}
    assert frame["prev"] < frame["seq"]
    assert frame["cursor"].endswith(f".{frame['seq']}")
    shown = shared.run("tail", "alice", "-n", "1")
    assert f"seq {frame['seq']}" in shown
    assert f"cursor {frame['cursor']}" in shown
    assert "demo.hello" in shared.run("log", "alice")


class OutboxPage:
    """The outbox page of a stack, and its gateway, as a developer asks them."""

    def __init__(self, http: aiohttp.ClientSession, described: Any) -> None:
        self._http, self._described = http, described

    async def ask(self, method: str, url: str, body: object = None) -> tuple[int, Any]:
        async with self._http.request(method, url, json=body) as answer:
            return answer.status, await answer.json() if answer.status == 200 else await answer.text()

    async def message(self, channel: str, user: str, said: str) -> dict[str, Any] | None:
        """The message that shows this text."""
        _, told = await self.ask("GET", f"{self._described.outbox_url}/messages?channel={channel}&user={user}")
        return next((one for one in told["messages"] if said in one["shown"]["text"]), None)

    async def tell(self, number: int, word: str) -> int:
        return (await self.ask("POST", f"{self._described.outbox_url}/messages/{number}/tell", {"tell": word}))[0]

    async def suppressed(self, channel: str, address: str) -> list[str]:
        about = {"channel": channel, "address": address}
        _, found = await self.ask("POST", f"{self._described.gateway_url}/v1/suppressions/search", about)
        return [one["reason"] for one in found["items"]]

    async def is_said(self, id: str, user: str, channel: str, state: str) -> bool:
        way = f"{self._described.gateway_url}/v1/notifications/{id}/trace?user={user}"
        status, found = await self.ask("GET", way)
        facts = found["proofs"][0]["facts"] if status == 200 else []  # it may not be folded yet
        return state in {one["fact"] for one in facts if one.get("channel") == channel}


@contextlib.asynccontextmanager
async def page_of(shared: Stack) -> AsyncIterator[OutboxPage]:
    described = shared.describe()
    headers = {"Authorization": f"Bearer {described.api_key}"}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), headers=headers) as http:
        yield OutboxPage(http, described)


def to_bob(channel: str, text: str, id: str) -> list[str]:
    data = json.dumps({"text": text})
    return ["publish", "--to", "bob", "--type", "demo.hello", "--channel", channel, "--data", data, "--id", id]


async def test_what_twilio_tells_of_a_text_on_the_outbox_page_is_seen_by_the_gateway(shared: Stack) -> None:
    await asyncio.to_thread(shared.run, *to_bob("sms", "to be stopped", "told"))
    async with page_of(shared) as page:
        message = await eventually(lambda: page.message("sms", "bob", "to be stopped"))
        number, to = message["number"], message["to"]
        for word, status in (("lies", 400), ("bounced", 404), ("stop", 200), ("delivered", 200)):
            assert await page.tell(number, word) == status, word
        assert await page.suppressed("sms", to) == ["opted_out"]
        await eventually(lambda: page.is_said("told", "bob", "sms", "delivered"))
        assert await page.tell(number, "start") == 200
        assert await page.suppressed("sms", to) == []
        assert await page.tell(999_999, "stop") == 404


async def test_what_sendgrid_tells_of_a_mail_on_the_outbox_page_is_seen_by_the_gateway(shared: Stack) -> None:
    for id in ("arrives", "bounces"):
        await asyncio.to_thread(shared.run, *to_bob("email", f"a mail that {id}", id))
    async with page_of(shared) as page:
        mails = {
            id: await eventually(partial(page.message, "email", "bob", f"a mail that {id}"))
            for id in ("arrives", "bounces")
        }
        assert {one["provider"] for one in mails.values()} == {"SendGrid"}
        assert await page.tell(mails["arrives"]["number"], "stop") == 404
        assert await page.tell(mails["arrives"]["number"], "delivered") == 200
        await eventually(lambda: page.is_said("arrives", "bob", "email", "delivered"))
        assert await page.tell(mails["bounces"]["number"], "bounced") == 200
        await eventually(lambda: page.is_said("bounces", "bob", "email", "failed"))
        assert await page.suppressed("email", mails["bounces"]["to"]) == ["hard_bounce"]
        assert await page.tell(mails["arrives"]["number"], "complained") == 200
        assert await page.suppressed("email", mails["arrives"]["to"]) == ["complaint"], "of the same address"


async def test_what_the_readme_publishes_is_seen_as_a_record_a_push_a_mail_and_a_text(
    shared: Stack, browser: Chromium
) -> None:
    described = shared.describe()
    inbox = await browser.open(f"{described.gateway_url}/?user=alice")
    link = await inbox.until(
        "!document.querySelector('#to-outbox').hidden && document.querySelector('#to-outbox').href"
    )
    assert described.outbox_url is not None
    assert described.outbox_url in shared.output.read_text()
    assert link == f"{described.outbox_url}/?user=alice"
    page = await browser.open(link)
    text = "<img src=x onerror='window.hacked = true'>"  # whatever stands in it is shown as it is
    words = readme_command("publish")
    words[words.index("--data") + 1] = json.dumps({"text": text})
    await asyncio.to_thread(shared.run, *words)
    await eventually(lambda: _logged(shared, "alice", {"text": text}))
    is_shown = (
        f"(place) => [...document.querySelectorAll(place)].filter((one) => one.textContent === {json.dumps(text)})"
    )
    for place, count in (
        ("[data-channel=push][data-user=alice] .banner p", 3),  # her phones, and her browser
        ("[data-channel=email][data-user=alice] .subject", 1),
        ("[data-channel=sms][data-user=alice] .bubble", 1),
        ("#banners p", 1),
    ):
        await page.until(f"({is_shown})({json.dumps(place)}).length >= {count}")
    mail = f"({is_shown})('[data-channel=email] .subject')[0].closest('li')"
    await page.evaluate(f"{mail}.scrollIntoView()")
    assert await page.evaluate(f"{mail}.querySelector('iframe').sandbox.length") == 0, "nothing is allowed in it"
    assert await page.evaluate(f"{mail}.querySelector('iframe').contentDocument") is None, "it is another site"
    html = await page.evaluate(f"fetch({mail}.querySelector('iframe').src).then((answer) => answer.text())")
    assert "&lt;img src=x" in html
    assert await page.evaluate("window.hacked") is None
    assert await page.evaluate("document.querySelector('#to-inbox').href") == f"{described.gateway_url}/?user=alice"
    await inbox.until("!!document.querySelector('#list details')")
    await inbox.evaluate("document.querySelector('#list details').open = true")
    for channel in ("push", "email", "sms"):
        way = f"[...document.querySelectorAll('#list li[data-way={channel}][data-state=sent]')]"
        await inbox.until(f"{way}.some((one) => one.textContent.includes('attempt 1'))")
    assert page.errors == []


def readme_command(name: str) -> list[str]:
    """The words of the one `seamark <name>` that the README begins with."""
    shown = [words for block in blocks() if block.document == "README.md" for words in block.commands]
    return next(words[1:] for words in shown if words[:2] == ["seamark", name])


async def test_a_plain_core_publish_is_delivered_and_the_same_id_again_adds_nothing(shared: Stack) -> None:
    async with connected(shared.describe().nats_url) as broker:
        for _ in range(2):
            broker.publish("events.default.brigid.demo.hello", b'{"id":"e1","to":["brigid"],"data":{}}')
        broker.publish("events.default.brigid.demo.hello", b'{"id":"e2","to":["brigid"],"data":{}}')
        await eventually(lambda: _has(broker, "e2"))
        assert [entry.id for entry in await all_records(broker, 4) if entry.user == "brigid"] == ["e1", "e2"]
    lines = await asyncio.to_thread(shared.run, "tail", "brigid", "-n", "2", "--json")
    assert [json.loads(line)["record"]["id"] for line in lines.splitlines()] == ["e1", "e2"]


def test_a_crashed_server_is_restarted_on_its_data_and_that_is_said(battered: Stack) -> None:
    battered.run("publish", "--to", "anna", "--id", "anna-before")
    for server in ("nats-server", "valkey", "postgres"):
        battered.child(server).kill()
        is_restarted(battered, server)
    battered.run("publish", "--to", "anna", "--id", "anna-after")
    lines = battered.run("tail", "anna", "-n", "2", "--json").splitlines()
    assert [json.loads(line)["record"]["id"] for line in lines] == ["anna-before", "anna-after"]


def served(stack: Stack, method: str, path: str, body: Any = None, *, key: str | None = None) -> tuple[int, Any]:
    """What the gateway answers a service that has this key; the developer's where none is given."""
    described = stack.describe()
    headers = {"Authorization": f"Bearer {key or described.api_key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    url = f"{described.gateway_url}{urllib.parse.quote(path, safe='/?=&')}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data=data, headers=headers, method=method), timeout=60
        ) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def is_restarted(stack: Stack, name: str) -> None:
    """Returns when the stack has said that it starts this process again, as it was killed."""
    said = stack.output.read_text
    wait_for(lambda: f"{name} ended (SIGKILL), restarting" in said(), said=said)


async def _logged(stack: Stack, user: str, data: dict[str, Any]) -> bool:
    """Whether the user has a record with this; other tests of the stack may have left others."""
    lines = (await asyncio.to_thread(stack.run, "log", user, "--json")).splitlines()
    return any((json.loads(line)["record"] or {}).get("data") == data for line in lines)


async def _has(broker: object, event_id: str) -> bool:
    return any(entry.id == event_id for entry in await all_records(broker, 4))  # type: ignore[arg-type]


def test_a_crashed_role_is_restarted_and_that_is_said(battered: Stack) -> None:
    for role in ("dispatcher", "gateway"):
        battered.child(role).kill()
        is_restarted(battered, role)
    battered.run("publish", "--to", "berta", "--id", "berta-after")
    [line] = battered.run("tail", "berta", "-n", "1", "--json").splitlines()
    assert json.loads(line)["record"]["id"] == "berta-after"


def test_ctrl_c_leaves_no_process_and_a_second_run_goes_on_with_the_same_data(battered: Stack) -> None:
    before = battered.describe()
    assert served(battered, "DELETE", "/v1/users/carol")[0] == 202
    battered.run("publish", "--to", "frieda", "--id", "frieda-first")
    cursor = json.loads(battered.run("tail", "frieda", "-n", "1", "--json"))["cursor"]
    family = battered.stop()
    assert not (battered.folder / ".seamark/dev.json").exists()
    assert len(family) >= 5
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    battered.start()
    after = battered.describe()
    assert (after.jwt_secret, after.api_key, after.nats_url) == (before.jwt_secret, before.api_key, before.nats_url)
    assert [user["id"] for user in served(battered, "GET", "/v1/users")[1]["items"]] == ["alice", "bob"], (
        "carol stays away"
    )
    battered.run("publish", "--to", "frieda", "--id", "frieda-second")
    frame = json.loads(battered.run("tail", "frieda", "-n", "1", "--json", "--cursor", cursor))
    assert (frame["record"]["id"], frame["prev"]) == ("frieda-second", int(cursor.split(".")[1]))


def test_keys_to_the_stack_are_readable_by_its_owner_only(shared: Stack) -> None:
    for name in ("dev.json", "kept.json"):
        assert stat.S_IMODE((shared.folder / ".seamark" / name).stat().st_mode) == 0o600
    kept = shared.describe()
    logs = "".join(path.read_text(errors="replace") for path in (shared.folder / ".seamark").glob("*.log"))
    assert kept.jwt_secret not in logs
    assert kept.api_key not in logs


def test_a_second_stack_on_the_same_data_says_so(shared: Stack) -> None:
    done = seamark("dev", folder=shared.folder)
    assert done.returncode == MISCONFIGURED
    assert "a stack already runs" in done.stderr


def test_without_a_stack_a_command_names_the_remedy(tmp_path: Path) -> None:
    done = seamark("tail", "alice", folder=tmp_path)
    assert done.returncode == MISCONFIGURED
    assert "make run" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_suggested_commands_find_a_stack_in_a_folder_of_another_name(peculiar: Stack) -> None:
    with urllib.request.urlopen(f"{peculiar.describe().gateway_url}/dev/session", timeout=60) as answer:
        of_the_page = json.load(answer)["command"] + " --to alice --data '{}'"
    printed = re.findall(r"seamark ((?:publish|tail) .*)$", peculiar.output.read_text(), re.MULTILINE)
    assert [words.split()[0] for words in printed] == ["publish", "tail"]
    for command in (of_the_page.partition("seamark ")[2], printed[0], f"{printed[1]} -n 2 --json"):
        output = peculiar.run(*shlex.split(command))
    assert [json.loads(line)["record"]["data"] for line in output.splitlines()] == [{}, {"text": "hi"}]


@pytest.mark.parametrize("as_files", [False, True], ids=["by value", "by file"])
def test_servers_named_in_the_environment_are_used_and_left_running(
    as_files: bool, tmp_path: Path, nats_server: NatsServer, valkey: Valkey, empty_postgres: str
) -> None:
    urls = {
        "SEAMARK_NATS_URL": nats_server.url,
        "SEAMARK_REDIS_URL": valkey.url,
        "SEAMARK_POSTGRES_URL": empty_postgres,
    }
    stack = Stack(tmp_path, **(written(tmp_path, urls) if as_files else urls))
    stack.start()
    try:
        described = stack.describe()
        assert (described.nats_url, described.redis_url, described.postgres_url) == tuple(urls.values())
        stack.run("publish", "--to", "alice", "--id", "outside")
        [line] = stack.run("tail", "alice", "-n", "1", "--json").splitlines()
        assert json.loads(line)["record"]["id"] == "outside"
        assert not (tmp_path / ".seamark/nats").exists()
        assert served(stack, "GET", "/v1/users")[1]["items"] == [], "nobody is added to a database of somebody else's"
    finally:
        stack.stop()
    assert nats_server.alive
    assert valkey.alive


def written(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """The same settings, each as a file."""
    for name, value in settings.items():
        (folder / name).write_text(f"{value}\n")
    return {f"{name}_FILE": str(folder / name) for name in settings}


def test_what_was_left_in_the_shell_does_not_stand_against_what_the_stack_prints(peculiar: Stack) -> None:
    here = ["--folder", peculiar.data.name]
    peculiar.run("publish", *here, "--to", "linda", "--id", "linda-first")
    [line] = peculiar.run("tail", *here, "linda", "-n", "1", "--json").splitlines()
    assert json.loads(line)["record"]["id"] == "linda-first"
    assert "restarting" not in peculiar.output.read_text()


def test_a_port_that_is_taken_starts_nothing_and_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = seamark("dev", "--port", str(taken.getsockname()[1]), folder=tmp_path)
    assert done.returncode == MISCONFIGURED
    assert "--port" in done.stderr
    assert not (tmp_path / ".seamark/nats").exists()


def test_a_killed_stack_can_be_started_again_at_once_on_its_data(battered: Stack) -> None:
    battered.run("publish", "--to", "klara", "--id", "klara-before")
    family = battered.children()
    assert battered.process is not None
    battered.process.kill()
    battered.process.wait()
    battered.start()
    lines = battered.run("tail", "klara", "-n", "1", "--json").splitlines()
    assert [json.loads(line)["record"]["id"] for line in lines] == ["klara-before"]
    wait_for(lambda: not any(runs(process) for process in family), said=lambda: family)


def test_a_stack_that_is_ended_while_it_makes_its_database_holds_the_folder_until_that_is_done(tmp_path: Path) -> None:
    stack, making = making_its_database(tmp_path)
    assert stack.process is not None
    said = stack.output.read_text
    stack.process.send_signal(signal.SIGINT)
    with (stack.data / "lock").open() as lock:
        wait_for(lambda: locks(lock), every_seconds=0.005, said=said)
        assert not any(runs(process) for process in making)
    assert stack.process.wait(60) == 0, stack.output.read_text()
    stack.start()
    stack.stop()


def making_its_database(folder: Path) -> tuple[Stack, list[psutil.Process]]:
    """A stack in the midst of that, and who does it. Where it was over before we looked, another stack is started."""

    def makers(stack: Stack) -> list[psutil.Process]:
        found = []
        for child in stack.children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "initdb" in child.name():
                    found.append(child)
        return found

    for attempt in range(10):
        (folder / f"{attempt}").mkdir()
        stack = Stack(folder / f"{attempt}")
        stack.spawn()
        assert stack.process is not None
        said, found = stack.output.read_text, list[psutil.Process]()
        while not found and "applying topology" not in said():
            assert stack.process.poll() is None, said()
            time.sleep(0.005)  # a poll: its makers live for less than a second
            found = makers(stack)
        if found:
            return stack, found
        stack.close()
    raise AssertionError("ten databases were made between two looks each")


def locks(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended between the two
        return False


async def test_a_message_that_is_no_record_does_not_hide_the_log(battered: Stack) -> None:
    async def logged(count: int) -> bool:
        return len((await asyncio.to_thread(battered.run, "log", "carla", "--json")).splitlines()) == count

    await asyncio.to_thread(battered.run, "publish", "--to", "carla", "--id", "carlas-first")
    async with connected(battered.describe().nats_url) as broker:
        await eventually(lambda: _has(broker, "carlas-first"))
        subject = log_subject(partition_of("default", "carla", 4), "default", "carla")
        for payload in (b"not json [bold]", b"[1]", b"\xff"):
            await broker.append(subject, payload)
    await asyncio.to_thread(battered.run, "publish", "--to", "carla", "--id", "carlas-last")
    await eventually(lambda: logged(5), seconds=120)
    lines = battered.run("log", "carla", "--json").splitlines()
    records = [json.loads(line) for line in lines]
    assert [line["record"] and line["record"]["id"] for line in records] == [
        "carlas-first",
        None,
        None,
        None,
        "carlas-last",
    ]
    assert [line["raw"] for line in records[1:4]] == ["not json [bold]", "[1]", "\ufffd"]
    shown = await asyncio.to_thread(battered.run, "log", "carla")
    assert "not json [bold]" in shown
    assert "id carlas-last" in shown


# --- the page, as a newcomer finds it -------------------------------------------------------------------------------


def text(id: str) -> str:
    return f"document.querySelector('#{id}').textContent"


async def choose(page: Page, selector: str, value: str) -> None:
    """Choose in a list, as a person does."""
    await page.evaluate(
        f"""(() => {{
          const list = document.querySelector({json.dumps(selector)});
          list.value = {json.dumps(value)};
          if (list.value !== {json.dumps(value)}) throw new Error("there is no such choice");
          list.dispatchEvent(new Event("change", {{ bubbles: true }}));
        }})()"""
    )


def holds(line: str, channel: str) -> str:
    """What stands in the table for a channel of a type: the choice and its source; null before it is drawn."""
    return (
        "[...document.querySelectorAll('#choices tbody tr')].filter((row) => row.querySelector('th').firstChild.textContent"
        f" === {json.dumps(line)}).map((row) => row.querySelector('[data-label=\"{channel}\"] .holds'))"
        ".map((cell) => cell && `${cell.dataset.choice} ${cell.dataset.source}`)[0]"
    )


async def test_what_is_switched_off_on_the_page_holds_for_the_next_event_and_its_plan_says_so(
    shared: Stack, browser: Chromium
) -> None:
    assert served(shared, "PUT", "/v1/users/dora", {"email": "dora@example.com"})[0] == 200
    page = await browser.open(f"{shared.describe().gateway_url}/?user=dora#preferences")
    await page.until(f"{holds('parcel.*', 'E-mail')} === 'on rule'")
    await page.until(f"{holds('parcel.*', 'In the app')} === 'on always'")
    await choose(page, "select[data-path='types/parcel.*/email']", "off")
    await page.until(f"{text('saved')} === 'Not saved yet'")
    await page.click("#save")
    await page.until(f"{holds('parcel.*', 'E-mail')} === 'off user_type'")
    expected = {"types": {"parcel.*": {"email": "off"}}}
    wait_for(lambda: served(shared, "GET", "/v1/users/dora/preferences")[1]["document"] == expected)
    for width in (1280, 360):
        await page.size(width, 800)
        for view in ("preferences", "campaigns"):
            await page.evaluate(f"location.hash = '{view}'")
            await page.until(f"!document.querySelector('#{view}').hidden")
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (view, width)
    await page.evaluate("location.hash = 'inbox'")
    await page.fill("#type", "parcel.sent")
    await page.click("#publish button:not(.quiet)")
    await page.until("!!document.querySelector('#list details')")
    await page.evaluate("document.querySelector('#list details').open = true")
    for channel, why in (("inapp", "default"), ("email", "type_off"), ("push", "no_token")):
        await page.until(f"document.querySelector('#list li[data-channel={channel}]')?.dataset.why === '{why}'")
    assert page.errors == []


async def test_who_saves_preferences_of_an_older_version_is_told_and_keeps_what_he_chose(
    shared: Stack, browser: Chromium
) -> None:
    page = await browser.open(f"{shared.describe().gateway_url}/?user=emil#preferences")
    await page.until(f"{holds('news.*', 'E-mail')} === 'on rule'")
    await choose(page, "select[data-path='channels/push']", "off")
    await choose(page, "#quiet-mode", "own")
    status, faster = served(shared, "PATCH", "/v1/users/emil/preferences", {"categories": {"news": {"email": "off"}}})
    assert status == 200
    await page.click("#save")
    await page.until("!document.querySelector('#preferences-notice').hidden")
    said = await page.evaluate(text("preferences-notice"))
    assert f"version {faster['version']}; you began with 0" in said
    assert served(shared, "GET", "/v1/users/emil/preferences")[1] == faster, "nothing was saved"
    await page.until(f"{holds('news.*', 'E-mail')} === 'off user_category'")  # what was saved elsewhere is shown
    await page.click("#save")
    await page.until(f"{holds('parcel.*', 'Push')} === 'off user_channel'")
    assert served(shared, "GET", "/v1/users/emil/preferences")[1]["document"] == {
        "channels": {"push": "off"},
        "categories": {"news": {"email": "off"}},
        "quiet_hours": {"windows": [{"start": "22:00", "end": "07:00"}]},
    }
    await page.until("document.querySelector('#preferences-notice').hidden")
    await page.until(f"{text('quiet-holds')}.includes('22:00 to 07:00 every day (your choice)')")
    assert page.errors == []


NIGHT = {"windows": [{"start": "22:00", "end": "07:00"}]}
DOCUMENTS: list[dict[str, Any]] = [
    {},
    {"channels": {"push": "off"}},
    {"channels": {"push": "on", "*": "off"}, "timezone": "Europe/Vienna"},
    {"categories": {"__proto__": {"email": "off"}, "constructor": {"push": "off"}}},
    {"types": {"a.b": {"push": "off"}, "a.*": {"email": "digest"}}, "quiet_hours": {}},
    {"types": {"a.b": {"email": "off"}}, "quiet_hours": NIGHT},
    {"quiet_hours": {**NIGHT, "channels": ["push"]}},
    {"quiet_hours": {"windows": [*NIGHT["windows"], {"start": "12:00", "end": "13:00", "days": ["sun"]}]}},
]


async def test_the_patch_of_the_page_makes_any_document_of_any_other(shared: Stack, browser: Chromium) -> None:
    page = await browser.open(f"{shared.describe().gateway_url}/?user=nobody")
    told = json.dumps(json.dumps(DOCUMENTS))
    made = await page.evaluate(
        f"""import("/preferences.js").then(({{ difference, merged }}) => {{
          const all = JSON.parse({told});
          const patched = (one, patch) => [patch, merged(one, patch)];
          return JSON.stringify(all.map((one) => all.map((other) => patched(one, difference(one, other)))));
        }})"""
    )
    documents = [msgspec.convert(one, Preferences) for one in DOCUMENTS]
    for before, row in zip(documents, json.loads(made), strict=True):
        for after, [patch, here] in zip(documents, row, strict=True):
            assert merged(before, patch) == after, (before, patch)
            assert msgspec.convert(here, Preferences) == after


async def test_a_campaign_started_on_the_page_reaches_its_total_and_the_inbox(shared: Stack, browser: Chromium) -> None:
    url = shared.describe().gateway_url
    assert served(shared, "GET", "/v1/topics/news")[1]["members"] == 3, "there is somebody from the first minute"
    assert served(shared, "PUT", "/v1/topics/crew/members", {"users": ["fay", "gil"]}) == (200, {"members": 2})
    page = await browser.open(f"{url}/?user=fay#campaigns")
    await page.until("!!document.querySelector('#campaign-audience option[value=\"topic:crew\"]')")
    await page.click("#dry-run")
    await page.until(f"{text('campaign-said')}.startsWith('Dry run: ')")
    await choose(page, "#campaign-audience", "topic:crew")
    await page.click("#dry-run")
    await page.until(f"{text('campaign-said')} === 'Dry run: 2 of 2 would get it. Nothing was sent.'")
    why = await page.evaluate("[...document.querySelectorAll('#campaign-decisions li')].map((one) => one.textContent)")
    assert why == ["In the app, of all 2: 2 now: default", "E-mail, of all 2: 2 never: no_address"]
    id = await page.evaluate("document.querySelector('#campaign-id').value")
    assert served(shared, "GET", f"/v1/campaigns/{id}")[0] == 404
    await page.fill("#campaign-title", "All hands")
    await page.click("#start")
    item = f"document.querySelector('[data-id=\"{id}\"]')"
    await page.until(f"{item}?.dataset.state === 'done'")
    # All of them are on their way by now, but perhaps not there.
    await page.until(f"{item}.querySelector('.sum').textContent === '2 users = 2 in their logs'")
    bar = f"{item}.querySelector('[role=progressbar]')"
    assert await page.evaluate(f"[{bar}.ariaValueNow, {bar}.ariaValueMax]") == ["2", "2"]
    await page.until(f"[...{item}.querySelectorAll('button')].every((one) => one.hidden)")
    await page.evaluate("location.hash = 'inbox'")
    await page.until("document.querySelector('#list h3')?.textContent === 'All hands'")
    assert page.errors == []


async def test_a_campaign_is_held_up_resumed_and_ended_by_the_buttons_and_its_numbers_always_add_up(
    shared: Stack, browser: Chromium
) -> None:
    crowd = [f"h{number:03}" for number in range(400)]
    assert served(shared, "PUT", "/v1/topics/crowd/members", {"users": crowd}) == (200, {"members": 400})
    page = await browser.open(f"{shared.describe().gateway_url}/?user=h000#campaigns")
    await page.until("!!document.querySelector('#campaign-audience option[value=\"topic:crowd\"]')")
    await choose(page, "#campaign-audience", "topic:crowd")
    await page.fill("#campaign-rate", "1")  # five users to a page, and five seconds between them: time to press buttons
    await page.fill("#campaign-id", "slow")
    await page.evaluate(
        """window.sums = [];
        new MutationObserver(() => {
          const sum = document.querySelector("[data-id=slow] .sum");
          if (sum && sum.textContent !== sums.at(-1)) sums.push(sum.textContent);
        }).observe(document.querySelector("#campaign-list"), { childList: true, subtree: true, characterData: true })"""
    )
    await page.click("#start")
    state = "document.querySelector('[data-id=slow]')?.dataset.state"
    await page.until("window.sums.at(-1)?.includes('in their logs')")
    for button, then in (("Pause", "paused"), ("Resume", "running"), ("Pause", "paused"), ("Cancel", "cancelled")):
        await page.click(f"[data-id=slow] [data-do={button}]")
        await page.until(f"{state} === '{then}'")
        assert served(shared, "GET", "/v1/campaigns/slow/progress")[1]["state"] == then
    await page.until("!!document.querySelector('[data-id=slow] .pace').textContent.includes('over since')")
    sums = await page.evaluate("sums")
    assert "cancelled" in sums[-1]
    for said in sums:
        audience, *parts = [int(number) for number in re.findall(r"\d+", said)]
        assert audience == sum(parts), said
    assert "do not add up" not in await page.evaluate("document.body.textContent")
    assert page.errors == []


async def test_every_control_of_the_views_has_a_name(shared: Stack, browser: Chromium) -> None:
    page = await browser.open(f"{shared.describe().gateway_url}/?user=iris#preferences")
    await page.until(f"{holds('parcel.*', 'E-mail')}")
    await choose(page, "#quiet-mode", "own")
    await page.call("Accessibility.enable")
    for view, least in (("preferences", 20), ("campaigns", 8)):
        await page.evaluate(f"location.hash = '{view}'")
        await page.until(f"!document.querySelector('#{view}').hidden")
        tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        roles = ("button", "textbox", "combobox", "checkbox", "spinbutton", "link", "list", "progressbar")
        controls = [one for one in tree if one.get("role", {}).get("value") in roles and not one.get("ignored")]
        assert len(controls) >= least
        assert [one for one in controls if not one.get("name", {}).get("value")] == []


def test_the_key_of_the_page_allows_what_the_page_does_and_no_more(shared: Stack) -> None:
    described = shared.describe()
    with urllib.request.urlopen(f"{described.gateway_url}/dev/session", timeout=60) as answer:
        key = json.load(answer)["api_key"]
    assert key != described.api_key
    for path in ("/v1/topics", "/v1/campaigns"):
        assert served(shared, "GET", path, key=key)[0] == 200
    for method, path, body in (
        ("GET", "/v1/users", None),
        ("PUT", "/v1/users/alice", {}),
        ("PUT", "/v1/topics/news/members", {"users": ["mallory"]}),
        ("PUT", "/v1/types/a.b", {}),
        ("DELETE", "/v1/users/alice/sessions", None),
    ):
        assert served(shared, method, path, body, key=key)[0] == 403, path
