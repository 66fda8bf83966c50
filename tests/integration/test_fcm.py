"""FCM HTTP v1: each row of its table, by the protocol itself; the access token, had once and renewed."""

import asyncio
import json
from typing import Any

import pytest

from engine.channels.channel import Outcome
from ops.dev.providers.faults import Answers, Hangs, Late, NoTls, Resets, SlowBody
from tests.support.pushing import Google, google

FCM_ERROR = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
QUOTA_FAILURE = "type.googleapis.com/google.rpc.QuotaFailure"
NOT_A_TOKEN = "The registration token is not a valid FCM registration token"


def refusal(status: int, code: str = "", *more: dict[str, Any], text: str = "no", headers: Any = None) -> Answers:
    details = ([{"@type": FCM_ERROR, "errorCode": code}] if code else []) + list(more)
    body = json.dumps({"error": {"code": status, "message": text, "status": "WHATEVER", "details": details}})
    return Answers(status=status, body=body, headers=headers or {})


def fields(*names: str) -> dict[str, Any]:
    return {"@type": BAD_REQUEST, "fieldViolations": [{"field": name, "description": "wrong"} for name in names]}


def quota(subject: str, description: str = "") -> dict[str, Any]:
    return {"@type": QUOTA_FAILURE, "violations": [{"subject": subject, "description": description}]}


PERMANENT: tuple[Any, ...] = ("permanent", "message", None)
CONFIG: tuple[Any, ...] = ("config", "key", None)
INVALID: tuple[Any, ...] = ("target_invalid", "message", None)

# providers.md 2.2, row by row and with what it says in words: answer → kind, scope, seconds to wait; the code that is kept.
ROWS: dict[str, tuple[Answers | None, tuple[Any, ...], str]] = {
    "accepted": (None, ("ok", "message", None), "200"),
    "400 no token": (refusal(400, "INVALID_ARGUMENT", text=NOT_A_TOKEN), INVALID, "400/INVALID_TOKEN"),
    "400 field token": (refusal(400, "INVALID_ARGUMENT", fields("message.token")), INVALID, "400/INVALID_TOKEN"),
    "400 other field": (
        refusal(400, "INVALID_ARGUMENT", fields("message.android.ttl"), text=NOT_A_TOKEN),
        PERMANENT,
        "400/INVALID_ARGUMENT",
    ),
    "400 token and other field": (
        refusal(400, "INVALID_ARGUMENT", fields("message.token", "message.data")),
        PERMANENT,
        "400/INVALID_ARGUMENT",
    ),
    "400 without a reason": (refusal(400, "INVALID_ARGUMENT"), PERMANENT, "400/INVALID_ARGUMENT"),
    "404 unregistered": (refusal(404, "UNREGISTERED"), INVALID, "404/UNREGISTERED"),
    "404 without it": (refusal(404, text="Requested entity was not found."), CONFIG, "404"),
    "404 of a proxy": (Answers(status=404, body="<html>not found</html>"), CONFIG, "404"),
    "403 sender": (refusal(403, "SENDER_ID_MISMATCH"), INVALID, "403/SENDER_ID_MISMATCH"),
    "403 without it": (refusal(403, text="API not enabled"), CONFIG, "403"),
    "401 third party": (
        refusal(401, "THIRD_PARTY_AUTH_ERROR"),
        ("config", "target", None),
        "401/THIRD_PARTY_AUTH_ERROR",
    ),
    "401 apns": (refusal(401, "APNS_AUTH_ERROR"), ("config", "target", None), "401/APNS_AUTH_ERROR"),
    "429 project": (refusal(429, "QUOTA_EXCEEDED"), ("throttled", "key", 60.0), "429/QUOTA_EXCEEDED"),
    "429 project named": (
        refusal(429, "QUOTA_EXCEEDED", quota("project:demo", "Message rate exceeded")),
        ("throttled", "key", 60.0),
        "429/QUOTA_EXCEEDED",
    ),
    "429 device": (
        refusal(429, "QUOTA_EXCEEDED", quota("", "Device Message rate exceeded")),
        ("throttled", "target", 60.0),
        "429/QUOTA_EXCEEDED",
    ),
    "429 topic": (
        refusal(429, "QUOTA_EXCEEDED", quota("topic:news")),
        ("throttled", "message", 60.0),
        "429/QUOTA_EXCEEDED",
    ),
    "429 with a wait": (
        refusal(429, "QUOTA_EXCEEDED", headers={"Retry-After": "17"}),
        ("throttled", "key", 17.0),
        "429/QUOTA_EXCEEDED",
    ),
    "500": (refusal(500, "INTERNAL"), ("transient", "message", 10.0), "500/INTERNAL"),
    "503": (refusal(503, "UNAVAILABLE"), ("transient", "message", 10.0), "503/UNAVAILABLE"),
    "503 with a wait": (
        refusal(503, "UNAVAILABLE", headers={"Retry-After": "30"}),
        ("transient", "message", 30.0),
        "503/UNAVAILABLE",
    ),
    "502 of a proxy": (Answers(status=502, body="<html>"), ("transient", "message", 10.0), "502"),
    "unspecified": (
        refusal(500, "UNSPECIFIED_ERROR"),
        ("transient", "message", 10.0),
        "500/UNSPECIFIED_ERROR",
    ),
}


@pytest.mark.parametrize("row", ROWS)
async def test_a_row_of_fcms_table_is_acted_on_as_it_says(row: str) -> None:
    answer, action, code = ROWS[row]
    async with google() as one:
        one.fcm.faults.script([answer])
        outcome = await one.send()
    assert (outcome.kind, outcome.scope, outcome.retry_after_seconds) == action
    assert (outcome.code, outcome.known, outcome.provider) == (code, True, "google")
    assert outcome.target_invalid_at is None
    assert one.fcm.log.accepted == (0 if answer else 1)


async def test_an_unspecified_error_is_tried_a_few_times_only() -> None:
    async with google() as one:
        one.fcm.faults.script([refusal(500, "UNSPECIFIED_ERROR")])
        assert (await one.send()).retries_max == 3


@pytest.mark.parametrize(("status", "kind"), [(409, "permanent"), (504, "transient"), (302, "permanent")])
async def test_a_code_that_is_new_is_judged_by_its_class_and_shown_to_operators(status: int, kind: str) -> None:
    async with google() as one:
        one.fcm.faults.script([refusal(status, "BRAND_NEW")])
        outcome = await one.send()
    assert (outcome.kind, outcome.known, outcome.code) == (kind, False, f"{status}/BRAND_NEW")


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (Hangs(), "ambiguous", "timeout"),
        (Hangs(accepts=True), "ambiguous", "timeout"),
        (Resets(), "ambiguous", "reset"),
        (Resets(accepts=True), "ambiguous", "reset"),
    ],
)
async def test_what_left_and_was_not_answered_is_ambiguous(fault: Any, kind: str, code: str) -> None:
    async with google() as one:
        one.fcm.faults.script([fault])
        outcome = await one.send(seconds=0.5)
        assert (outcome.kind, outcome.code) == (kind, code)
        assert one.fcm.log.accepted == int(fault.accepts)


async def test_what_never_left_is_transient() -> None:
    async with google(signed_in=False) as one:
        one.fcm.faults.script([NoTls()])
        assert (await one.send()).kind == "transient"
        await one.fcm.stop()
        assert (await one.send()).kind == "transient"
        assert one.fcm.log.accepted == 0


async def test_a_refusal_whose_body_does_not_come_is_asked_again_and_retires_nobody() -> None:
    """Of a 404 only the body says whether it is the device or the project that is not there."""
    async with google() as one:
        one.fcm.unregistered.add("a" * 40)
        one.fcm.faults.script([SlowBody(seconds=5.0)])
        outcome = await one.send(seconds=1.0)
    assert (outcome.kind, outcome.code) == ("transient", "404/cut_off")


async def test_an_acceptance_whose_body_does_not_come_is_one() -> None:
    async with google() as one:
        one.fcm.faults.script([SlowBody(seconds=5.0)])
        assert (await one.send(seconds=1.0)).kind == "ok"


async def test_a_slow_answer_in_time_is_an_answer() -> None:
    async with google() as one:
        one.fcm.faults.script([Late(seconds=0.3)])
        assert (await one.send()).kind == "ok"


async def test_the_simulated_project_itself_refuses_as_fcm_does() -> None:
    async with google() as one:
        one.fcm.unregistered.add("u" * 40)
        one.fcm.strangers.add("s" * 40)
        codes = [(await one.send(to=device)).code for device in ("u" * 40, "s" * 40, "short")]
    assert codes == ["404/UNREGISTERED", "403/SENDER_ID_MISMATCH", "400/INVALID_TOKEN"]


async def test_another_project_is_a_wrong_set_up_and_retires_nobody() -> None:
    async with google(project="another") as one:
        outcome = await one.send()
    assert (outcome.kind, outcome.code) == ("config", "404")


async def test_what_was_accepted_carries_fcms_name_and_everything_the_device_needs() -> None:
    async with google() as one:
        outcome = await one.send(badge=3, url="https://example.com/17", data={"order": 17})
    (accepted,) = one.fcm.log.messages()
    assert accepted.id == outcome.provider_id
    assert accepted.shown == {"badge": 3, "title": "Shipped", "body": "It is on its way"}
    assert accepted.raw["message"]["android"]["ttl"] == "3600s"
    assert json.loads(accepted.raw["message"]["data"]["data"]) == {"order": 17}


async def all_of(one: Google, count: int) -> list[Outcome]:
    return await asyncio.gather(*(one.send() for _ in range(count)))


async def test_the_access_token_is_asked_for_once_for_all_who_wait() -> None:
    async with google(signed_in=False) as one:
        assert {outcome.kind for outcome in await all_of(one, 30)} == {"ok"}
        assert len(one.fcm.granted) == 1


async def test_who_is_cancelled_does_not_take_the_token_from_the_others() -> None:
    async with google(signed_in=False) as one:
        one.fcm.faults.script([Late(seconds=0.3)])
        first, second = (asyncio.create_task(one.send()) for _ in range(2))
        async with asyncio.timeout(20):
            while not one.fcm.faults.met:
                await asyncio.sleep(0.01)
        first.cancel()
        assert (await second).kind == "ok"


async def test_a_token_is_renewed_five_minutes_before_it_ends_and_serves_until_then() -> None:
    async with google() as one:
        tokens = one.sender._tokens
        assert tokens._ends_at - tokens._renew_at == pytest.approx(300.0)
        tokens._renew_at = 0.0
        assert (await one.send()).kind == "ok"
        assert len(one.fcm.granted) == 2


async def test_a_token_that_fcm_drops_is_asked_for_anew() -> None:
    async with google() as one:
        one.sender._tokens._issued_at -= 600
        one.fcm.granted.clear()
        outcome = await one.send()
        assert (outcome.kind, outcome.code, outcome.retry_after_seconds) == ("transient", "401", 0.0)
        assert (await one.send()).kind == "ok"


async def test_a_new_token_that_fcm_does_not_take_is_a_wrong_set_up() -> None:
    async with google() as one:
        one.fcm.granted.clear()
        assert (await one.send()).kind == "config"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answers(status=503), "transient"),
        (Answers(status=429), "transient"),
        (Answers(status=400, body='{"error":"invalid_grant"}'), "config"),
        (Answers(status=200, body="<html>"), "transient"),
    ],
)
async def test_without_an_access_token_nothing_is_sent_and_google_is_not_asked_by_everybody(
    answer: Answers, kind: str
) -> None:
    async with google(signed_in=False) as one:
        one.fcm.token_answers = [answer]
        outcomes = await all_of(one, 20) + await all_of(one, 20)
        assert {(outcome.kind, outcome.scope) for outcome in outcomes} == {(kind, "key")}
        assert one.fcm.token_answers == []
        assert one.fcm.granted == {}
        assert one.fcm.log.accepted == 0


async def test_while_a_token_still_counts_a_failure_to_renew_it_hurts_nobody() -> None:
    async with google() as one:
        one.sender._tokens._renew_at = 0.0
        one.fcm.token_answers = [Answers(status=503)]
        assert {outcome.kind for outcome in await all_of(one, 10)} == {"ok"}
        assert one.fcm.token_answers == []
