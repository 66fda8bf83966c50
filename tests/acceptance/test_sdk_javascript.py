"""The JavaScript SDK in a real browser against a simulated gateway: what a real one cannot be made to do on request."""

from __future__ import annotations

import json
import random
import time

import pytest

from seamark.client.receiver import Advance, Deliver, Drop, Joined, Receiver, Restart, Restore
from seamark.protocol.close_codes import STOP, TABLE
from seamark.protocol.errors import BadFrame
from seamark.protocol.frames import decode_gateway_frame
from tests.support.sdkpages import FRESH, HELD, HELD_MS, IN_CI, client, jwt, records

pytestmark = pytest.mark.timeout(240)


# --- the receive rules ----------------------------------------------------------------------------------------------


def random_frames(rng: random.Random) -> list[dict[str, object]]:
    """Frames that are nearly right: what two implementations of the same rules disagree about, if they do."""
    seq, frames = 5, []
    for _ in range(rng.randint(1, 14)):
        step = rng.choice((0, 1, 1, 1, 2, 3, -1))
        op = rng.choice(("ready", "record", "record", "record", "skip", "live", "pong", "reset"))
        if not frames and rng.random() < 0.9:
            op = "ready"
        frame: dict[str, object] = {"op": op, "cursor": f"c{rng.random()}", "seq": seq + step}
        if op == "ready":
            frame |= {"session": "s", "resumed": rng.random() < 0.7, "seq": seq + (rng.random() < 0.1)}
            step = 0
        elif op in ("record", "skip"):
            frame |= {"prev": seq + rng.choice((0, 0, 0, 0, 0, 0, 0, -1, -2, 1)), "record": {}}
        elif op == "reset":
            frame |= {"reason": "epoch", "unread": None, "inbox": []}
        if op in ("record", "skip", "reset") and rng.random() < 0.05:
            frame["feed"] = "topic:news"
        elif op in ("ready", "live") and rng.random() < 0.05:
            del frame[rng.choice(("cursor", "seq"))]
        frames.append(frame)
        seq += max(0, step)
    return frames


NAMES = {Deliver: "record", Drop: "drop", Restart: "restart", Restore: "reset", Joined: "ready"}


def decided(start: str | None, frames: list[dict[str, object]]) -> list[object]:
    """What the Python rules say to each frame, and where they stand at the end."""
    receiver, said = Receiver(start), []
    receiver.connected()
    for frame in frames:
        try:
            outcome = receiver.on(decode_gateway_frame(json.dumps(frame)))
        except BadFrame as error:
            outcome = Restart(str(error))
        live = isinstance(outcome, Advance) and outcome.live
        said.append("live" if live else NAMES.get(type(outcome), "advance"))
        if isinstance(outcome, Restart):
            break
    return [said, receiver.resume_cursor]


async def test_both_sdks_decide_alike_on_thousands_of_nearly_right_sessions(browser, gateway):
    seed = 1 if IN_CI else random.randrange(2**32)  # a gate answers the same question each time
    print(f"seed {seed}")
    rng = random.Random(seed)
    scripts = [(rng.choice(("held", "held", "start", None)), random_frames(rng)) for _ in range(3000)]
    page = await browser.open(f"{gateway.url}/")
    answers = []
    for begin in range(0, len(scripts), 500):
        answers += await page.evaluate(
            f"""(async () => {{
              const {{ Receiver }} = await import("/seamark.js");
              return {json.dumps(scripts[begin : begin + 500])}.map(([start, frames]) => {{
                const receiver = new Receiver(start), said = [];
                for (const frame of frames) {{
                  const [what] = receiver.on(frame);
                  said.push(what);
                  if (what === "restart") break;
                }}
                return [said, receiver.position];
              }});
            }})()"""
        )
    expected = [decided(start, frames) for start, frames in scripts]
    for script, mine, theirs in zip(scripts, expected, answers, strict=True):
        assert theirs == mine, script
    outcomes = {one for said, _ in expected for one in said}
    assert outcomes == {"record", "drop", "restart", "reset", "ready", "live", "advance"}


# --- sessions -------------------------------------------------------------------------------------------------------


async def test_records_come_once_and_in_order_through_lost_and_doubled_frames_and_cuts(browser, gateway):
    def spoil(frame: dict) -> list[dict]:
        if frame.get("seq") == 3 and len(gateway.hellos) == 1:
            return []
        return [frame, frame] if frame["op"] == "record" else [frame]

    gateway.fault = spoil
    await gateway.publish(*({} for _ in range(6)))
    page = await client(browser, gateway)
    await records(page, [1, 2, 3, 4, 5, 6])
    await gateway.cut()
    await gateway.publish({}, {})
    await records(page, list(range(1, 9)))
    assert gateway.hellos[-1]["cursor"] == "e1.6"
    assert page.errors == []


async def test_codes_that_say_stop_do(browser, gateway):
    page = await client(browser, gateway, connect=False)
    for number, code in enumerate(sorted(STOP), 1):
        await page.evaluate("(got.errors = [], s.connect())")
        await page.until("s.state === 'live'")
        await gateway.cut(code)
        await page.until("s.state === 'closed'")
        said = await page.evaluate("[got.errors.length, got.errors[0].code, got.errors[0].fatal]")
        assert (said, len(gateway.hellos)) == ([1, code, True], number)
        await gateway.until(lambda: not gateway.sessions)


async def test_codes_that_say_reconnect_do(browser, gateway):
    page = await client(browser, gateway, "times: { backoffFirst: 20, backoffMax: 100, tooMany: 50 }")
    await page.until("s.state === 'live'")
    for code in (1001, 1006, 4499, *(row.code for row in TABLE if row.reconnect)):
        said_before = len(gateway.hellos)
        await gateway.cut(code)
        await gateway.until(lambda before=said_before: len(gateway.hellos) == before + 1)
        await page.until("s.state === 'live'")
        assert await page.evaluate("got.errors") == [], code


async def test_bye_is_obeyed(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    began = time.monotonic()
    await gateway.sessions[0].send({"op": "bye", "retry_after_ms": 600})
    await gateway.cut(1012)
    await gateway.until(lambda: len(gateway.hellos) == 2)
    assert time.monotonic() - began >= 0.59


async def test_acks_are_coalesced_and_never_name_a_cursor_from_before_a_reset(browser, gateway):
    await gateway.publish(*({} for _ in range(300)))
    began = time.monotonic()
    page = await client(browser, gateway, "times: { ack: 250, backoffFirst: 20, backoffMax: 100 }")
    await page.until("got.records.length === 300")
    await gateway.until(lambda: bool(gateway.of("ack")) and gateway.of("ack")[-1]["cursor"] == "e1.300")
    assert len(gateway.of("ack")) <= (time.monotonic() - began) / 0.25 + 1, "one in a quarter of a second"
    gateway.said.clear()
    gateway.epoch, gateway.log = "e2", []
    await gateway.publish({}, {})
    await gateway.cut()
    await gateway.until(lambda: bool(gateway.of("ack")) and gateway.of("ack")[-1]["cursor"] == "e2.2")
    assert all(ack["cursor"].startswith("e2.") for ack in gateway.of("ack"))
    assert await page.evaluate("got.resets") == ["epoch"]


async def test_a_way_that_fell_silent_is_replaced(browser, gateway):
    gateway.fault = lambda frame: [] if frame["op"] == "pong" else [frame]
    await client(browser, gateway, "times: { ping: 50, silence: 200, backoffFirst: 20, backoffMax: 100 }")
    await gateway.until(lambda: len(gateway.hellos) >= 2)


async def test_a_page_that_comes_back_asks_at_once_whether_anybody_is_there(browser, gateway):
    times = f"times: {{ probe: {HELD_MS}, ping: 10_000_000, backoffFirst: 20, backoffMax: 100 }}"
    page = await client(browser, gateway, times)
    await page.until("s.state === 'live'")
    await page.evaluate(HELD)
    await page.evaluate("(window.asked = performance.now(), dispatchEvent(new Event('online')))")
    await gateway.until(lambda: len(gateway.of("ping")) == 1)
    await page.until("s.lastHeard > asked")
    await page.evaluate("fire()")
    assert await page.evaluate("s.state") == "live"
    assert len(gateway.hellos) == 1
    gateway.fault = lambda frame: [] if frame["op"] == "pong" else [frame]
    await page.evaluate("dispatchEvent(new Event('online'))")
    await gateway.until(lambda: len(gateway.of("ping")) == 2)
    await page.evaluate("fire()")
    await gateway.until(lambda: len(gateway.hellos) == 2)


async def test_a_waiting_page_tries_again_as_soon_as_the_network_returns(browser, gateway):
    page = await client(browser, gateway, "random: () => 0.99, times: { backoffFirst: 60000, backoffMax: 60000 }")
    await page.until("s.state === 'live'")
    await gateway.cut()
    await page.until("s.state === 'waiting'")
    await page.evaluate("(s.random = () => 0, dispatchEvent(new Event('online')))")
    await page.until("s.state === 'live'")


async def test_a_page_that_comes_back_does_not_come_before_the_time_the_gateway_asked_for(browser, gateway):
    page = await client(browser, gateway, "times: { tooMany: 1500, backoffFirst: 20, backoffMax: 100 }")
    await page.until("s.state === 'live'")
    await page.evaluate(
        """void s.addEventListener("state", ({ detail }) => {
          if (detail.state === "waiting") dispatchEvent(new Event("online"));
        })"""
    )
    began = time.monotonic()
    await gateway.cut(4429)
    await gateway.until(lambda: len(gateway.hellos) == 2)
    assert "waiting" in await page.evaluate("got.states")
    assert time.monotonic() - began >= 1.5


async def test_a_reset_replaces_the_count_too(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    await gateway.sessions[0].send({"op": "unread", "count": 9, "as_of": 1})
    await page.until("s.unread?.count === 9")
    gateway.fault = lambda frame: [{**frame, "unread": {"count": 4}} if frame["op"] == "reset" else frame]
    gateway.epoch, gateway.log = "e2", []
    await gateway.cut()
    await page.until("got.resets.length === 1")
    assert await page.evaluate("s.unread.count") == 4


async def test_a_now_message_reaches_the_page_as_the_client_has_declared_that_it_takes_them(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    assert gateway.hellos[0]["capabilities"] == ["now"]
    position = await page.evaluate("s.receiver.position")
    await gateway.sessions[0].send({"op": "now", "id": "n1", "type": "chat.typing", "data": {}})
    await page.until("got.now.length === 1")
    assert await page.evaluate("[got.now[0], s.receiver.position]") == ["chat.typing", position]


async def test_a_page_without_state_begins_with_a_snapshot_at_every_load_and_stores_no_position(browser, gateway):
    await gateway.publish({}, {}, {})
    page = await client(browser, gateway, FRESH)
    for _ in range(2):
        await page.until("s.state === 'live'")
        assert gateway.hellos[-1]["snapshot"] is True
        assert "cursor" not in gateway.hellos[-1]
        assert await page.evaluate("[got.resets, got.records, got.unread.at(-1)]") == [["snapshot"], [], 3]
        await gateway.cut()  # a reconnect goes on from memory: the state is still there
        await gateway.until(lambda: gateway.hellos[-1].get("cursor") == "e1.3")
        assert "snapshot" not in gateway.hellos[-1]
        page = await client(browser, gateway, FRESH)
    assert await page.evaluate("Object.keys(localStorage)") in ([], ["seamark:device"])
    assert page.errors == []


async def test_an_app_that_stores_its_state_goes_on_from_its_bookmark_and_never_from_another_users(browser, gateway):
    await gateway.publish({}, {})
    page = await client(browser, gateway, FRESH)
    await page.until("s.bookmark !== null && s.state === 'live'")
    bookmark = await page.evaluate("s.bookmark")
    assert bookmark == {"tenant": "t", "user": "alice", "cursor": "e1.2"}
    await gateway.publish({})
    page = await client(browser, gateway, f"{FRESH}, cursor: {json.dumps(bookmark)}")
    await records(page, [3])
    assert await page.evaluate("got.resets") == []
    page = await client(
        browser, gateway, f"{FRESH}, cursor: {json.dumps(bookmark)}, token: {json.dumps(jwt(user='bob'))}"
    )
    await page.until("s.state === 'live'")
    assert gateway.hellos[-1]["snapshot"] is True
    assert "cursor" not in gateway.hellos[-1]


# --- the clock and the storage --------------------------------------------------------------------------------------


async def test_a_clock_that_is_set_back_does_not_keep_a_dead_way_alive(browser, gateway):
    gateway.fault = lambda frame: [] if frame["op"] == "pong" else [frame]
    page = await client(browser, gateway, "times: { ping: 50, silence: 200, backoffFirst: 20, backoffMax: 100 }")
    await page.until("s.state === 'live'")
    await page.evaluate("(() => { const now = Date.now; Date.now = () => now() - 3600_000; })()")
    before = len(gateway.hellos)  # the next session is one that ends under the new clock
    await gateway.until(lambda: len(gateway.hellos) >= before + 2)


async def test_where_storage_is_denied_or_full_the_client_works_under_a_name_of_its_own(browser, gateway):
    denied = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('denied', 'SecurityError'); } })"
    full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    for broken in (denied, full):
        page = await browser.open(f"{gateway.url}/")
        await page.evaluate(f"void ({broken})")
        await page.evaluate(
            f"""import("/seamark.js").then(({{ Seamark }}) => {{
              window.s = new Seamark({{ token: {json.dumps(jwt())} }}); s.connect();
            }})"""
        )
        await page.until("s.state === 'live'")
        assert gateway.hellos[-1]["device"].startswith("web-")
        assert page.errors == []


async def test_unread_and_unstored_events_reach_the_page_and_unknown_ones_do_not_disturb(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    for frame in (
        {"op": "unread", "count": 3, "as_of": 1},
        {"op": "now", "type": "demo.typing", "data": {}},
        {"op": "invented"},
        {"op": "error", "code": "too_many_reads", "detail": "slowly"},
    ):
        await gateway.sessions[0].send(frame)
    await page.until("got.errors.length === 1")
    assert await page.evaluate("[got.unread, got.now, got.errors[0].fatal, s.state]") == [
        [3],
        ["demo.typing"],
        False,
        "live",
    ]
    assert await page.evaluate("s.unread.count") == 3
