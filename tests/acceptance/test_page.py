"""The inbox page and the JavaScript SDK in a real headless Chromium, on real servers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.subjects import encode_token, partition_of
from seamark import Publisher
from seamark.dev.servers import NatsServer, Valkey
from tests.support.chromium import Chromium, Page, chromium
from tests.support.network import BadNetwork, bad_network
from tests.support.spine import RunningGateway, Spine, spine

pytestmark = pytest.mark.timeout(120)

STATE = "document.querySelector('#state').dataset.state"
ITEMS = "[...document.querySelectorAll('#list > li')]"
TITLES = f"{ITEMS}.map((item) => item.querySelector('h3').textContent)"
UNREAD = f"{ITEMS}.filter((item) => item.matches('.unread')).length"


@pytest.fixture
async def way(nats_server: NatsServer, valkey: Valkey, postgres: str) -> AsyncIterator[Spine]:
    async with spine(nats_server.url, valkey.url, postgres) as running:
        yield running


@pytest.fixture
async def gateway(way: Spine) -> AsyncIterator[RunningGateway]:
    async with way.gateway() as running:
        yield running


@pytest.fixture
async def network(gateway: RunningGateway) -> AsyncIterator[BadNetwork]:
    async with bad_network(gateway.port) as running:
        yield running


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Chromium]:
    async with chromium(tmp_path) as running:
        yield running


async def live_page(browser: Chromium, url: str, user: str = "alice", **options: str) -> Page:
    """The page of `user`, caught up."""
    page = await browser.open(f"{url}/?user={user}", **options)
    await page.until(f"{STATE} === 'live'")
    return page


async def shown(page: Page, count: int) -> list[str]:
    """The titles, oldest first, once `count` are shown."""
    await page.until(f"{ITEMS}.length === {count}")
    return (await page.evaluate(TITLES))[::-1]


async def test_what_the_form_publishes_appears_and_so_does_what_a_service_publishes(browser, gateway, way):
    page = await live_page(browser, gateway.url)
    await page.until("!document.querySelector('#empty').hidden")
    assert "seamark publish --to alice" in await page.evaluate("document.querySelector('#command').textContent")
    await page.fill("#text", "from the form")
    await page.click("#publish button:not(.quiet)")
    assert await shown(page, 1) == ["from the form"]
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(
            to="alice", type="order.shipped", data={"title": "On its way", "body": "<b>Order 17</b>"}
        )
    assert await shown(page, 2) == ["from the form", "On its way"]
    assert await page.evaluate("document.querySelector('#empty').hidden")
    assert await page.evaluate(f"{ITEMS}[0].querySelector('.what > p').textContent") == "<b>Order 17</b>"
    assert await page.evaluate("document.querySelector('#badge').textContent") == "2"
    assert await page.evaluate("document.title") == "(2) Inbox · Seamark"
    cursor = await page.evaluate("document.querySelector('#cursor').textContent")
    assert cursor == await page.evaluate("seamark.cursor")
    assert page.errors == []


async def test_what_is_published_while_the_network_is_cut_appears_once_in_order_after_it(browser, network, way):
    page = await live_page(browser, network.url)
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "before"})
        await shown(page, 1)
        network.cut()
        await page.until(f"{STATE} !== 'live'")
        for number in range(5):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"missed {number}"})
        network.restore()
        await page.until(f"{STATE} === 'live'", seconds=20)
        await publisher.publish(to="alice", type="demo.n", data={"text": "after"})
    expected = ["before", *(f"missed {number}" for number in range(5)), "after"]
    assert await shown(page, 7) == expected
    assert await page.evaluate("document.querySelector('#received').textContent") == "7"
    assert page.errors == []


async def test_the_button_cuts_and_restores_and_the_marks_made_meanwhile_are_said_then(browser, gateway, way):
    page = await live_page(browser, gateway.url)
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "first"})
        await shown(page, 1)
        await page.click("#cut")
        await page.until(f"{STATE} === 'closed'")
        await publisher.publish(to="alice", type="demo.n", data={"text": "second"})
        await page.click("#list .read")
        assert await page.evaluate(UNREAD) == 1
        await page.click("#cut")
        assert await shown(page, 2) == ["first", "second"]
        await page.until(f"{UNREAD} === 1")
        assert await page.evaluate(f"{ITEMS}[1].matches('.unread')") is False
    assert page.errors == []


async def test_reading_in_one_tab_clears_the_other(browser, gateway, way):
    one, other = [await live_page(browser, gateway.url) for _ in range(2)]
    async with Publisher(nats_url=way.nats_url) as publisher:
        for number in range(3):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"n{number}"})
    for page in (one, other):
        await page.until(f"{UNREAD} === 3")
    await one.click("#list > li:nth-child(2) .read")
    for page in (one, other):
        await page.until(f"{UNREAD} === 2")
        assert await page.evaluate("document.querySelector('#badge').textContent") == "2"
    await other.click("#read-all")
    for page in (one, other):
        await page.until(f"{UNREAD} === 0")
        assert await page.evaluate("document.querySelector('#badge').hidden")
    reloaded = await live_page(browser, gateway.url)
    assert await shown(reloaded, 3) == ["n0", "n1", "n2"]
    assert await reloaded.evaluate(UNREAD) == 0
    assert one.errors + other.errors + reloaded.errors == []


async def test_a_count_with_a_bound_is_shown_as_one_with_more_behind_it(browser, gateway, way):
    page = await live_page(browser, gateway.url)
    partition = partition_of(encode_token("default"), encode_token("alice"), 4)
    for count, more, shows, says in ((500, True, "500+", "more than 500 unread"), (3, False, "3", "3 unread")):
        told = {"op": "unread", "count": count, "more": more, "stale": False, "categories": {}, "as_of": 1}
        way.broker.publish(f"live.{partition}.default.alice", json.dumps(told, separators=(",", ":")).encode())
        await page.until(f"document.querySelector('#badge').textContent === '{shows}'")
        assert await page.evaluate("document.querySelector('#badge').hidden") is False
        assert await page.evaluate("document.querySelector('#badge').getAttribute('aria-label')") == says
        assert await page.evaluate("document.title") == f"({shows}) Inbox · Seamark"
    assert page.errors == []


async def test_where_websockets_are_blocked_the_stream_carries_everything_and_resumes(browser, network, way):
    network.refuse_upgrades()
    page = await browser.open(f"{network.url}/?user=alice")
    await page.until(f"{STATE} === 'live'", seconds=20)
    assert await page.evaluate("document.querySelector('#transport').textContent") == "server-sent events"
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "one\nline"})
        await shown(page, 1)
        await page.click("#list .read")
        await page.until(f"{UNREAD} === 0")
        network.cut()
        await page.until(f"{STATE} !== 'live'")
        for number in range(5):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"missed {number}"})
        network.restore()
        await page.until(f"{STATE} === 'live'", seconds=30)
    assert await shown(page, 6) == ["one\nline", *(f"missed {number}" for number in range(5))]
    assert page.errors == []


async def test_a_mark_that_a_stream_could_not_send_waits_for_the_next_session(browser, network, way):
    network.refuse_upgrades()
    page = await browser.open(f"{network.url}/?user=alice")
    await page.until(f"{STATE} === 'live'", seconds=20)
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "one"})
    await shown(page, 1)
    await page.block("*/v1/inbox/read*")
    await page.click("#list .read")
    await page.until("seamark.waitingIds.size === 1")
    await page.block()
    network.refuse_upgrades(on=False)
    network.cut()
    network.restore()
    await page.until(f"{UNREAD} === 0", seconds=30)
    assert page.errors == []


async def test_users_of_two_browsers_see_only_their_own(browser, gateway):
    alice = await live_page(browser, gateway.url, "alice")
    bob = await live_page(browser, gateway.url, "bob", context=await browser.new_context())
    await alice.fill("#to", "bob")
    await alice.fill("#text", "for bob")
    await alice.click("#publish button:not(.quiet)")
    assert await shown(bob, 1) == ["for bob"]
    await bob.fill("#to", "alice, bob")
    await bob.fill("#text", "for both")
    await bob.click("#publish button:not(.quiet)")
    assert await shown(bob, 2) == ["for bob", "for both"]
    assert await shown(alice, 1) == ["for both"]


async def test_a_gateway_that_restarts_is_found_again(browser, way):
    async with way.gateway() as first:
        page = await live_page(browser, first.url)
        port = first.port
    await page.until(f"{STATE} === 'waiting'")
    async with way.gateway(port), Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "while it was away"})
        await page.until(f"{STATE} === 'live'", seconds=30)
        assert await shown(page, 1) == ["while it was away"]


async def test_the_page_is_usable_without_eyes_and_without_a_mouse(browser, gateway, way):
    page = await live_page(browser, gateway.url)
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "heard"})
    await shown(page, 1)
    await page.until("document.querySelector('#announce').textContent === 'New notification: heard'")
    await page.call("Accessibility.enable")
    tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
    controls = [node for node in tree if node.get("role", {}).get("value") in ("button", "textbox", "link", "list")]
    names = [node.get("name", {}).get("value") for node in controls if not node.get("ignored")]
    assert len(names) >= 10
    assert all(names), controls
    assert "Mark read: heard" in names


async def test_without_a_key_there_is_no_form(browser, way):
    async with way.gateway(dev_api_key=None) as gateway:
        page = await live_page(browser, gateway.url)
        assert await page.evaluate("document.querySelector('#publish-card').hidden")


async def test_light_dark_and_narrow_all_fit(browser, gateway, way, tmp_path: Path):
    page = await live_page(browser, gateway.url)
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "word" * 60, "body": "long " * 80})
    await shown(page, 1)
    for width in (1280, 768, 360):
        await page.size(width, 800)
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    backgrounds = []
    for dark in (False, True):
        await page.dark(dark)
        backgrounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        await page.screenshot(tmp_path / f"dark-{dark}.png")
    assert backgrounds[0] != backgrounds[1]


async def test_the_session_of_the_page_is_for_this_machine_and_this_page_only(browser, gateway):
    page = await live_page(browser, gateway.url)
    assert await page.evaluate("fetch('/dev/session?user=x').then((r) => r.status)") == 200
    other = gateway.url.replace("127.0.0.1", "localhost")
    assert await page.evaluate(
        f"fetch({json.dumps(other)} + '/dev/session').then((r) => r.status, () => 'refused')"
    ) == ("refused")
    assert page.errors == [] or all("Content Security Policy" in error for error in page.errors)
