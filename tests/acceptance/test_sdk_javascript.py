"""The JavaScript SDK in a real browser against a simulated gateway: what a real one cannot be made to do on request."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from seamark.client.frames import decode_frame
from seamark.client.receiver import Advance, Deliver, Drop, Joined, Receiver, Restart, Restore
from tests.support.chromium import Chromium, Page, chromium
from tests.support.gatewaysim import SimGateway, sim_gateway

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Chromium]:
    async with chromium(tmp_path) as running:
        yield running


@pytest.fixture
async def gateway() -> AsyncIterator[SimGateway]:
    async with sim_gateway() as running:
        yield running


def jwt(seconds: float = 600, user: str = "alice", number: int = 0) -> str:
    claims = json.dumps({"sub": user, "tenant": "t", "exp": time.time() + seconds, "n": number}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).rstrip(b'=').decode()}.s"


async def client(browser: Chromium, gateway: SimGateway, options: str = "", *, connect: bool = True) -> Page:
    """A page with a client `s` that keeps what it is told in `got`."""
    page = await browser.open(f"{gateway.url}/")
    await page.evaluate(
        f"""(async () => {{
          const {{ Seamark }} = await import("/seamark.js");
          window.got = {{ records: [], resets: [], states: [], errors: [], unread: [], now: [] }};
          window.s = new Seamark({{
            token: {json.dumps(jwt())}, cursor: "start", device: "tab", storage: false,
            times: {{ backoffFirst: 20, backoffMax: 100, ack: 20 }}, {options}
          }});
          s.addEventListener("record", (e) => got.records.push(e.detail.seq));
          s.addEventListener("reset", (e) => got.resets.push(e.detail.reason));
          s.addEventListener("state", (e) => got.states.push(e.detail.state));
          s.addEventListener("error", (e) => got.errors.push(e.detail));
          s.addEventListener("unread", (e) => got.unread.push(e.detail.count));
          s.addEventListener("now", (e) => got.now.push(e.detail.type));
          {"s.connect();" if connect else ""}
        }})()"""
    )
    return page


async def records(page: Page, expected: list[int]) -> None:
    """Wait for so many records and compare."""
    await page.until(f"got.records.length >= {len(expected)}")
    assert await page.evaluate("got.records") == expected


# --- the receive rules ----------------------------------------------------------------------------------------------


def random_frames(rng: random.Random) -> list[dict[str, object]]:
    """Frames that are nearly right: what two implementations of the same rules disagree about, if they do."""
    seq, frames = 5, []
    for _ in range(rng.randint(1, 14)):
        epoch = "e2" if rng.random() < 0.08 else "e1"
        step = rng.choice((0, 1, 1, 1, 2, 3, -1))
        op = rng.choice(("ready", "record", "record", "record", "skip", "live", "pong", "reset"))
        if not frames and rng.random() < 0.9:
            op = "ready"
        frame: dict[str, object] = {"op": op, "cursor": f"{epoch}.{seq + step}"}
        if op == "ready":
            whole = rng.random() < 0.7
            frame = {"op": "ready", "session": "s", "resumed": whole, "cursor": f"e1.{seq}" if whole else None}
            step = 0
        elif op in ("record", "skip"):
            frame |= {"seq": seq + step + (rng.random() < 0.05), "prev": seq - (rng.random() < 0.1), "record": {}}
        elif op == "reset":
            frame |= {"reason": "epoch", "inbox": []}
        elif rng.random() < 0.05:
            frame["cursor"] = rng.choice(("nonsense", "e1", "E1.5", "e1.-1", ""))
        frames.append(frame)
        seq += max(0, step)
    return frames


NAMES = {Deliver: "record", Drop: "drop", Restart: "restart", Restore: "reset", Joined: "ready"}


def decided(start: str | None, frames: list[dict[str, object]]) -> list[object]:
    """What the Python rules say to each frame, and where they stand at the end."""
    receiver, said = Receiver(start), []
    receiver.connected()
    for frame in frames:
        parsed = decode_frame(json.dumps(frame))
        assert parsed is not None
        outcome = receiver.on(parsed)
        live = isinstance(outcome, Advance) and outcome.live
        said.append("live" if live else NAMES.get(type(outcome), "advance"))
        if isinstance(outcome, Restart):
            break
    return [said, receiver.resume_cursor]


async def test_both_sdks_decide_alike_on_thousands_of_nearly_right_sessions(browser, gateway):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    scripts = [(rng.choice(("e1.5", "e1.5", "start", None)), random_frames(rng)) for _ in range(5000)]
    page = await browser.open(f"{gateway.url}/")
    answers = await page.evaluate(
        f"""(async () => {{
          const {{ Receiver }} = await import("/seamark.js");
          return {json.dumps(scripts)}.map(([start, frames]) => {{
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


@pytest.mark.parametrize("code", [4400, 4403, 4409, 4413, 4401])
async def test_codes_that_say_stop_do(browser, gateway, code):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    await gateway.cut(code)
    await page.until("s.state === 'closed'")
    assert await page.evaluate("[got.errors.length, got.errors[0].code, got.errors[0].fatal]") == [1, code, True]
    assert len(gateway.hellos) == 1


@pytest.mark.parametrize("code", [1001, 1006, 1011, 4408, 4499])
async def test_codes_that_say_reconnect_do(browser, gateway, code):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    await gateway.cut(code)
    await gateway.until(lambda: len(gateway.hellos) == 2)
    await page.until("s.state === 'live'")
    assert await page.evaluate("got.errors") == []


async def test_bye_is_obeyed(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    began = time.monotonic()
    await gateway.sessions[0].send({"op": "bye", "retry_after_ms": 600})
    await gateway.cut(1012)
    await gateway.until(lambda: len(gateway.hellos) == 2)
    assert time.monotonic() - began >= 0.59


async def test_a_refused_token_is_replaced_once_and_never_presented_again(browser, gateway):
    gateway.refused_tokens = {"old"}
    page = await client(browser, gateway, "token: (() => { const t = ['old', 'new']; return () => t.shift(); })()")
    await page.until("s.state === 'live'")
    assert [hello["token"] for hello in gateway.hellos] == ["old", "new"]
    page = await client(browser, gateway, "token: () => 'old'")
    await page.until("s.state === 'closed'")
    assert len(gateway.hellos) == 3


async def test_a_token_service_that_is_away_is_asked_again(browser, gateway):
    token = "token: (() => { let n = 0; return async () => { if (++n < 3) throw new Error('away'); return 't'; }; })()"
    page = await client(browser, gateway, token)
    await page.until("s.state === 'live'")


async def test_the_session_is_kept_by_refreshing_before_the_token_expires(browser, gateway):
    tokens = [jwt(2.0, number=number) for number in range(9)]
    page = await client(
        browser, gateway, f"token: (() => {{ const t = {json.dumps(tokens)}; return () => t.shift(); }})()"
    )
    await gateway.until(lambda: bool(gateway.of("refresh")))
    assert gateway.of("refresh")[0]["token"] == tokens[1]
    assert len(gateway.hellos) == 1
    assert page.errors == []


async def test_acks_are_coalesced_and_never_name_a_cursor_from_before_a_reset(browser, gateway):
    await gateway.publish(*({} for _ in range(300)))
    page = await client(browser, gateway, "times: { ack: 250, backoffFirst: 20, backoffMax: 100 }")
    await page.until("got.records.length === 300")
    await gateway.until(lambda: bool(gateway.of("ack")) and gateway.of("ack")[-1]["cursor"] == "e1.300")
    assert len(gateway.of("ack")) <= 3
    gateway.said.clear()
    gateway.epoch, gateway.log = "e2", []
    await gateway.publish({}, {})
    await gateway.cut()
    await gateway.until(lambda: bool(gateway.of("ack")) and gateway.of("ack")[-1]["cursor"] == "e2.2")
    assert all(ack["cursor"].startswith("e2.") for ack in gateway.of("ack"))
    assert await page.evaluate("got.resets") == ["epoch"]


async def test_marks_made_without_a_session_are_said_on_the_next_and_all_means_what_was_seen(browser, gateway):
    await gateway.publish({}, {})
    page = await client(browser, gateway)
    await records(page, [1, 2])
    await page.evaluate("(s.close(), s.read({ ids: ['r1', 'r2'] }), s.read({ all: true }))")
    await gateway.until(lambda: not gateway.sessions)
    await gateway.publish({})
    await page.evaluate("s.connect()")
    await gateway.until(lambda: len(gateway.of("read")) == 2)
    assert gateway.of("read") == [{"op": "read", "up_to": "e1.2"}, {"op": "read", "ids": ["r1", "r2"]}]
    assert "TypeError" in await page.evaluate("(() => { try { s.read({}); } catch (e) { return String(e); } })()")


async def test_a_way_that_fell_silent_is_replaced(browser, gateway):
    gateway.fault = lambda frame: [] if frame["op"] == "pong" else [frame]
    await client(browser, gateway, "times: { ping: 50, silence: 200, backoffFirst: 20, backoffMax: 100 }")
    await gateway.until(lambda: len(gateway.hellos) >= 2)


async def test_a_page_that_comes_back_asks_at_once_whether_anybody_is_there(browser, gateway):
    page = await client(browser, gateway, "times: { probe: 100, backoffFirst: 20, backoffMax: 100 }")
    await page.until("s.state === 'live'")
    await page.evaluate("dispatchEvent(new Event('online'))")
    await gateway.until(lambda: len(gateway.of("ping")) == 1)
    await page.until("!s.timers.probe")
    assert len(gateway.hellos) == 1
    gateway.fault = lambda frame: [] if frame["op"] == "pong" else [frame]
    await page.evaluate("dispatchEvent(new Event('online'))")
    await gateway.until(lambda: len(gateway.hellos) == 2)


async def test_a_waiting_page_tries_again_as_soon_as_the_network_returns(browser, gateway):
    page = await client(browser, gateway, "random: () => 0.99, times: { backoffFirst: 60000, backoffMax: 60000 }")
    await page.until("s.state === 'live'")
    await gateway.cut()
    await page.until("s.state === 'waiting'")
    await page.evaluate("(s.random = () => 0, dispatchEvent(new Event('online')))")
    await page.until("s.state === 'live'", seconds=5)


async def test_a_page_that_comes_back_does_not_come_before_the_time_the_gateway_asked_for(browser, gateway):
    page = await client(browser, gateway, "times: { tooMany: 1500, backoffFirst: 20, backoffMax: 100 }")
    await page.until("s.state === 'live'")
    began = time.monotonic()
    await gateway.cut(4429)
    await page.until("s.state === 'waiting'")
    await page.evaluate("dispatchEvent(new Event('online'))")
    await gateway.until(lambda: len(gateway.hellos) == 2)
    assert time.monotonic() - began >= 1.5


async def test_a_token_that_never_comes_is_asked_for_again(browser, gateway):
    token = "token: (() => { let n = 0; return () => ++n < 2 ? new Promise(() => {}) : 't'; })()"
    page = await client(browser, gateway, f"{token}, times: {{ connect: 200, backoffFirst: 20, backoffMax: 100 }}")
    await page.until("s.state === 'live'", seconds=5)


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


async def test_storage_is_read_only_to_begin_with_and_belongs_to_one_user(browser, gateway):
    await gateway.publish({}, {}, {})
    quick = "cursor: undefined, storage: true, times: { store: 10, backoffFirst: 20 }"
    first = await client(browser, gateway, f"{quick}, cursor: 'start'")
    await records(first, [1, 2, 3])
    stored = (
        "Object.entries(localStorage).filter(([key]) => key.startsWith('seamark:cursor')).map(([, value]) => value)"
    )
    await first.until(f"{stored}[0] === 'e1.3'")
    second = await client(browser, gateway, quick)
    await second.until("s.state === 'live'")
    assert gateway.hellos[-1]["cursor"] == "e1.3"
    # Two tabs hold positions of their own: what one stores does not move the other.
    await first.evaluate(
        "localStorage.setItem(Object.keys(localStorage).find((key) => key.includes('cursor')), 'e1.1')"
    )
    await gateway.cut()
    await gateway.until(lambda: len(gateway.hellos) == 4)
    assert {hello["cursor"] for hello in gateway.hellos[2:]} == {"e1.3"}
    other = await client(browser, gateway, f"{quick}, token: {json.dumps(jwt(user='bob'))}")
    await other.until("s.state === 'live'")
    assert "cursor" not in gateway.hellos[-1]
    assert await other.evaluate("got.resets") == ["new"]


async def test_unread_and_unstored_events_reach_the_page_and_unknown_ones_do_not_disturb(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    for frame in (
        {"op": "unread", "count": 3, "as_of": "e1.1"},
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


async def test_a_listener_that_throws_does_not_stop_the_others_or_the_log(browser, gateway):
    page = await client(browser, gateway, connect=False)
    await page.evaluate("(s.addEventListener('record', () => { throw new Error('mine'); }), s.connect())")
    await gateway.publish({}, {})
    await records(page, [1, 2])
    assert len(page.errors) == 2
    assert all("mine" in error for error in page.errors)
