"""Each row of the tables of SMS providers, against providers that speak the real protocols."""

import asyncio
from datetime import UTC, datetime

import pytest
from aiohttp import web

from engine.channels.aws import Credentials
from engine.channels.channel import Context, Job, Unsendable
from engine.channels.exchange import BODY_BYTES_MAX, open_http
from engine.channels.sms.callbacks import inbound_of, is_signed_by_twilio, report_of
from engine.channels.sms.channel import SmsChannel, SmsOptions
from engine.channels.sms.segments import segmented
from engine.channels.sms.sns import Sns, SnsSettings
from engine.channels.sms.twilio import Twilio, TwilioSettings
from ops.dev.providers.faults import Answers, Hangs, Late, Resets, SlowBody
from ops.dev.providers.sms import SnsSimulator, TwilioSimulator

NUMBER = "+4366412345678"
SENDER = "+15005550006"
SECRET = "5up3r-s3cret"
TEXT = segmented("Your code is 1234")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEADLINE_SECONDS = 20.0


@pytest.fixture
async def twilio():
    async with TwilioSimulator("AC1", SECRET) as simulator:
        yield simulator


@pytest.fixture
async def sns():
    async with SnsSimulator("AKIA1", SECRET) as simulator:
        yield simulator


def by_twilio(url: str, secret: str = SECRET, **settings: str) -> Twilio:
    return Twilio(
        TwilioSettings(account="AC1", secret=secret, sender=SENDER, url=url, **settings), open_http(connections_max=10)
    )


def by_sns(url: str, secret: str = SECRET, key_id: str = "AKIA1", **settings: str) -> Sns:
    credentials = Credentials(key_id=key_id, secret=secret)
    return Sns(
        SnsSettings(region="eu-central-1", credentials=credentials, url=url, **settings), open_http(connections_max=10)
    )


async def sent(provider, text=TEXT, number: str = NUMBER, deadline_seconds: float = DEADLINE_SECONDS):
    try:
        return await provider.send(text, number, deadline_seconds=deadline_seconds)
    finally:
        await provider.close()


TWILIO_ROWS = [
    # status, code, headers, kind, scope, retries_max, elsewhere, alarm
    (429, "20429", {}, "throttled", "key", None, False, False),
    (429, "", {"Retry-After": "7"}, "throttled", "key", None, False, False),
    (400, "30001", {}, "throttled", "key", None, False, False),
    (401, "20003", {}, "config", "key", None, False, False),
    (401, "", {}, "config", "key", None, False, False),
    (404, "20404", {}, "config", "key", None, False, False),
    (400, "21606", {}, "config", "key", None, False, False),
    (400, "21408", {}, "config", "target", None, False, False),
    (400, "30002", {}, "config", "key", None, False, False),
    (400, "30034", {}, "config", "key", None, False, False),
    (400, "21211", {}, "target_invalid", "message", None, False, False),
    (400, "21614", {}, "target_invalid", "message", None, False, False),
    (400, "30005", {}, "target_invalid", "message", None, False, False),
    (400, "30006", {}, "target_invalid", "message", None, False, False),
    (400, "21608", {}, "config", "target", None, False, False),
    (400, "21612", {}, "permanent", "message", None, False, False),
    (400, "30022", {}, "throttled", "key", None, False, False),
    (400, "21610", {}, "opted_out", "message", None, False, False),
    (400, "30003", {}, "transient", "message", None, False, False),
    (400, "30004", {}, "permanent", "message", None, False, True),
    (400, "30007", {}, "permanent", "message", None, False, True),
    (400, "30008", {}, "transient", "message", 2, True, False),
    (500, "", {}, "transient", "message", 2, True, False),
    (503, "20503", {"Retry-After": "30"}, "transient", "message", 2, True, False),
    (400, "30010", {}, "permanent", "message", None, False, False),
    (400, "30012", {}, "permanent", "message", None, False, False),
    (400, "21617", {}, "permanent", "message", None, False, False),
    (400, "29999", {}, "permanent", "message", None, False, False),
]

SNS_ROWS = [
    (429, "Throttled", "", "throttled", "key", None, False),
    (400, "Throttling", "", "throttled", "key", None, False),
    (403, "AuthorizationError", "", "config", "key", None, False),
    (403, "InvalidSecurity", "", "config", "key", None, False),
    (403, "InvalidClientTokenId", "", "config", "key", None, False),
    (400, "InvalidParameter", "Invalid parameter: PhoneNumber Reason: +1 is not valid", "target_invalid", "message", None, False),
    (400, "InvalidParameter", "Invalid parameter: Message too long", "permanent", "message", None, False),
    (400, "OptedOut", "", "opted_out", "message", None, False),
    (400, "OptedOutException", "", "opted_out", "message", None, False),
    (500, "InternalError", "", "transient", "message", 2, True),
    (503, "", "", "transient", "message", 2, True),
    (400, "EndpointDisabled", "", "target_invalid", "message", None, False),
    (400, "PlatformApplicationDisabled", "", "config", "key", None, False),
    (400, "Novelty", "", "permanent", "message", None, False),
]  # fmt: skip


@pytest.mark.parametrize(("status", "code", "headers", "kind", "scope", "retries", "elsewhere", "alarm"), TWILIO_ROWS)
async def test_what_twilio_answers_means(twilio, status, code, headers, kind, scope, retries, elsewhere, alarm) -> None:
    twilio.faults.script([Answers(status=status, code=code, headers=headers)])
    outcome = await sent(by_twilio(twilio.url))
    assert (outcome.kind, outcome.scope, outcome.retries_max, outcome.elsewhere, outcome.alarm) == (
        kind,
        scope,
        retries,
        elsewhere,
        alarm,
    )
    assert outcome.code == (f"{status}/{code}" if code else f"{status}")
    assert outcome.known == (code not in ("29999", "20404", "20503"))
    if "Retry-After" in headers:
        assert outcome.retry_after_seconds == float(headers["Retry-After"])
    assert twilio.log.accepted == 0


@pytest.mark.parametrize(("status", "code", "text", "kind", "scope", "retries", "elsewhere"), SNS_ROWS)
async def test_what_sns_answers_means(sns, status, code, text, kind, scope, retries, elsewhere) -> None:
    sns.faults.script([Answers(status=status, code=code, text=text)])
    outcome = await sent(by_sns(sns.url))
    assert (outcome.kind, outcome.scope, outcome.retries_max, outcome.elsewhere) == (kind, scope, retries, elsewhere)
    assert outcome.known == (code != "Novelty")


async def test_twilio_takes_a_text_once_and_says_what_it_costs(twilio) -> None:
    long = segmented("€" * 100)
    outcome = await sent(by_twilio(twilio.url), long)
    (message,) = twilio.log.messages(to=NUMBER)
    assert (outcome.kind, outcome.provider, outcome.provider_id, outcome.segments) == ("ok", "twilio", message.id, 2)
    assert (message.shown["text"], message.raw["From"]) == (long.text, SENDER)


async def test_sns_takes_a_signed_text_once_and_says_what_it_costs(sns) -> None:
    long = segmented("Grüße & 100 % + „mehr“ 😀 " * 5)
    outcome = await sent(by_sns(sns.url, sender="SEAMARK", price_usd_max="0.10"), long)
    (message,) = sns.log.messages(to=NUMBER)
    assert (outcome.kind, outcome.provider_id, outcome.segments) == ("ok", message.id, len(long.segments))
    assert outcome.code == "200/unreported", "whoever waits for `delivered` sees that it never comes"
    assert message.shown["text"] == long.text
    given = {
        message.raw[f"MessageAttributes.entry.{n}.Name"]: message.raw[f"MessageAttributes.entry.{n}.Value.StringValue"]
        for n in (1, 2, 3)
    }
    assert given == {
        "AWS.SNS.SMS.SMSType": "Transactional",
        "AWS.SNS.SMS.SenderID": "SEAMARK",
        "AWS.SNS.SMS.MaxPrice": "0.10",
    }


@pytest.mark.parametrize("number", ["+15005550001", "+15005550009", "0664123"])
async def test_a_number_that_twilio_knows_to_be_none_is_none(twilio, number: str) -> None:
    assert (await sent(by_twilio(twilio.url), number=number)).kind == "target_invalid"


async def test_a_number_that_sns_knows_to_be_none_is_none(sns) -> None:
    assert (await sent(by_sns(sns.url), number="0664123")).kind == "target_invalid"


@pytest.mark.parametrize("wrong", ["twilio", "secret", "key"])
async def test_a_wrong_key_is_a_matter_of_configuration_and_shown_nowhere(twilio, sns, wrong: str, caplog) -> None:
    match wrong:
        case "twilio":
            outcome = await sent(by_twilio(twilio.url, secret="wr0ng-s3cret"))
        case "secret":
            outcome = await sent(by_sns(sns.url, secret="wr0ng-s3cret"))
        case _:
            outcome = await sent(by_sns(sns.url, key_id="AKIA2", secret="wr0ng-s3cret"))
    assert (outcome.kind, outcome.scope) == ("config", "key")
    assert "wr0ng" not in f"{outcome} {caplog.text}"


@pytest.mark.parametrize("provider", ["twilio", "sns"])
@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("fault", [Hangs, Resets])
async def test_a_text_that_may_have_been_taken_is_ambiguous(twilio, sns, provider, accepts: bool, fault) -> None:
    """Nobody can be asked whether it was, and to send it again would be to send it twice."""
    simulator = twilio if provider == "twilio" else sns
    simulator.faults.script([fault(accepts=accepts)])
    sender = by_twilio(twilio.url) if provider == "twilio" else by_sns(sns.url)
    outcome = await sent(sender, deadline_seconds=1.5)
    assert (outcome.kind, outcome.code) == ("ambiguous", "timeout" if fault is Hangs else "reset")
    assert simulator.log.accepted == accepts


@pytest.mark.parametrize("make", [by_twilio, by_sns])
@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:{closed}", "connect"),
        ("https://127.0.0.1:{plain}", "tls"),
        ("http://no-such-host.invalid", "dns"),
    ],
)
async def test_a_text_that_has_not_left_may_go_elsewhere(
    twilio, unused_tcp_port: int, make, url: str, code: str
) -> None:
    outcome = await sent(make(url.format(closed=unused_tcp_port, plain=twilio.port)))
    assert (outcome.kind, outcome.code, outcome.elsewhere) == ("transient", code, True)
    assert twilio.log.accepted == 0


async def test_a_slow_answer_is_waited_for_and_a_slow_body_is_not(twilio) -> None:
    twilio.faults.script([Late(seconds=0.3), SlowBody(seconds=30.0)])
    assert (await sent(by_twilio(twilio.url))).provider_id
    outcome = await sent(by_twilio(twilio.url), deadline_seconds=5.0)
    assert (outcome.kind, outcome.provider_id) == ("ok", "")
    assert twilio.log.accepted == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"code":"x","sid":[1]}',
        b"\xff",
        b'{"code":' + b"9" * 99 + b"}",
        b"a" * (3 * BODY_BYTES_MAX),
    ],
)
@pytest.mark.parametrize("make", [by_twilio, by_sns])
@pytest.mark.parametrize(("status", "kind"), [(201, "ok"), (400, "permanent"), (500, "transient")])
async def test_whatever_a_proxy_answers_the_status_decides(body: bytes, make, status: int, kind: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    outcome = await sent(make(f"http://127.0.0.1:{runner.addresses[0][1]}"))
    await runner.cleanup()
    assert (outcome.kind, outcome.provider_id) == (kind, "")


async def test_stop_ends_texts_start_begins_them_again_and_reports_are_signed() -> None:
    """Both ways: what a person answers comes to us, and what Twilio has blocked is told by its answer."""
    got: asyncio.Queue = asyncio.Queue()

    async def receive(request: web.Request) -> web.Response:
        form = [(name, str(value)) for name, value in (await request.post()).items()]
        url = f"{base}{request.path_qs}"
        genuine = is_signed_by_twilio(url, form, request.headers["X-Twilio-Signature"], ["old", SECRET])
        got.put_nowait((request.path, dict(form)))
        return web.Response(status=204 if genuine else 403)

    app = web.Application()
    app.router.add_post("/{path:.*}", receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with TwilioSimulator("AC1", SECRET, inbound_url=f"{base}/inbound?p=twilio") as simulator:
        provider = by_twilio(simulator.url, status_url=f"{base}/status?p=twilio")
        outcome = await provider.send(TEXT, NUMBER, deadline_seconds=DEADLINE_SECONDS)
        assert await simulator.report(outcome.provider_id, "undelivered", "30005") == 204
        _, form = await got.get()
        report = report_of("twilio", form, NOW)
        assert (report.provider_id, report.state, report.outcome.kind) == (
            outcome.provider_id,
            "failed",
            "target_invalid",
        )

        assert await simulator.answer(NUMBER, SENDER, " stop ") == 204
        _, form = await got.get()
        assert (inbound_of(form).number, inbound_of(form).keyword) == (NUMBER, "stop")
        blocked = await provider.send(TEXT, NUMBER, deadline_seconds=DEADLINE_SECONDS)
        assert (blocked.kind, blocked.code) == ("opted_out", "400/21610")

        assert await simulator.answer(NUMBER, SENDER, "START") == 204
        _, form = await got.get()
        assert inbound_of(form).keyword == "start"
        assert (await sent(provider)).kind == "ok"

        simulator.secret = "stolen"
        assert await simulator.answer(NUMBER, SENDER, "STOP") == 403
    await runner.cleanup()


def job(data: dict) -> Job:
    return Job(id="n1", tenant="t", user="u", type="order.shipped", channel="sms", first_at=NOW, data=data)


@pytest.mark.parametrize(
    ("data", "template", "text"),
    [
        (
            {"title": "Shipped", "text": "Order 17", "url": "https://a.example/17"},
            None,
            "Shipped\nOrder 17\nhttps://a.example/17",
        ),
        ({"body": " It’s on its way… "}, None, "It's on its way..."),
        ({"text": "On its way", "body": "<p>On its way</p>"}, None, "On its way"),
        ({"text": " ", "body": "On its way"}, None, "On its way"),
        ({"order": 17}, {"body": "Order {{ data.order }}"}, "Order 17"),
    ],
)
async def test_a_notification_becomes_a_text(twilio, data, template, text: str) -> None:
    channel = SmsChannel(by_twilio(twilio.url))
    rendered = channel.render(job(data), Context(template=template, now=NOW))
    assert rendered.text == text
    outcome = await channel.send(rendered, NUMBER, key="k", deadline_seconds=DEADLINE_SECONDS)
    await channel.close()
    assert outcome.kind == "ok"
    assert [message.shown["text"] for message in twilio.log.messages()] == [text]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({}, "no_text"),
        ({"text": " \n"}, "no_text"),
        ({"text": "ш" * 202}, "too_many_segments"),
        ({"text": 7}, "no_text"),
    ],
)
async def test_a_text_that_is_empty_or_costs_too_much_is_not_sent(data, code: str) -> None:
    channel = SmsChannel(by_twilio("http://127.0.0.1:1"), SmsOptions(segments_max=3))
    with pytest.raises(Unsendable) as refused:
        channel.render(job(data), Context(now=NOW))
    await channel.close()
    assert (refused.value.outcome.kind, refused.value.outcome.code) == ("permanent", code)
