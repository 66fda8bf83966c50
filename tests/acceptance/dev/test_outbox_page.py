"""The outbox page of `seamark dev`: what every channel has accepted, and what its buttons tell the gateway."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import aiohttp
import pytest

from tests.support.chromium import Chromium
from tests.support.devstack import Stack
from tests.support.documents import blocks
from tests.support.logs import eventually

pytestmark = pytest.mark.timeout(400)


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


async def _logged(stack: Stack, user: str, data: dict[str, Any]) -> bool:
    """Whether the user has a record with this; other tests of the stack may have left others."""
    lines = (await asyncio.to_thread(stack.run, "log", user, "--json")).splitlines()
    return any((json.loads(line)["record"] or {}).get("data") == data for line in lines)
