"""The outbox of a development stack: its providers, reached by the file that the worker is given, and its page over HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from engine.channels.channel import Context, Job, Outcome
from engine.channels.webhook.channel import Endpoint
from engine.worker.providers import SENT_BY_WORKERS, ProvidersFile
from ops.dev.outbox.faults import NAMES, fault_of
from ops.dev.outbox.messages import Outbox
from ops.dev.outbox.page import FILES, serving
from ops.dev.outbox.people import people
from ops.dev.outbox.providers import RECEIVER, Providers, running
from tests.support.pushing import android_device, apple_device, browser_target

DATA = {"title": "Shipped <b>", "text": "On its way", "url": "https://shop.example.com/17"}


class Sending(NamedTuple):
    """A running outbox, and channels that send to it, by their names, of push by platforms."""

    outbox: Outbox
    providers: Providers
    channels: dict[str, Any]
    targets: dict[str, tuple[str, Any]]

    async def send(self, target: str, *, seconds: float = 20.0) -> Outcome:
        """To `apns`, `apns sandbox`, `fcm`, `webpush`, `email`, `sms` or `webhook`."""
        name, where = self.targets[target]
        channel = self.channels[where.platform if name == "push" else name]
        job = Job(id="order-17", tenant="default", user="alice", type="order.shipped", channel=channel.name,
                  first_at=datetime.now(UTC), data=DATA, target=target)  # fmt: skip
        rendered = channel.render(job, Context(now=datetime.now(UTC), unread=3))
        outcome = await channel.send(rendered, where, key=job.key, deadline_seconds=seconds)
        assert isinstance(outcome, Outcome)
        return outcome


@contextlib.asynccontextmanager
async def sending(folder: Path) -> AsyncIterator[Sending]:
    outbox = Outbox()
    async with running(folder, outbox) as providers:
        file = ProvidersFile(providers.file)
        found = [(one.platform or name, one.channel) for name in SENT_BY_WORKERS for one in file.providers(name)]
        channels = dict(reversed(found))  # of several the first, as a worker's desk would
        targets = {
            "apns": ("push", apple_device()),
            "apns sandbox": ("push", apple_device(environment="sandbox")),
            "fcm": ("push", android_device()),
            "webpush": ("push", browser_target(providers.push.subscribe("alice"))),
            "email": ("email", "alice@example.com"),
            "sms": ("sms", "+447700900001"),
            "webhook": ("webhook", Endpoint("wh_1", f"https://{RECEIVER}/hooks", (providers.webhook_secret,))),
        }
        try:
            yield Sending(outbox, providers, channels, targets)
        finally:
            for _, channel in found:
                await channel.close()


async def test_what_each_channel_sends_stands_in_the_outbox_and_what_was_registered_outlives_a_restart(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "providers"
    async with sending(folder) as first:
        kept = first.targets
    async with sending(folder) as again:
        for target, (channel, where) in kept.items():
            if target != "webpush":  # its endpoint has the port of the run before, which a stack keeps
                again.targets[target] = channel, where
            assert (await again.send(target)).kind == "ok"
        assert kept["webpush"][1].keys == again.targets["webpush"][1].keys
        assert kept["webpush"][1].token.rpartition("/")[2] == again.targets["webpush"][1].token.rpartition("/")[2]
        seen = {message.provider: message for message in again.outbox.newest_first()}
        html = again.outbox.html_of(seen["SendGrid"].number)
    pushed = {"title": "Shipped <b>", "body": "On its way", "url": DATA["url"], "badge": 3, "type": "order.shipped"}
    for provider in ("APNs", "APNs sandbox", "FCM", "Web Push"):
        assert {name: seen[provider].shown[name] for name in pushed} == pushed
    assert seen["SendGrid"].shown["subject"] == DATA["title"]
    assert "Shipped &lt;b&gt;" in html
    assert len(seen["Twilio"].shown["segments"]) == 1
    assert (seen["Receiver"].verified, seen["Receiver"].shown["body"]["data"]) == (True, DATA)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert {name for name, mode in modes.items() if mode != 0o600} == {"authority.pem"}


async def test_a_fault_that_is_switched_on_means_to_each_sender_what_its_button_says(tmp_path: Path) -> None:
    async with sending(tmp_path / "providers") as running:
        for fault, kind in (("throttled", "throttled"), ("unavailable", "transient"), ("gone", "target_invalid")):
            for channel in ("push", "email", "sms", "webhook"):
                running.providers.switch(channel, fault)
            outcomes = dict(
                zip(running.targets, await asyncio.gather(*map(running.send, running.targets)), strict=True)
            )
            assert {name: one.kind for name, one in outcomes.items()} == dict.fromkeys(running.targets, kind), fault
            asked = {name: one.retry_after_seconds for name, one in outcomes.items() if one.kind == "throttled"}
            assert all(seconds is not None and 5 <= seconds <= 60 for seconds in asked.values()), asked
        for fault in ("hang", "reset"):
            for channel in ("push", "email", "sms", "webhook"):
                running.providers.switch(channel, fault)
            some = await asyncio.gather(*(running.send(name, seconds=3.0) for name in running.targets))
            assert {one.kind for one in some} <= {"transient", "ambiguous"}, fault
        assert running.outbox.accepted == 0
        for channel in ("push", "email", "sms", "webhook"):
            running.providers.switch(channel, None)
        assert running.providers.standing == {}
        assert (await running.send("sms")).kind == "ok"


def test_every_kind_of_provider_has_every_fault() -> None:
    for kind in ("apns", "fcm", "webpush", "sendgrid", "smtp", "twilio", "sns", "webhook"):
        assert len({repr(fault_of(kind, name)) for name in NAMES}) == len(NAMES)


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, Sending]]:
    """Without a directory: nobody answers there."""
    async with (
        sending(tmp_path / "providers") as running,
        people("postgresql://nobody@127.0.0.1:9/nothing") as asked,
        serving("127.0.0.1", 0, running.outbox, running.providers, asked) as url,
        aiohttp.ClientSession(url) as http,
    ):
        yield http, running


async def answer(http: aiohttp.ClientSession, path: str) -> Any:
    async with http.get(path) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_messages_are_told_by_channel_and_user_while_the_directory_is_away(page) -> None:
    http, running = page
    for target in ("sms", "webhook", "email"):
        await running.send(target)
    told = await answer(http, "/messages")
    assert [one["channel"] for one in told["messages"]] == ["email", "webhook", "sms"]
    assert (told["accepted"], told["found"], told["users"]) == (3, 3, ["alice"])
    assert [one["channel"] for one in (await answer(http, "/messages?user=alice"))["messages"]] == ["webhook"]
    assert [one["to"] for one in (await answer(http, "/messages?channel=sms&user="))["messages"]] == ["+447700900001"]
    assert (await answer(http, "/messages?limit=1"))["found"] == 3
    for query in ("channel=fax", "limit=0", "limit=x", "sender=me"):
        async with http.get(f"/messages?{query}") as response:
            assert response.status == 400
    async with http.delete("/messages") as response:
        assert response.status == 200
    assert (await answer(http, "/messages"))["messages"] == []


async def test_a_mail_is_served_so_that_it_can_run_and_load_nothing(page) -> None:
    http, running = page
    await running.send("email")
    (mail,) = (await answer(http, "/messages"))["messages"]
    assert "Shipped &lt;b&gt;" not in str(mail)
    async with http.get(f"/messages/{mail['number']}/html") as response:
        assert "Shipped &lt;b&gt;" in await response.text()
        policy = response.headers["Content-Security-Policy"].split("; ")
        assert {"sandbox", "default-src 'none'"} <= set(policy), "no scripts, no forms, an origin of its own"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    async with http.get("/messages/999/html") as response:
        assert response.status == 404


async def test_faults_are_switched_and_pages_that_are_open_are_told(page) -> None:
    http, running = page
    async with http.get("/changes", timeout=aiohttp.ClientTimeout(total=60)) as changes:
        assert await changes.content.readline() == b"data: 0\n"
        async with http.put("/faults/sms", json={"fault": "unavailable"}) as response:
            assert await response.json() == {"sms": "unavailable"}
        await changes.content.readline()
        assert await changes.content.readline() == b"data: 1\n"
    assert (await running.send("sms")).kind == "transient"
    assert (await answer(http, "/messages"))["faults"] == {"sms": "unavailable"}
    for path, body, status in (("sms", {"fault": "fire"}, 400), ("sms", [], 400), ("fax", {"fault": None}, 404)):
        async with http.put(f"/faults/{path}", json=body) as response:
            assert response.status == status
    async with http.put("/faults/sms", json={"fault": None}) as response:
        assert await response.json() == {}
    assert (await running.send("sms")).kind == "ok"


FOREIGN = [
    {"Host": "evil.example"},
    {"Origin": "http://evil.example"},
    {"Origin": "http://localhost:3000"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


async def test_no_other_site_reads_what_was_sent_or_switches_anything(page) -> None:
    http, running = page
    await running.send("email")
    for headers in FOREIGN:
        for method, path, body in (
            ("GET", "/messages", None),
            ("GET", "/messages/1/html", None),
            ("GET", "/changes", None),
            ("DELETE", "/messages", None),
            ("PUT", "/faults/sms", {"fault": "hang"}),
        ):
            async with http.request(method, path, headers=headers, json=body) as response:
                assert response.status == 403, (method, path, headers)
    assert (running.outbox.accepted, running.providers.standing) == (1, {})
    assert [one.channel for one in running.outbox.newest_first()] == ["email"]


async def test_the_page_is_served_under_a_policy_without_inline_code(page) -> None:
    http, _ = page
    for path in FILES:
        async with http.get(path) as response:
            assert response.status == 200
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
    html = await (await http.get("/")).text()
    assert 'style="' not in html
    assert "onclick" not in html
