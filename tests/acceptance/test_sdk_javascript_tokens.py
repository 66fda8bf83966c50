"""The JavaScript SDK in a real browser against a simulated gateway: tokens, and users that take turns."""

from __future__ import annotations

import json

import pytest

from tests.support.sdkpages import FRESH, claims_of, client, jwt, minted

pytestmark = pytest.mark.timeout(240)


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


async def test_a_token_that_never_comes_is_asked_for_again(browser, gateway):
    # The first is waited for 200 ms. Then the same deadline holds for the handshake, which may take longer.
    token = "token: () => got.asked++ ? (s.times.connect = 60_000, 't') : new Promise(() => {})"
    times = "times: { connect: 200, backoffFirst: 20, backoffMax: 100 }"
    page = await client(browser, gateway, f"{token}, {times}", connect=False)
    await page.evaluate("(got.asked = 0, s.connect())")
    await page.until("s.state === 'live'")
    assert await page.evaluate("got.asked") == 2


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
