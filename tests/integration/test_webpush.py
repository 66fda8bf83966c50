"""Web Push: each row of its table, by the protocol itself, with a browser behind it that decrypts and a service that checks."""

import json
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from engine.channels.push.signing import VapidTokens
from engine.channels.push.webpush import WebPushSender
from ops.dev.providers.faults import Answers, Hangs, Late, NoTls, Resets, SlowBody
from tests.support.pushing import Browsers, a_message, browser_target, browsers, client_tls

PERMANENT: tuple[Any, ...] = ("permanent", "message", None)
CONFIG: tuple[Any, ...] = ("config", "target", None)
INVALID: tuple[Any, ...] = ("target_invalid", "message", None)

# providers.md 2.3, row by row: answer → kind, scope, seconds to wait; the code that is kept.
ROWS: dict[str, tuple[Answers | None, tuple[Any, ...], str]] = {
    "201": (None, ("ok", "message", None), "201"),
    "200": (Answers(status=200), ("ok", "message", None), "200"),
    "202": (Answers(status=202), ("ok", "message", None), "202"),
    "400": (Answers(status=400, text="bad TTL"), PERMANENT, "400"),
    "400 registration": (Answers(status=400, text="UnauthorizedRegistration"), CONFIG, "400/UnauthorizedRegistration"),
    "400 vapid": (Answers(status=400, text="invalid VAPID public key"), CONFIG, "400/vapid"),
    "403 bad jwt": (Answers(status=403, body='{"reason":"BadJwtToken"}'), CONFIG, "403/BadJwtToken"),
    "404": (Answers(status=404), INVALID, "404"),
    "410": (Answers(status=410), INVALID, "410"),
    "413": (Answers(status=413), PERMANENT, "413"),
    "429": (Answers(status=429), ("throttled", "domain", 60.0), "429"),
    "429 with a wait": (Answers(status=429, headers={"Retry-After": "9"}), ("throttled", "domain", 9.0), "429"),
    "500": (Answers(status=500), ("transient", "message", 30.0), "500"),
    "502": (Answers(status=502), ("transient", "message", 30.0), "502"),
    "503": (Answers(status=503), ("transient", "message", 30.0), "503"),
    "503 with a wait": (Answers(status=503, headers={"Retry-After": "5"}), ("transient", "message", 5.0), "503"),
    "errno 201": (Answers(status=503, body='{"errno":201}'), ("transient", "message", 30.0), "503/errno_201"),
    "errno 202": (Answers(status=503, body='{"errno":202}'), ("transient", "message", 0.0), "503/errno_202"),
}


@pytest.mark.parametrize("row", ROWS)
async def test_a_row_of_the_push_services_table_is_acted_on_as_it_says(row: str) -> None:
    answer, action, code = ROWS[row]
    async with browsers() as one:
        one.service.faults.script([answer])
        outcome = await one.send()
    assert (outcome.kind, outcome.scope, outcome.retry_after_seconds) == action
    assert (outcome.code, outcome.known, outcome.provider) == (code, True, "vapid")
    assert outcome.target_invalid_at is None


@pytest.mark.parametrize("status", [401, 403])
async def test_a_subscription_that_stays_refused_while_others_pass_is_invalid(status: int) -> None:
    """Apple answers so to dead ones."""
    async with browsers() as one:
        other = one.subscribe()
        one.service.faults.script([Answers(status=status), None, Answers(status=status)])
        first = await one.send()
        assert (first.kind, first.retry_after_seconds) == ("transient", 60.0)
        assert (await one.send(other)).kind == "ok"
        last = await one.send()
    assert (last.kind, last.code) == ("target_invalid", str(status))


@pytest.mark.parametrize("status", [401, 403])
async def test_when_a_service_refuses_everybody_the_key_is_wrong_and_nobody_is_retired(status: int) -> None:
    async with browsers() as one:
        assert (await one.send()).kind == "ok"
        one.service.faults.stand(Answers(status=status))
        several = [one.subscribe() for _ in range(5)]
        outcomes = [await one.send(browser) for _ in range(3) for browser in several]
    assert [outcome.kind for outcome in outcomes[:2]] == ["transient", "transient"]
    assert {(outcome.kind, outcome.scope) for outcome in outcomes[2:]} == {("config", "domain")}


async def test_another_key_than_the_browsers_subscribed_with_retires_nobody() -> None:
    """The service itself checks it; a key that was changed refuses all subscriptions there are."""
    async with browsers() as one:
        changed = VapidTokens(ec.generate_private_key(ec.SECP256R1()), "mailto:ops@example.com")
        hosts = (f"127.0.0.1:{one.service.port}",)
        sender = WebPushSender("vapid", changed, hosts=hosts, tls=client_tls())
        targets = [browser_target(one.subscribe()) for _ in range(4)]
        outcomes = [await sender.send(a_message(), each, key="a", deadline_seconds=20) for each in targets * 3]
        await sender.close()
    assert {outcome.kind for outcome in outcomes} == {"transient", "config"}
    assert one.service.log.accepted == 0


async def test_a_dead_subscription_among_living_ones_is_found_out() -> None:
    async with browsers() as one:
        one.service.dead.add(one.browser.endpoint)
        assert (await one.send()).kind == "transient"
        assert (await one.send(one.subscribe())).kind == "ok"
        assert (await one.send()).kind == "target_invalid"


async def test_the_browser_reads_what_was_sent_and_the_service_nothing() -> None:
    async with browsers() as one:
        outcome = await one.send(badge=3, url="https://example.com/17", data={"order": 17})
    (accepted,) = one.service.log.messages(to=one.browser.endpoint)
    assert outcome.kind == "ok"
    assert len(outcome.provider_id) == 32
    assert accepted.shown == {
        "id": "order-17",
        "type": "order.shipped",
        "url": "https://example.com/17",
        "title": "Shipped",
        "body": "It is on its way",
        "tag": "order-17",
        "badge": 3,
        "data": {"order": 17},
    }
    assert (accepted.raw["TTL"], accepted.raw["Urgency"]) == ("3600", "normal")


async def test_the_longest_payload_is_one_that_services_take() -> None:
    async with browsers() as one:
        assert (await one.send(body="日本👩‍👩‍👧‍👦" * 1000)).kind == "ok"
    (accepted,) = one.service.log.messages()
    assert 4096 - 40 < accepted.raw["bytes"] <= 4096


async def test_what_is_sent_twice_has_one_topic() -> None:
    async with browsers() as one:
        for _ in range(2):
            await one.send()
        await one.send(id="another")
    assert list(one.service.log.repeated().values()) == [2]


@pytest.mark.parametrize(
    ("fault", "code"), [(Hangs(accepts=True), "timeout"), (Resets(accepts=True), "reset"), (Resets(), "reset")]
)
async def test_what_left_and_was_not_answered_is_ambiguous(fault: Any, code: str) -> None:
    async with browsers() as one:
        one.service.faults.script([fault])
        outcome = await one.send(seconds=0.5)
        assert (outcome.kind, outcome.code) == ("ambiguous", code)
        assert one.service.log.accepted == int(fault.accepts)


async def test_what_never_left_is_transient() -> None:
    async with browsers() as one:
        one.service.faults.script([NoTls()])
        first = await one.send()
        await one.service.stop()
        second = await one.send()
    assert (first.kind, second.kind) == ("transient", "transient")
    assert one.service.log.accepted == 0


@pytest.mark.parametrize("fault", [Late(seconds=0.3), SlowBody(seconds=5.0)])
async def test_a_slow_service_is_waited_for_as_long_as_it_matters(fault: Any) -> None:
    async with browsers() as one:
        one.service.faults.script([fault])
        assert (await one.send(seconds=3.0)).kind == "ok"


async def test_a_subscription_that_moved_is_followed_to_where_push_services_are() -> None:
    async with browsers() as one:
        moved = one.subscribe()
        one.browser.p256dh, one.browser.auth = moved.p256dh, moved.auth
        one.service.faults.script([Answers(status=301, headers={"Location": moved.endpoint})])
        assert (await one.send()).kind == "ok"
        one.service.faults.script(
            [Answers(status=308, headers={"Location": moved.endpoint.replace(one.service.url, "")})]
        )
        assert (await one.send()).kind == "ok"
    assert len(one.service.log.messages(to=moved.endpoint)) == 2


async def test_a_redirect_leads_nowhere_else() -> None:
    reached: list[str] = []

    async def note(request: web.Request) -> web.Response:
        reached.append(request.path)
        return web.Response(status=201)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", note)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}/internal"
    async with browsers() as one:
        for location in (address, address.replace("http:", "https:"), ""):
            one.service.faults.script([Answers(status=301, headers={"Location": location})])
            assert (await one.send()).kind == "permanent"
    await runner.cleanup()
    assert reached == []


@pytest.mark.parametrize("endpoint", ["https://10.0.0.1/x", "https://redis.internal/x", "http://fcm.googleapis.com/x"])
async def test_an_endpoint_elsewhere_is_neither_posted_to_nor_retired(endpoint: str) -> None:
    async with browsers() as one:
        target = browser_target(one.browser).__class__(
            id="tab", platform="webpush", token=endpoint, app="shop", keys=browser_target(one.browser).keys
        )
        outcome = await one.sender.send(a_message(), target, key="a", deadline_seconds=5)
    assert (outcome.kind, outcome.scope, outcome.code) == ("config", "target", "host")


async def test_keys_that_are_none_make_a_subscription_invalid() -> None:
    async with browsers() as one:
        one.browser.p256dh = "BA" + "A" * 85
        outcome = await one.send()
    assert (outcome.kind, outcome.code) == ("target_invalid", "keys")


async def test_a_provider_id_gives_no_right_to_withdraw_the_message() -> None:
    async with browsers() as one:
        outcome = await one.send()
    (accepted,) = one.service.log.messages()
    assert accepted.id not in json.dumps(outcome.provider_id)


async def all_outcomes(one: Browsers) -> str:
    return repr([await one.send(), await one.send(one.subscribe())])


async def test_no_outcome_repeats_an_endpoint() -> None:
    async with browsers() as one:
        one.service.faults.script([Answers(status=418, text=one.browser.endpoint)])
        assert one.browser.endpoint not in await all_outcomes(one)
