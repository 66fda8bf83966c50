"""APNs: each row of its table, by the protocol itself; tokens of the other environment; one JWT for all."""

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from engine.channels.push.apns import ApnsSender
from engine.channels.push.apns_pool import ApnsPool
from engine.channels.push.signing import ApnsToken
from ops.dev.providers.faults import Answers
from tests.support.pushing import DEVICE, KEY_ID, TEAM_ID, a_message, apple, apple_device, apple_key, client_tls

SINCE = 1_764_000_000_123
PERMANENT: tuple[Any, ...] = ("permanent", "message", None)
CONFIG: tuple[Any, ...] = ("config", "key", None)
INVALID: tuple[Any, ...] = ("target_invalid", "message", None)

# providers.md 2.1, row by row: status, reason → kind, scope, seconds to wait.
ROWS: list[tuple[int, str, tuple[Any, ...]]] = [
    (200, "", ("ok", "message", None)),
    (400, "DeviceTokenNotForTopic", INVALID),
    (400, "MissingDeviceToken", PERMANENT),
    (400, "BadCollapseId", PERMANENT),
    (400, "BadExpirationDate", PERMANENT),
    (400, "BadMessageId", PERMANENT),
    (400, "BadPriority", PERMANENT),
    (400, "InvalidPushType", PERMANENT),
    (400, "DuplicateHeaders", PERMANENT),
    (400, "PayloadEmpty", PERMANENT),
    (400, "MissingTopic", ("config", "target", None)),
    (400, "BadTopic", ("config", "target", None)),
    (400, "TopicDisallowed", ("config", "target", None)),
    (400, "IdleTimeout", ("transient", "message", 0.0)),
    (403, "InvalidProviderToken", CONFIG),
    (403, "MissingProviderToken", CONFIG),
    (403, "BadCertificate", CONFIG),
    (403, "BadCertificateEnvironment", CONFIG),
    (403, "Forbidden", CONFIG),
    (404, "BadPath", PERMANENT),
    (405, "MethodNotAllowed", PERMANENT),
    (410, "Unregistered", INVALID),
    (410, "ExpiredToken", INVALID),
    (413, "PayloadTooLarge", PERMANENT),
    (429, "TooManyRequests", ("throttled", "target", 60.0)),
    (429, "TooManyProviderTokenUpdates", ("throttled", "key", 60.0)),
    (500, "InternalServerError", ("transient", "message", None)),
    (503, "ServiceUnavailable", ("transient", "message", None)),
    (503, "Shutdown", ("transient", "message", None)),
]


@pytest.mark.parametrize(("status", "reason", "action"), ROWS, ids=[f"{status}-{reason}" for status, reason, _ in ROWS])
async def test_a_row_of_apples_table_is_acted_on_as_it_says(status: int, reason: str, action: tuple[Any, ...]) -> None:
    async with apple() as one:
        if status != 200:
            one.production.faults.script([Answers(status=status, code=reason)])
        outcome = await one.send()
    assert (outcome.kind, outcome.scope, outcome.retry_after_seconds) == action
    assert outcome.known
    assert outcome.code == (f"{status}/{reason}" if reason else str(status))
    assert outcome.provider == "apple"
    assert one.production.log.accepted == (1 if status == 200 else 0)
    assert one.sandbox.connected == 0, "only a token that is none is tried elsewhere"


async def test_while_apple_takes_pushes_our_key_is_right_whatever_it_says_of_the_app_of_one_token() -> None:
    """A user who registers a token for another team's app must not stop everybody's pushes."""
    async with apple() as one:
        assert (await one.send()).kind == "ok"
        one.production.faults.script([Answers(status=403, code="InvalidProviderToken")])
        outcome = await one.send()
    assert (outcome.kind, outcome.scope, outcome.alarm) == ("config", "target", True)


@pytest.mark.parametrize(
    ("status", "kind"), [(418, "permanent"), (429, "throttled"), (502, "transient"), (302, "permanent")]
)
async def test_a_status_or_reason_that_is_new_is_judged_by_its_class_and_shown_to_operators(
    status: int, kind: str
) -> None:
    async with apple() as one:
        one.production.faults.script([Answers(status=status, code="BrandNewReason")])
        outcome = await one.send()
    assert (outcome.kind, outcome.known, outcome.code) == (kind, False, f"{status}/BrandNewReason")


async def test_what_was_accepted_carries_apples_id_and_everything_the_device_needs() -> None:
    async with apple() as one:
        outcome = await one.send(message={"badge": 3, "collapse_key": "orders", "url": "https://example.com/17"})
        again = await one.send()
        other = await one.send(key="b")
    first, *_ = one.production.log.messages(to=DEVICE)
    assert first.id == outcome.provider_id == again.provider_id != other.provider_id
    assert first.shown == {"app": "com.example.app", "badge": 3, "title": "Shipped", "body": "It is on its way"}
    assert first.raw["apns-collapse-id"] == "orders"
    assert first.raw["payload"]["seamark"] == {
        "id": "order-17",
        "type": "order.shipped",
        "url": "https://example.com/17",
    }


@pytest.mark.parametrize("status", [429, 503])
async def test_apples_own_wait_goes_before_the_table(status: int) -> None:
    async with apple() as one:
        one.production.faults.script([Answers(status=status, code="", headers={"Retry-After": "7"})])
        outcome = await one.send()
    assert outcome.retry_after_seconds == 7.0


async def test_a_device_that_is_gone_is_said_to_be_since_when() -> None:
    """Registered again since then it is another one: 410 arrives late."""
    async with apple() as one:
        one.production.gone[DEVICE] = SINCE
        outcome = await one.send()
    assert (outcome.kind, outcome.code) == ("target_invalid", "410/Unregistered")
    assert outcome.target_invalid_at == datetime.fromtimestamp(SINCE / 1000, UTC)


@pytest.mark.parametrize("stored", ["production", "sandbox"])
async def test_a_token_of_the_other_environment_is_sent_there_and_stored_so(stored: str) -> None:
    async with apple() as one:
        wrong, right = (one.production, one.sandbox) if stored == "production" else (one.sandbox, one.production)
        wrong.foreign.add(DEVICE)
        outcome = await one.send(environment=stored)
    assert (outcome.kind, outcome.environment) == ("ok", "sandbox" if stored == "production" else "production")
    assert (wrong.log.accepted, right.log.accepted) == (0, 1)


async def test_a_token_that_neither_environment_knows_is_invalid() -> None:
    async with apple() as one:
        one.production.foreign.add(DEVICE)
        one.sandbox.foreign.add(DEVICE)
        outcome = await one.send()
        garbage = await one.send(to="abcd")
    assert (outcome.kind, outcome.code, outcome.environment) == ("target_invalid", "400/BadDeviceToken", "")
    assert garbage.kind == "target_invalid"


@pytest.mark.parametrize(
    ("second", "kind"),
    [
        (Answers(status=503, code="ServiceUnavailable"), "transient"),
        (Answers(status=429, code="TooManyRequests"), "throttled"),
        (Answers(status=403, code="InvalidProviderToken"), "target_invalid"),  # the key is for one environment only
        (Answers(status=410, code="Unregistered"), "target_invalid"),
    ],
)
async def test_no_token_is_retired_while_the_other_environment_cannot_say(second: Answers, kind: str) -> None:
    async with apple() as one:
        one.production.foreign.add(DEVICE)
        one.sandbox.faults.script([second])
        assert (await one.send()).kind == kind


async def test_an_expired_jwt_is_renewed_and_the_push_sent_again() -> None:
    """Our clock is 45 minutes behind, so Apple sees a token that is an hour old."""
    skew = {"seconds": 0.0}
    start = (time.time() // 2400) * 2400 + 30 * 60  # half an hour into a window
    async with apple(now=lambda: start, theirs=lambda: start + skew["seconds"]) as one:
        assert (await one.send()).kind == "ok"
        skew["seconds"] = 45 * 60
        outcomes = await asyncio.gather(*(one.send(key=str(count)) for count in range(5)))
        assert {outcome.kind for outcome in outcomes} == {"transient"}
        assert {outcome.retry_after_seconds for outcome in outcomes} == {0.0}
        assert (await one.send()).kind == "ok"
        assert len(one.production.tokens[KEY_ID]) == 2, "replaced once for all"


async def test_a_young_jwt_that_is_called_expired_is_left_alone_and_the_clock_blamed() -> None:
    start = (time.time() // 2400) * 2400 + 60
    async with apple(now=lambda: start, theirs=lambda: start + 2 * 3600) as one:
        outcome = await one.send()
    assert (outcome.kind, outcome.scope, outcome.code) == ("config", "key", "403/ExpiredProviderToken")


async def test_a_key_that_apple_does_not_know_stops_its_sender_and_retires_nobody() -> None:
    async with apple() as one:
        stranger = ApnsToken(apple_key(), "OTHERKEY12", TEAM_ID)
        pools = {"production": ApnsPool("127.0.0.1", one.production.port, client_tls())}
        sender = ApnsSender("apple", stranger, pools={**pools, "sandbox": pools["production"]})
        outcome = await sender.send(a_message(), apple_device(), key="a", deadline_seconds=20)
        await sender.close()
    assert (outcome.kind, outcome.code) == ("config", "403/InvalidProviderToken")


async def test_two_workers_over_many_connections_use_one_jwt() -> None:
    """Apple answers 429 to a key whose tokens change: aioapns mints one for each connection."""
    async with apple() as one:
        pool = ApnsPool("127.0.0.1", one.production.port, client_tls())
        second = ApnsSender(
            "apple", ApnsToken(apple_key(), KEY_ID, TEAM_ID), pools={"production": pool, "sandbox": pool}
        )
        sends = [one.send(key=f"a{count}") for count in range(30)]
        sends += [second.send(a_message(), apple_device(), key=f"b{count}", deadline_seconds=20) for count in range(30)]
        outcomes = await asyncio.gather(*sends)
        await second.close()
    assert {outcome.kind for outcome in outcomes} == {"ok"}
    assert one.production.connected >= 2
    assert len(one.production.tokens[KEY_ID]) == 1


async def test_a_payload_that_was_cut_is_one_that_apple_takes() -> None:
    async with apple() as one:
        outcome = await one.send(message={"body": "日本👩‍👩‍👧‍👦" * 2000, "data": {"a": "b" * 9000}})
    (accepted,) = one.production.log.messages()
    assert outcome.kind == "ok"
    assert accepted.shown["body"].endswith("…")
    assert len(json.dumps(accepted.raw["payload"], ensure_ascii=False, separators=(",", ":")).encode()) <= 4096
