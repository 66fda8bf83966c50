"""The JavaScript SDK in a real browser against a simulated gateway: what a real one cannot be made to do on request."""

from __future__ import annotations

import base64
import json
import os
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from seamark.client.receiver import Advance, Deliver, Drop, Joined, Receiver, Restart, Restore
from seamark.protocol.close_codes import STOP, TABLE
from seamark.protocol.errors import BadFrame
from seamark.protocol.frames import decode_gateway_frame
from tests.support.chromium import Chromium, Page
from tests.support.gatewaysim import SimGateway, sim_gateway

pytestmark = pytest.mark.timeout(240)

IN_CI = os.environ.get("SEAMARK_CI") == "1"
HELD_MS = 3_600_000
HELD = f"""{{
  const real = window.setTimeout;
  window.setTimeout = (act, ms, ...more) => {{
    if (ms === {HELD_MS}) window.fire = act;
    return real(act, ms, ...more);
  }};
}}"""
"""For a page: a timer of HELD_MS goes off when the test says `fire()`, however slow the machine is."""


@pytest.fixture
async def gateway() -> AsyncIterator[SimGateway]:
    async with sim_gateway() as running:
        yield running


def jwt(seconds: float = 600, user: str = "alice", number: int = 0) -> str:
    claims = json.dumps({"sub": user, "tenant": "t", "exp": time.time() + seconds, "n": number}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).rstrip(b'=').decode()}.s"


def minted(*tokens: tuple[str, float]) -> str:
    """A token source, counted in `got.asked`, that makes each token when asked: opening a page may take longer than one lives.

    Joining may take longer, too: each says when it was made, so that the client knows how long such a token lives.

    Args:
        tokens: user and seconds of validity of each; the last is given from then on.
    """
    return f"""token: (() => {{
      const list = {json.dumps(tokens)};
      let n = 0;
      return () => {{
        got.asked = n + 1;
        const [sub, seconds] = list[Math.min(n, list.length - 1)];
        const iat = Date.now() / 1000;
        const claims = {{ sub, tenant: "t", iat, exp: iat + seconds, n: n++ }};
        return `e30.${{btoa(JSON.stringify(claims)).replaceAll("=", "")}}.s`;
      }};
    }})()"""


def claims_of(token: str) -> dict[str, Any]:
    body = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims


async def client(browser: Chromium, gateway: SimGateway, options: str = "", *, connect: bool = True) -> Page:
    """A page with a client `s` that keeps what it is told in `got`."""
    page = await browser.open(f"{gateway.url}/")
    await page.evaluate(
        f"""(async () => {{
          const {{ Seamark }} = await import("/seamark.js");
          window.got = {{ records: [], resets: [], states: [], errors: [], unread: [], now: [] }};
          window.s = new Seamark({{
            token: {json.dumps(jwt())}, cursor: "start", device: "tab",
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


async def test_a_refused_token_is_replaced_and_three_refusals_in_a_row_are_final(browser, gateway):
    gateway.refused_tokens = {"old"}
    page = await client(browser, gateway, "token: (() => { const t = ['old', 'new']; return () => t.shift(); })()")
    await page.until("s.state === 'live'")
    assert [hello["token"] for hello in gateway.hellos] == ["old", "new"]
    for token in ("() => 'old'", "'old'"):
        page = await client(browser, gateway, f"token: {token}")
        await page.until("s.state === 'closed'")
        assert await page.evaluate("[got.errors.length, got.errors[0].code, got.errors[0].fatal]") == [1, 4401, True]
    assert len(gateway.hellos) == 8


async def test_a_good_token_is_not_thrown_away_because_a_gateway_was_slow(browser, gateway):
    gateway.answers = [4401, 4499]
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    await gateway.cut(4401)
    await gateway.until(lambda: len(gateway.hellos) == 4)
    await page.until("s.state === 'live'")
    assert len({hello["token"] for hello in gateway.hellos}) == 1


async def test_a_token_that_has_expired_by_its_own_words_and_cannot_be_replaced_is_final_at_once(browser, gateway):
    expired = jwt(-60)
    gateway.refused_tokens = {expired}
    page = await client(browser, gateway, f"token: {json.dumps(expired)}")
    await page.until("s.state === 'closed'")
    assert len(gateway.hellos) == 1


async def test_the_app_is_asked_for_a_token_when_there_is_none_or_it_expired_and_not_at_every_reconnect(
    browser, gateway
):
    tokens = [jwt(6000, number=1), jwt(600, number=2), jwt(6000, number=3)]
    source = f"token: (() => {{ const t = {json.dumps(tokens)}; return () => (got.asked = (got.asked ?? 0) + 1, t.shift()); }})()"
    times = "times: { expiry: 700_000, backoffFirst: 20, backoffMax: 100 }"
    page = await client(browser, gateway, f"{source}, {times}")
    for number in range(3):
        await gateway.until(lambda: len(gateway.sessions) == 1)
        await page.until("s.state === 'live'")
        await gateway.cut()
        await gateway.until(lambda seen=number + 2: len(gateway.hellos) == seen)
    assert await page.evaluate("got.asked") == 1
    await page.until("s.state === 'live'")
    await page.evaluate("(s.close(), s.connect())")  # somebody else may have signed in
    await page.until("s.state === 'live' && got.asked === 2")
    await gateway.cut()
    await page.until("got.asked === 3")  # what has less than `expiry` left is not presented again


async def test_a_token_service_that_is_away_is_asked_again(browser, gateway):
    token = "token: (() => { let n = 0; return async () => { if (++n < 3) throw new Error('away'); return 't'; }; })()"
    page = await client(browser, gateway, token)
    await page.until("s.state === 'live'")


async def test_the_session_is_kept_by_refreshing_before_the_token_expires(browser, gateway):
    page = await client(browser, gateway, minted(("alice", 2.0)))
    await gateway.until(lambda: bool(gateway.of("refresh")))
    assert claims_of(gateway.of("refresh")[0]["token"])["n"] == 1
    assert len(gateway.hellos) == 1
    assert page.errors == []


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


async def test_a_token_that_never_comes_is_asked_for_again(browser, gateway):
    # The first is waited for 200 ms. Then the same deadline holds for the handshake, which may take longer.
    token = "token: () => got.asked++ ? (s.times.connect = 60_000, 't') : new Promise(() => {})"
    times = "times: { connect: 200, backoffFirst: 20, backoffMax: 100 }"
    page = await client(browser, gateway, f"{token}, {times}", connect=False)
    await page.evaluate("(got.asked = 0, s.connect())")
    await page.until("s.state === 'live'")
    assert await page.evaluate("got.asked") == 2


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


# --- state and position ---------------------------------------------------------------------------------------------

FRESH = "cursor: undefined, times: { backoffFirst: 20, backoffMax: 100, ack: 20 }"


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


SWITCHING = f"token: () => [{json.dumps(jwt())}, {json.dumps(jwt(user='bob'))}][window.who]"


async def test_after_switching_user_nothing_of_the_former_one_is_kept_or_sent(browser, gateway):
    await gateway.publish({}, {})
    page = await client(browser, gateway, f"{FRESH}, {SWITCHING}", connect=False)
    await page.evaluate(
        """(window.who = 0, got.inboxes = [],
            s.addEventListener('reset', ({ detail }) => got.inboxes.push([detail.reason, detail.inbox.length])),
            s.connect())"""
    )
    await page.until("s.state === 'live' && s.unread.count === 2")
    await page.evaluate("(s.close(), s.read({ ids: ['of-alice'] }), s.read({ all: true }), window.who = 1)")
    await gateway.until(lambda: not gateway.sessions)  # what was said before the end has arrived
    gateway.epoch, gateway.log = "e9", []
    gateway.said.clear()
    await page.evaluate("s.connect()")
    await page.until("s.state === 'live'")
    assert gateway.hellos[-1]["snapshot"] is True
    assert "cursor" not in gateway.hellos[-1]
    assert await page.evaluate("got.inboxes") == [["snapshot", 2], ["user", 0], ["snapshot", 0]]
    assert await page.evaluate("[s.unread.count, s.marks.size, s.cursor, s.bookmark?.user]") == [0, 0, "e9.0", "bob"]
    await gateway.publish({})
    await gateway.until(lambda: bool(gateway.of("ack")))
    assert {frame.get("cursor") for frame in gateway.of("ack")} <= {"e9.0", "e9.1"}
    assert gateway.of("read") == []
    assert "alice" not in await page.evaluate("JSON.stringify({ ...localStorage, ...sessionStorage })")


async def test_a_refresh_that_brings_another_users_token_begins_a_session_of_that_user(browser, gateway):
    page = await client(browser, gateway, f"{FRESH}, {minted(('alice', 2.0), ('bob', 600.0))}")
    await gateway.until(lambda: len(gateway.hellos) == 2)
    await page.until("s.state === 'live'")
    assert gateway.of("refresh") == []
    assert claims_of(gateway.hellos[1]["token"])["sub"] == "bob"
    assert gateway.hellos[1]["snapshot"] is True
    # Whether the first session has got as far as its own snapshot is not the point.
    assert (await page.evaluate("got.resets"))[-2:] == ["user", "snapshot"]


async def test_clients_that_were_closed_leave_no_listener_in_the_window(browser, gateway):
    page = await client(browser, gateway, connect=False)

    async def listening() -> int:
        count = 0
        for expression in ("window", "document"):
            found = await page.call("Runtime.evaluate", expression=expression)
            listeners = await page.call("DOMDebugger.getEventListeners", objectId=found["result"]["objectId"])
            count += len(listeners["listeners"])
        return count

    before = await listening()
    await page.evaluate("s.connect()")
    assert await listening() > before
    await page.evaluate("(() => { for (let n = 0; n < 20; n += 1) { s.close(); s.connect(); } s.close(); })()")
    assert await listening() == before
    await page.evaluate("s.connect()")
    await page.until("s.state === 'live'")
    await gateway.cut(4403)
    await page.until("s.state === 'closed'")
    assert await listening() == before


# --- what is done ---------------------------------------------------------------------------------------------------


async def test_a_record_whose_listener_threw_is_not_acknowledged_and_nothing_after_it(browser, gateway):
    page = await client(browser, gateway, connect=False)
    await page.evaluate(
        "(s.addEventListener('record', (e) => { if (e.detail.seq === 3) throw new Error('mine'); }), s.connect())"
    )
    await gateway.publish({}, {})
    await gateway.until(lambda: bool(gateway.of("ack")) and gateway.of("ack")[-1]["cursor"] == "e1.2")
    await gateway.publish({}, {})
    await records(page, [1, 2, 3, 4])
    await page.until("got.errors.length === 1")
    assert await page.evaluate("got.errors[0].code") == "listener"
    await gateway.cut()
    await gateway.until(lambda: len(gateway.hellos) == 2)
    await page.until("s.state === 'live'")
    await gateway.publish({})
    await records(page, [1, 2, 3, 4, 5])
    await page.until("!s.timers.ack")
    assert {ack["cursor"] for ack in gateway.of("ack")} <= {"e1.0", "e1.1", "e1.2"}
    assert await page.evaluate("s.bookmark.cursor") == "e1.2"


async def test_a_record_is_done_when_what_its_listener_promised_is(browser, gateway):
    page = await client(browser, gateway, connect=False)
    await page.evaluate(
        """(s.addEventListener('record', (e) => e.detail.seq === 1 && new Promise((done) => { window.finish = done; })),
            s.connect())"""
    )
    await gateway.publish({}, {})
    await records(page, [1, 2])
    await gateway.sessions[0].send({"op": "pong", **gateway.at(2)})
    await page.until("!s.timers.ack")
    assert [ack for ack in gateway.of("ack") if ack["cursor"] != "e1.0"] == []
    await page.evaluate("finish()")
    await gateway.until(lambda: {"op": "ack", "cursor": "e1.2"} in gateway.said)
    assert await page.evaluate("s.bookmark.cursor") == "e1.2"


async def test_the_app_is_told_of_followed_records_and_when_their_listeners_are_done_with_them(browser, gateway):
    parent = f"00-{'a' * 32}-{'b' * 16}-"
    options = """trace: (parent, { id }) => {
      (got.traces ??= []).push(`${id} ${parent.slice(-2)}`);
      if (id === 'r4') throw new Error('mine');
      return (failed) => { got.traces.push(`${id} ${failed}`); };
    }"""
    page = await client(browser, gateway, options, connect=False)
    await page.evaluate(
        """(s.addEventListener('record', (e) => {
              if (e.detail.seq === 5) throw new Error('mine');
              return e.detail.seq === 1 && new Promise((done) => { window.finish = done; });
            }), s.connect())"""
    )
    flags = ("01", "00", "03", "01", "01")
    await gateway.publish(*({"trace": parent + flag} for flag in flags), {}, {"trace": "nonsense-01"})
    await records(page, [1, 2, 3, 4, 5, 6, 7])
    assert await page.evaluate("got.traces") == ["r1 01", "r3 03", "r3 false", "r4 01", "r5 01", "r5 true"]
    await page.evaluate("finish()")
    await page.until("got.traces.includes('r1 false')")


async def test_listeners_are_added_once_removed_and_may_remove_themselves_or_close(browser, gateway):
    await gateway.publish({}, {}, {})
    page = await client(browser, gateway, connect=False)
    await page.evaluate(
        """(() => {
          window.calls = { once: 0, twice: 0, self: 0, object: 0, gone: 0 };
          s.addEventListener("record", () => { calls.once += 1; }, { once: true });
          const twice = () => { calls.twice += 1; };
          s.addEventListener("record", twice); s.addEventListener("record", twice);
          const self = () => { calls.self += 1; s.removeEventListener("record", self); };
          s.addEventListener("record", self);
          s.addEventListener("record", { handleEvent() { calls.object += 1; } });
          const gone = () => { calls.gone += 1; };
          s.addEventListener("record", gone); s.removeEventListener("record", gone);
          s.addEventListener("record", (e) => { if (e.detail.seq === 3) s.close(); });
          s.connect();
        })()"""
    )
    await page.until("s.state === 'closed'")
    assert await page.evaluate("calls") == {"once": 1, "twice": 3, "self": 1, "object": 3, "gone": 0}
    await gateway.until(lambda: not gateway.sessions)
    assert await page.evaluate("[got.records, Object.keys(s.timers).filter((name) => name !== 'ack')]") == [
        [1, 2, 3],
        [],
    ]


@pytest.mark.parametrize("state", ["connecting", "catching-up", "live"])
async def test_a_client_that_is_closed_in_any_state_stays_closed_and_asks_for_nothing(browser, gateway, state):
    page = await client(
        browser, gateway, f"{minted(('alice', 1.2))}, times: {{ backoffFirst: 1, backoffMax: 1 }}", connect=False
    )
    await page.evaluate(f"(s.addEventListener('state', (e) => e.detail.state === '{state}' && s.close()), s.connect())")
    await page.until("s.state === 'closed'")
    await gateway.until(lambda: not gateway.sessions)
    asked = await page.evaluate("got.asked ?? 0")
    await page.evaluate("new Promise((done) => setTimeout(done, 1500))")  # longer than any timer of this client
    assert await page.evaluate("[got.states.at(-1), got.asked ?? 0]") == ["closed", asked]
    assert page.errors == []


# --- marks ----------------------------------------------------------------------------------------------------------


async def test_a_mark_written_into_a_dying_socket_is_said_again_until_the_log_shows_it(browser, gateway):
    gateway.stores_reads = False
    await gateway.publish({}, {})
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    await page.evaluate("(s.read({ ids: ['r1'] }), s.read({ all: true }))")
    await gateway.until(lambda: len(gateway.of("read")) == 2)
    said, gateway.stores_reads = list(gateway.of("read")), True
    gateway.said.clear()
    await gateway.cut()
    await gateway.until(lambda: len(gateway.of("read")) == 2)
    assert sorted(map(str, gateway.of("read"))) == sorted(map(str, said))
    await page.until("s.marks.size === 0")
    await gateway.cut()
    await gateway.until(lambda: len(gateway.hellos) == 3)
    await page.until("s.state === 'live'")
    assert len(gateway.of("read")) == 2  # the log has shown them: not a third time


async def test_a_mark_that_was_stored_while_its_session_died_is_not_said_again(browser, gateway):
    await gateway.publish({})
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    gateway.stores_reads = False
    await page.evaluate("s.read({ ids: ['r1'] })")
    await gateway.until(lambda: len(gateway.of("read")) == 1)
    await gateway.cut()
    await gateway.publish({"kind": "read", "ids": ["r1"]})
    await gateway.until(lambda: len(gateway.hellos) == 2)
    await page.until("s.marks.size === 0 && s.state === 'live'")
    assert len(gateway.of("read")) == 1


async def test_a_lower_mark_does_not_take_the_place_of_a_higher_one(browser, gateway):
    await gateway.publish({}, {}, {})
    page = await client(browser, gateway)
    await records(page, [1, 2, 3])
    await page.evaluate(
        """(s.close(), s.read({ upTo: { cursor: 'e1.3', seq: 3 } }), s.read({ upTo: { cursor: 'e1.1', seq: 1 } }),
            s.connect())"""
    )
    await page.until("s.marks.size === 0")
    assert gateway.of("read") == [{"op": "read", "up_to": "e1.3"}]


async def test_a_mark_beyond_what_a_session_was_sent_waits_and_one_of_another_log_is_given_up(browser, gateway):
    await gateway.publish({})
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    await page.evaluate(
        "s.read({ upTo: { cursor: 'e1.3', seq: 3 } })"
    )  # another tab may be ahead: said now, it would be a bad frame
    await gateway.publish({})
    await page.until("s.cursor === 'e1.2'")
    await gateway.cut()
    await gateway.until(lambda: len(gateway.hellos) == 2)
    await page.until("s.state === 'live'")
    assert gateway.of("read") == []
    await gateway.publish({})
    await gateway.cut()
    await gateway.until(lambda: gateway.of("read") == [{"op": "read", "up_to": "e1.3"}])
    await page.until("s.marks.size === 0")
    await page.evaluate("s.read({ upTo: { cursor: 'e7.1', seq: 1 } })")
    await page.until("got.errors.length === 2")
    assert await page.evaluate("got.errors.map((one) => one.code)") == ["stale_cursor", "mark_lost"]
    assert await page.evaluate("[got.errors[1].upTo, s.marks.size]") == ["e7.1", 0]


async def test_a_mark_that_was_refused_for_now_is_said_again_and_one_that_is_never_shown_is_given_up(browser, gateway):
    gateway.stores_reads = False
    await gateway.publish({})
    page = await client(browser, gateway, f"times: {{ mark: {HELD_MS}, backoffFirst: 20, backoffMax: 100 }}")
    await page.until("s.state === 'live'")
    await page.evaluate(HELD)
    await page.evaluate("s.read({ ids: ['no-such-record'] })")
    for number in range(1, 9):
        await gateway.until(lambda said=number: len(gateway.of("read")) == said)
        await gateway.refuse_last("read", "too_many_reads")
        await page.until(f"got.errors.length === {number}")
        await page.evaluate("fire()")
    assert await page.evaluate("s.marks.size") == 1  # refused is not lost
    await page.evaluate("{ for (let turn = 0; turn < 10; turn += 1) fire(); }")
    await page.until("got.errors.some((error) => error.code === 'mark_lost')")
    assert await page.evaluate("got.errors.at(-1).ids") == ["no-such-record"]
    assert await page.evaluate("s.marks.size") == 0


async def test_a_page_that_marks_row_after_row_does_not_flood_the_gateway(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    await page.evaluate("{ for (let number = 0; number < 700; number++) s.read({ ids: [`r${number}`] }); }")
    await page.until("s.marks.size === 0")
    assert len(gateway.of("read")) <= 5
    await page.evaluate("(s.read({ ids: ['first'] }), s.read({ ids: ['last'] }), s.close())")  # closing says what waits
    await gateway.until(lambda: {"first", "last"} <= {id for frame in gateway.of("read") for id in frame["ids"]})
    assert len(gateway.hellos) == 1


async def test_a_mark_never_shown_is_given_up_however_many_frames_were_refused_before(browser, gateway):
    page = await client(browser, gateway, connect=False)
    lost = await page.evaluate(
        """(async () => {
          const { Marks } = await import("/seamark.js");
          const marks = new Marks(), lost = [];
          marks.add(["a"]);
          marks.take(null);
          for (let n = 0; n < 40; n++) marks.refused("read-1");
          for (let n = 0; n < 11; n++) { lost.push(...(marks.tick()?.ids ?? [])); marks.take(null); }
          return lost;
        })()"""
    )
    assert lost == ["a"]


async def test_what_is_no_mark_is_refused_where_it_is_made_and_does_not_cost_the_session(browser, gateway):
    page = await client(browser, gateway)
    await page.until("s.state === 'live'")
    for wrong in (
        "{ ids: [undefined] }",
        "{ ids: [''] }",
        "{ ids: ['x'.repeat(129)] }",
        "{ upTo: 'e1.1' }",
        "{ ids: [7] }",
        "{ ids: ['é'] }",
    ):
        said = await page.evaluate(f"(() => {{ try {{ s.read({wrong}); }} catch (e) {{ return String(e); }} }})()")
        assert "TypeError" in said, wrong
    assert "RangeError" in await page.evaluate(
        "(() => { try { s.read({ ids: Array.from({ length: 1001 }, (_, n) => `r${n}`) }); } catch (e) { return String(e); } })()"
    )
    await page.evaluate("s.read({ ids: [] })")
    assert gateway.of("read") == []


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


async def test_a_listener_that_throws_does_not_stop_the_others_or_the_log(browser, gateway):
    page = await client(browser, gateway, connect=False)
    await page.evaluate("(s.addEventListener('record', () => { throw new Error('mine'); }), s.connect())")
    await gateway.publish({}, {})
    await records(page, [1, 2])
    assert len(page.errors) == 2
    assert all("mine" in error for error in page.errors)
