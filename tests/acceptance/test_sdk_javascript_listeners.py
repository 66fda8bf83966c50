"""The JavaScript SDK in a real browser against a simulated gateway: what its listeners throw, promise and leave behind."""

from __future__ import annotations

import pytest

from tests.support.sdkpages import client, minted, records

pytestmark = pytest.mark.timeout(240)


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


async def test_a_listener_that_throws_does_not_stop_the_others_or_the_log(browser, gateway):
    page = await client(browser, gateway, connect=False)
    await page.evaluate("(s.addEventListener('record', () => { throw new Error('mine'); }), s.connect())")
    await gateway.publish({}, {})
    await records(page, [1, 2])
    assert len(page.errors) == 2
    assert all("mine" in error for error in page.errors)
