"""The inbox page and the JavaScript SDK in a real headless Chromium, on real servers."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from engine.cancels import cancel
from engine.limits import CANCELS_FRESH_SECONDS
from gateway import server
from gateway.access import api_keys
from gateway.stores import counts, tables
from ops.dev.child import free_port
from ops.dev.servers import NatsServer, Valkey
from seamark import Publisher
from seamark.protocol.records import state_record
from seamark.protocol.subjects import encode_token, log_subject, partition_of
from tests.support.chromium import Chromium, Page
from tests.support.logs import eventually
from tests.support.network import BadNetwork, bad_network
from tests.support.spine import RunningGateway, Spine, spine
from tests.support.tables import projecting_tables

pytestmark = pytest.mark.timeout(240)

STATE = "document.querySelector('#state').dataset.state"
ITEMS = "[...document.querySelectorAll('#list > li')]"
TITLES = f"{ITEMS}.map((item) => item.querySelector('h3').textContent)"
UNREAD = f"{ITEMS}.filter((item) => item.matches('.unread')).length"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that waits for its stores for longer than this machine stands still: without them it shows less."""
    for module, name in (
        (api_keys, "API_KEY_QUERY_SECONDS"),
        (tables, "CONNECT_SECONDS"),
        (counts, "COUNT_SECONDS"),
        (server, "COUNT_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 30.0)


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


async def live_page(browser: Chromium, url: str, user: str = "alice", **options: str) -> Page:
    """The page of `user`, caught up."""
    page = await browser.open(f"{url}/?user={user}", **options)
    await page.until(f"{STATE} === 'live'")
    return page


async def shown(page: Page, count: int) -> list[str]:
    """The titles, oldest first, once `count` are shown."""
    await page.until(f"{ITEMS}.length === {count}")
    return (await page.evaluate(TITLES))[::-1]


BADGE = "document.querySelector('#badge').hidden ? '' : document.querySelector('#badge').textContent"
LOOKS = (
    f"JSON.stringify([{ITEMS}.map((item) => [item.querySelector('h3').textContent, item.className]),"
    f" {BADGE}, document.title])"
)


@pytest.fixture
async def counting_gateway(way: Spine, nats_server: NatsServer, valkey: Valkey, postgres: str):
    """A gateway beside a projector of everything: its snapshots have rows and counts."""
    async with (
        projecting_tables(nats_server.url, valkey.url, postgres),
        way.gateway(redis_url=valkey.url) as running,
    ):
        yield running


async def test_a_page_reloaded_shows_the_same_list_and_badge_as_before(browser, counting_gateway, way):
    page = await live_page(browser, counting_gateway.url)
    async with Publisher(nats_url=way.nats_url) as publisher:
        for number in range(4):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"n{number}"}, id=f"n{number}")
        for version in range(2):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"draft {version}"}, collapse_key="draft")
        # The count may be known before the last record has come.
        await page.until(f"{BADGE} === '5' && {TITLES}[0] === 'draft 1'")
        await page.click("#list > li:last-child .read")
        await page.until(f"{BADGE} === '4' && {UNREAD} === 4")
        before = await page.evaluate(LOOKS)
        assert await shown(page, 5) == ["n0", "n1", "n2", "n3", "draft 1"]
        for _ in range(2):
            await page.reload()
            await page.until(f"{STATE} === 'live'")
            await page.until(f"{LOOKS} === {json.dumps(before)}")
        # What comes while the page loads is in the log behind the snapshot.
        await publisher.publish(to="alice", type="demo.n", data={"text": "later"})
        await page.reload()
        assert await shown(page, 6) == ["n0", "n1", "n2", "n3", "draft 1", "later"]
        await page.until(f"{BADGE} === '5'")
    assert [frame for frame in page.sent if '"cursor"' in frame and '"hello"' in frame] == []
    assert page.errors == []


async def test_what_is_older_than_a_snapshot_is_shown_when_asked_for(browser, counting_gateway, way):
    async with Publisher(nats_url=way.nats_url) as publisher:
        for number in range(230):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"n{number}"})
    page = await live_page(browser, counting_gateway.url)
    await page.until(f"{BADGE} === '230'")
    await page.reload()
    await page.until(f"{STATE} === 'live' && {BADGE} === '230'")
    for count in (100, 200, 230):
        titles = await shown(page, count)
        assert titles == [f"n{number}" for number in range(230 - count, 230)]
        if count < 230:
            await page.click("#older")
    await page.until("document.querySelector('#older').hidden")
    assert page.errors == []


async def test_after_switching_user_nothing_of_the_former_user_is_shown_stored_or_sent(browser, counting_gateway, way):
    page = await live_page(browser, counting_gateway.url)
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "secret"}, id="of-alice")
        await shown(page, 1)
    await page.fill("#user", "bob")
    sent_before = len(page.sent)
    await page.click("#who button")
    await page.until(f"location.search === '?user=bob' && {STATE.replace(').', ')?.')} === 'live'")
    # And in one page, with one client, as an app does where somebody signs out and another one in.
    await page.evaluate(
        """(async () => {
          const { Seamark } = await import("/seamark.js");
          const token = async () => (await (await fetch(`/dev/session?user=${who}`)).json()).token;
          window.rows = []; window.who = "alice"; window.s = new Seamark({ token });
          s.addEventListener("reset", (e) => { rows = [...e.detail.inbox]; });
          s.addEventListener("record", (e) => rows.push(e.detail.record));
          s.connect();
        })()"""
    )
    await page.until("s.state === 'live' && rows.some((row) => row.id === 'of-alice')")
    alices = await page.evaluate("s.cursor")
    await page.evaluate(
        "(s.close(), s.read({ ids: ['of-alice'] }), s.read({ all: true }), window.who = 'bob', s.connect())"
    )
    await page.until("s.state === 'live'")
    assert await page.evaluate("[rows.length, s.unread?.count ?? 0, s.marks.size, s.bookmark?.user ?? 'bob']") == [
        0,
        0,
        0,
        "bob",
    ]
    assert "secret" not in await page.evaluate("document.body.textContent")
    stored = await page.evaluate("JSON.stringify({ ...localStorage, ...sessionStorage })")
    assert "alice" not in stored
    assert alices not in stored
    said = page.sent[sent_before:]
    assert [frame for frame in said if '"read"' in frame] == []
    assert [frame for frame in said if '"hello"' in frame and '"cursor"' in frame] == []
    assert page.errors == []


async def test_a_mark_made_while_the_connection_dies_is_there_afterwards_on_both_devices(
    browser, counting_gateway, way
):
    async with bad_network(counting_gateway.port) as network:
        desktop = await live_page(browser, counting_gateway.url)
        phone = await live_page(browser, network.url, context=await browser.new_context())
        async with Publisher(nats_url=way.nats_url) as publisher:
            for number in range(3):
                await publisher.publish(to="alice", type="demo.n", data={"text": f"n{number}"})
        for page in (desktop, phone):
            await page.until(f"{UNREAD} === 3 && {BADGE} === '3'")
        network.to_server.silence()
        await phone.click("#list > li:nth-child(2) .read")
        await way_holds(network)  # the frame has left the browser, and will arrive nowhere
        network.cut()
        await phone.until(f"{STATE} !== 'live'")
        network.restore()
        for page in (phone, desktop):
            await page.until(f"{UNREAD} === 2 && {BADGE} === '2'")
            await page.reload()
            await page.until(f"{STATE} === 'live' && {UNREAD} === 2 && {BADGE} === '2'")
            assert await page.evaluate(f"{ITEMS}[1].matches('.unread')") is False
            assert page.errors == []


async def way_holds(network: BadNetwork) -> None:
    """Until something is on its way to the server."""
    await eventually(lambda: network.to_server.held, seconds=60)


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
    await page.until("document.querySelector('#cursor').textContent === seamark.cursor")
    assert page.errors == []


async def test_what_is_recalled_leaves_the_page_and_what_was_cancelled_or_over_never_comes(browser, gateway, way):
    page = await live_page(browser, gateway.url)
    await cancel(way.broker, "default", "cancelled", budget_seconds=30)
    await asyncio.sleep(CANCELS_FRESH_SECONDS + 0.1)  # until then it need not hold
    async with Publisher(nats_url=way.nats_url) as publisher:
        over = datetime.now(UTC) - timedelta(seconds=1)
        for title, more in (
            ("stays", {}),
            ("sent", {"transaction_id": "recalled"}),
            ("cancelled", {"transaction_id": "cancelled"}),
            ("over", {"expires_at": over}),
            ("last", {}),
        ):
            await publisher.publish(to="alice", type="demo.x", id=title, data={"title": title}, **more)
    assert await shown(page, 3) == ["stays", "sent", "last"]
    _, recall = state_record("recall", tenant="default", user="alice", device=None, ids=["sent"])
    partition = partition_of("default", "alice", 4)
    await way.broker.append(log_subject(partition, "default", "alice"), recall)
    assert await shown(page, 2) == ["stays", "last"]


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
        await page.until(f"{STATE} === 'live'")
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
    await page.until(f"{STATE} === 'live'")
    assert await page.evaluate("document.querySelector('#transport').textContent") == "server-sent events"
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "one\nline\u2028\u2029"})
        await shown(page, 1)
        await page.click("#list .read")
        await page.until(f"{UNREAD} === 0")
        network.cut()
        await page.until(f"{STATE} !== 'live'")
        for number in range(5):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"missed {number}"})
        network.restore()
        await page.until(f"{STATE} === 'live'")
    assert await shown(page, 6) == ["one\nline\u2028\u2029", *(f"missed {number}" for number in range(5))]
    assert page.errors == []


async def test_what_a_page_has_handled_is_acknowledged_over_a_stream_too(browser, network, way):
    network.refuse_upgrades()
    page = await browser.open(f"{network.url}/favicon.svg")
    await page.evaluate(
        """(async () => {
          const { Seamark } = await import("/seamark.js");
          const { token } = await (await fetch("/dev/session?user=alice")).json();
          window.seen = [];
          window.s = new Seamark({ token, device: "tab", times: { backoffFirst: 20, backoffMax: 50, ackRequest: 50 } });
          s.addEventListener("record", (e) => seen.push(e.detail.seq));
          s.addEventListener("reset", (e) => { window.begun = e.detail.seq; });
          s.connect();
        })()"""
    )
    await page.until("s.state === 'live' && s.transport.name === 'sse'")
    async with Publisher(nats_url=way.nats_url) as publisher:
        for number in range(3):
            await publisher.publish(to="alice", type="demo.n", data={"n": number})
            await page.until(f"seen.length === {number + 1}")

    async def acknowledged() -> list[tuple[int, int]]:
        stored = []
        for seq in range(1, (await way.broker.stream("RECEIPTS")).last_seq + 1):
            answer = await way.broker.api("STREAM.MSG.GET.RECEIPTS", {"seq": seq})
            receipt = json.loads(base64.b64decode(answer["message"]["data"]))
            if (receipt["state"], receipt["device"]) == ("acknowledged", "tab"):
                stored.append((receipt["after"], receipt["up_to"]))
        return stored

    last = await page.evaluate("seen.at(-1)")

    async def to_the_last() -> list[tuple[int, int]]:
        ranges = await acknowledged()
        return ranges if any(up_to == last for _, up_to in ranges) else []

    ranges = await eventually(to_the_last, seconds=60)
    covered = {seq for after, up_to in ranges for seq in range(after + 1, up_to + 1)}
    assert covered >= set(await page.evaluate("seen"))
    assert min(after for after, _ in ranges) == await page.evaluate("begun"), "nothing from before the page began"
    assert page.errors == []


async def test_a_stream_stays_while_websockets_are_tried_beside_it_and_makes_room_when_they_work(browser, network, way):
    network.refuse_upgrades()
    page = await browser.open(f"{network.url}/favicon.svg")
    await page.evaluate(
        """(async () => {
          const { Seamark } = await import("/seamark.js");
          const { token } = await (await fetch("/dev/session?user=alice")).json();
          window.got = { seen: [], states: [] };
          window.tried = 0;
          const Real = WebSocket;
          window.WebSocket = class extends Real { constructor(...given) { tried += 1; super(...given); } };
          window.s = new Seamark({ token, times: { backoffFirst: 20, backoffMax: 50, upgrade: 150, upgradeFirst: 50 } });
          s.addEventListener("record", (e) => got.seen.push(e.detail.record.data.n));
          s.addEventListener("state", (e) => got.states.push([e.detail.state, e.detail.transport]));
          s.connect();
        })()"""
    )
    await page.until("s.state === 'live' && s.transport.name === 'sse'")
    await page.evaluate("(got.states.length = 0, window.before = tried)")
    async with Publisher(nats_url=way.nats_url) as publisher:
        for number in range(20):
            await publisher.publish(to="alice", type="demo.n", data={"n": number})
            await page.until(f"got.seen.length === {number + 1}")
        await page.until("tried >= before + 5")
        assert await page.evaluate("got.states") == []  # never dark, however often a WebSocket failed beside it
        network.refuse_upgrades(on=False)
        await page.until("s.state === 'live' && s.transport.name === 'websocket'")
        assert "waiting" not in await page.evaluate("got.states.map(([state]) => state)")
        await publisher.publish(to="alice", type="demo.n", data={"n": 20})
        await page.until("got.seen.length === 21")
        # What carried the last session is tried first when that ends.
        network.refuse_upgrades()
        network.reset()
        await page.until("s.state === 'live' && s.transport.name === 'sse'")
        await page.evaluate("(got.states.length = 0)")
        network.reset()
        await page.until("got.states.length > 0 && s.state === 'live'")
    assert {transport for _, transport in await page.evaluate("got.states")} <= {"sse", None}
    assert await page.evaluate("got.seen") == list(range(21))


async def test_a_mark_that_a_stream_could_not_send_waits_for_the_next_session(browser, network, way):
    network.refuse_upgrades()
    page = await browser.open(f"{network.url}/?user=alice")
    await page.until(f"{STATE} === 'live'")
    async with Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "one"})
    await shown(page, 1)
    await page.block("*/v1/inbox/read*")
    await page.click("#list .read")
    await page.until("document.querySelector('#happened').textContent.includes('not reached')")
    assert await page.evaluate("seamark.marks.size") == 1
    await page.block()
    network.refuse_upgrades(on=False)
    network.cut()
    network.restore()
    await page.until(f"{UNREAD} === 0")
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
    port = free_port()  # one that no outgoing connection is given while nobody listens there
    async with way.gateway(port) as first:
        page = await live_page(browser, first.url)
    await page.until(f"{STATE} === 'waiting'")
    async with way.gateway(port), Publisher(nats_url=way.nats_url) as publisher:
        await publisher.publish(to="alice", type="demo.n", data={"text": "while it was away"})
        await page.until(f"{STATE} === 'live'")
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


async def test_a_mark_says_that_it_waits_and_the_keyboard_goes_on_to_the_next_row(browser, gateway, way):
    page = await live_page(browser, gateway.url)
    async with Publisher(nats_url=way.nats_url) as publisher:
        for number in range(3):
            await publisher.publish(to="alice", type="demo.n", data={"text": f"n{number}"})
    await shown(page, 3)
    await page.click("#cut")
    await page.evaluate("document.querySelector('#list .read').focus()")
    await page.click("#list .read")
    await page.until("document.querySelector('#list .read').textContent === 'Waiting…'")
    assert await page.evaluate("document.querySelector('#list .read').getAttribute('aria-disabled')") == "true"
    await page.click("#cut")
    await page.until(f"{UNREAD} === 2")
    assert await page.evaluate("document.activeElement.getAttribute('aria-label')") == "Mark read: n1"
    assert page.errors == []


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
