"""The JavaScript SDK in a real browser against a simulated gateway: read marks that a connection may lose."""

from __future__ import annotations

import pytest

from tests.support.sdkpages import HELD, HELD_MS, client, records

pytestmark = pytest.mark.timeout(240)


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
