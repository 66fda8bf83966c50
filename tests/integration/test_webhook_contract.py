"""Each row of the table of webhooks, against a receiver that checks signatures, and attackers who want our own network asked."""

import asyncio
import gzip
import ipaddress
import ssl
from datetime import UTC, datetime

import pytest
import trustme
from aiohttp import web

from engine.channels.channel import Context, Job, Outcome
from engine.channels.exchange import BODY_BYTES_MAX
from engine.channels.webhook.channel import Endpoint, WebhookChannel
from engine.channels.webhook.signature import message_id
from engine.directory.webhooks import make_secret
from ops.dev.providers.faults import Answers, Hangs, Late, NoTls, Resets, SlowBody
from ops.dev.providers.webhook import WebhookReceiver

HOST = "hooks.example.com"
SECRET = make_secret()
LOOPBACK = ipaddress.ip_network("127.0.0.1/32")
JOB = Job(
    id="n1",
    tenant="t",
    user="zoë",
    type="order.shipped",
    channel="webhook",
    first_at=datetime(2026, 1, 1, tzinfo=UTC),
    data={"order": 17},
)
DEADLINE_SECONDS = 20.0


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(authority: trustme.CA, name: str = HOST) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
async def receiver(authority):
    async with WebhookReceiver(SECRET, tls=server_tls(authority)) as simulator:
        yield simulator


@pytest.fixture
async def channel(authority):
    channel = WebhookChannel(exempt=[LOOPBACK], lookup=here, tls=client_tls(authority))
    yield channel
    await channel.close()


async def here(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def endpoint(receiver: WebhookReceiver, *secrets: str, path: str = "/in?a=1") -> Endpoint:
    return Endpoint("wh_1", f"https://{HOST}:{receiver.port}{path}", secrets or (SECRET,))


async def post(
    channel: WebhookChannel, target: Endpoint, *, key: str = JOB.key, deadline_seconds: float = DEADLINE_SECONDS
) -> Outcome:
    body = channel.render(JOB, Context(now=JOB.first_at))
    return await channel.send(body, target, key=key, deadline_seconds=deadline_seconds)


ROWS = [
    # status, headers, kind, scope, retry_after_seconds
    (200, {}, "ok", "message", None),
    (202, {}, "ok", "message", None),
    (204, {}, "ok", "message", None),
    (301, {"Location": "https://127.0.0.1/"}, "permanent", "message", None),
    (302, {"Location": "/in"}, "permanent", "message", None),
    (307, {"Location": "http://169.254.169.254/"}, "permanent", "message", None),
    (400, {}, "transient", "message", None),
    (401, {}, "transient", "message", None),
    (404, {}, "transient", "message", None),
    (408, {}, "transient", "message", None),
    (410, {}, "target_invalid", "message", None),
    (425, {}, "transient", "message", None),
    (429, {}, "throttled", "target", None),
    (429, {"Retry-After": "120"}, "throttled", "target", 120.0),
    (429, {"Retry-After": "9" * 30}, "throttled", "target", 86_400.0),
    (429, {"Retry-After": "soon"}, "throttled", "target", None),
    (500, {}, "transient", "message", None),
    (502, {}, "throttled", "target", None),
    (503, {}, "transient", "message", None),
    (503, {"Retry-After": "30"}, "throttled", "target", 30.0),
    (504, {}, "throttled", "target", None),
    (599, {}, "transient", "message", None),
]


@pytest.mark.parametrize(("status", "headers", "kind", "scope", "retry_after_seconds"), ROWS)
async def test_what_an_endpoint_answers_means(
    receiver, channel, status, headers, kind, scope, retry_after_seconds
) -> None:
    receiver.faults.script([Answers(status=status, headers=headers)])
    outcome = await post(channel, endpoint(receiver))
    assert (outcome.kind, outcome.scope, outcome.retry_after_seconds, outcome.known) == (
        kind,
        scope,
        retry_after_seconds,
        True,
    )
    assert (outcome.code, outcome.provider) == (str(status), "webhook")
    assert receiver.requests == 1, "no redirect was followed"
    assert receiver.log.accepted == 0


@pytest.mark.parametrize(
    ("fault", "code", "accepted"),
    [
        (Hangs(), "timeout", 0),
        (Hangs(accepts=True), "timeout", 1),
        (Resets(), "reset", 0),
        (Resets(accepts=True), "reset", 1),
        (NoTls(), "tls or connect", 0),  # whichever the loop notices first: the alert, or the end of the connection
    ],
    ids=str,
)
async def test_no_answer_is_tried_again_under_the_same_id(receiver, channel, fault, code: str, accepted: int) -> None:
    receiver.faults.script([fault])
    outcome = await post(channel, endpoint(receiver), deadline_seconds=1.5)
    assert outcome.kind == "transient"
    assert outcome.code in code.split(" or ")
    assert outcome.unanswered == (code in {"timeout", "reset"})
    assert receiver.log.accepted == accepted
    assert (await post(channel, endpoint(receiver))).kind == "ok"
    assert {message.key for message in receiver.log.messages()} == {message_id(JOB.key)}
    assert bool(receiver.log.repeated()) == bool(accepted)


async def test_nobody_there_is_tried_again(receiver, authority, unused_tcp_port: int) -> None:
    async def nowhere(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    lost = WebhookChannel(exempt=[LOOPBACK], lookup=nowhere, tls=client_tls(authority))
    assert (await post(lost, endpoint(receiver))).code == "dns"
    await lost.close()
    closed = WebhookChannel(exempt=[LOOPBACK], lookup=here, tls=client_tls(authority))
    outcome = await post(closed, Endpoint("wh_1", f"https://{HOST}:{unused_tcp_port}/", (SECRET,)))
    await closed.close()
    assert (outcome.kind, outcome.code) == ("transient", "connect")


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_certificate_of_another_name_or_of_nobody_is_no_endpoint(authority, trusted: bool) -> None:
    issuer = authority if trusted else trustme.CA()
    name = "other.example.com" if trusted else HOST
    channel = WebhookChannel(exempt=[LOOPBACK], lookup=here, tls=client_tls(authority))
    async with WebhookReceiver(SECRET, tls=server_tls(issuer, name)) as receiver:
        outcome = await post(channel, endpoint(receiver))
    await channel.close()
    assert (outcome.kind, outcome.code) == ("transient", "tls")
    assert receiver.log.accepted == 0


async def test_a_webhook_says_what_happened_and_is_signed(receiver, channel) -> None:
    assert (await post(channel, endpoint(receiver))).kind == "ok"
    (message,) = receiver.log.messages(to="/in")
    assert message.shown == {
        "type": "order.shipped",
        "timestamp": "2026-01-01T00:00:00Z",
        "id": "n1",
        "user": "zoë",
        "data": {"order": 17},
    }
    assert message.raw["Content-Type"] == "application/json"
    assert message.id == message_id(JOB.key)


async def test_while_a_secret_is_replaced_both_are_good_and_afterwards_one(receiver, channel) -> None:
    new = make_secret()
    assert (await post(channel, endpoint(receiver, new, SECRET))).kind == "ok"
    receiver.secret = new
    assert (await post(channel, endpoint(receiver, new, SECRET))).kind == "ok"
    assert (await post(channel, endpoint(receiver, new))).kind == "ok"
    assert (await post(channel, endpoint(receiver, SECRET))).code == "401"
    assert receiver.refused == ["none of the signatures is by the one secret that this receiver knows"]


async def test_an_attempt_has_a_time_of_its_own(receiver, authority) -> None:
    """Else every retry after five minutes would be refused as a replay."""
    past = WebhookChannel(exempt=[LOOPBACK], lookup=here, tls=client_tls(authority), clock=lambda: 1_700_000_000.0)
    assert (await post(past, endpoint(receiver))).code == "401"
    await past.close()
    assert receiver.refused == ["too old, or from the future"]


async def test_a_slow_answer_is_taken_and_a_slow_body_is_not_waited_for(receiver, channel) -> None:
    receiver.faults.script([Late(seconds=0.3), SlowBody(seconds=30.0)])
    assert (await post(channel, endpoint(receiver))).kind == "ok"
    assert (await post(channel, endpoint(receiver))).kind == "ok"
    assert receiver.log.accepted == 2


# --- attackers ---


async def hostile(answer, authority, requests: int = 1) -> tuple[list[Outcome], web.AppRunner]:
    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_tls(authority)).start()
    channel = WebhookChannel(exempt=[LOOPBACK], lookup=here, tls=client_tls(authority))
    target = Endpoint("wh_1", f"https://{HOST}:{runner.addresses[0][1]}/", (SECRET,))
    outcomes = [await post(channel, target) for _ in range(requests)]
    await channel.close()
    await runner.cleanup()
    return outcomes, runner


async def test_of_an_endless_body_no_more_is_read_than_64_kib(authority) -> None:
    written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        stream = web.StreamResponse()
        await stream.prepare(request)
        while True:
            await stream.write(b"a" * 16_384)
            written += 16_384

    (outcome,), _ = await hostile(endless, authority)
    assert outcome.kind == "ok"
    assert written < BODY_BYTES_MAX + (8 << 20), "beyond what sockets hold, nothing was taken"


async def test_a_bomb_is_not_unpacked(authority, monkeypatch) -> None:
    bomb = gzip.compress(bytes(40_000_000))
    assert len(bomb) < BODY_BYTES_MAX
    read = []
    from engine.channels import exchange

    real = exchange._read

    async def noting(*args) -> bytes:
        read.append(await real(*args))
        return read[-1]

    monkeypatch.setattr(exchange, "_read", noting)

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    (outcome,), _ = await hostile(answer, authority)
    assert outcome.kind == "ok"
    assert read == [bomb]


async def test_a_cookie_of_one_answer_is_in_no_further_request(authority) -> None:
    cookies = []

    async def answer(request: web.Request) -> web.Response:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "session=mine; Path=/"})

    await hostile(answer, authority, requests=2)
    assert cookies == [None, None]


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 5000,
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 1_000_000,
        b"hello\r\n\r\n",
        b"\x00" * 99,
    ],
)
async def test_endless_headers_and_what_is_no_http_are_no_answer(authority, sent: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_tls(authority))
    channel = WebhookChannel(exempt=[LOOPBACK], lookup=here, tls=client_tls(authority))
    port = server.sockets[0].getsockname()[1]
    outcome = await post(channel, Endpoint("wh_1", f"https://{HOST}:{port}/", (SECRET,)))
    await channel.close()
    server.close()
    assert outcome.kind == "transient"
    assert outcome.code in ("malformed", "reset")


BLOCKED = [
    "https://127.0.0.1:{port}/", "https://[::1]:{port}/", "https://[::ffff:127.0.0.1]:{port}/", "https://[::ffff:7f00:1]:{port}/",
    "https://[64:ff9b::7f00:1]:{port}/", "https://[2002:7f00:1::]:{port}/", "https://[::7f00:1]:{port}/", "https://127.1:{port}/",
    "https://0x7f.1:{port}/", "https://2130706433:{port}/", "https://017700000001:{port}/", "https://0:{port}/",
    "https://localhost:{port}/",
    "https://169.254.169.254/latest/meta-data/", "https://metadata.google.internal/", "http://" + HOST + ":{port}/",
    "https://user:password@" + HOST + ":{port}/", "https://" + HOST + ":{port}\\@127.0.0.1/",
]  # fmt: skip


@pytest.mark.parametrize("url", BLOCKED)
async def test_an_address_of_our_own_network_is_never_asked_however_it_is_written(
    receiver, authority, url: str
) -> None:
    channel = WebhookChannel(tls=client_tls(authority))
    outcome = await post(channel, Endpoint("wh_1", url.format(port=receiver.port), (SECRET,)))
    await channel.close()
    assert (outcome.kind, outcome.scope, outcome.code) == ("config", "target", "blocked")
    assert receiver.requests == 0


LED_TO = [["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"], ["2002:7f00:1::"], ["169.254.169.254"],
["8.8.8.8", "127.0.0.1"],
          ["10.0.0.1"], ["fd00:ec2::254"]]  # fmt: skip


@pytest.mark.parametrize("addresses", LED_TO, ids=str)
async def test_a_name_that_leads_into_our_own_network_is_never_asked(receiver, authority, addresses: list[str]) -> None:
    async def there(host: str, port: int) -> list[str]:
        return addresses

    channel = WebhookChannel(lookup=there, tls=client_tls(authority))
    outcome = await post(channel, endpoint(receiver))
    await channel.close()
    assert (outcome.kind, outcome.scope, outcome.code) == ("config", "target", "blocked")
    assert receiver.requests == 0


async def test_a_name_that_leads_elsewhere_the_second_time_is_looked_at_the_second_time(authority) -> None:
    """Rebinding: what was looked at is what is connected to, for each connection anew."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"]])

    async def rebinding(host: str, port: int) -> list[str]:
        return next(answers)

    channel = WebhookChannel(exempt=[LOOPBACK], lookup=rebinding, tls=client_tls(authority))
    async with WebhookReceiver(SECRET, host="0.0.0.0", tls=server_tls(authority)) as receiver:
        receiver.faults.script([Resets(accepts=True)])  # the first connection is gone afterwards
        outcomes = [await post(channel, endpoint(receiver)) for _ in range(3)]
    await channel.close()
    assert [outcome.code for outcome in outcomes] == ["reset", "blocked", "200"]
    assert receiver.log.accepted == 2


async def test_a_resolver_that_lies_to_the_guard_is_caught_at_the_socket(receiver, authority, monkeypatch) -> None:
    """The last look is at the very address that is connected to."""
    from engine.channels.webhook.guard import GuardedResolver, _result

    async def lying(self, host: str, port: int = 0, family: int = 0) -> list:
        return [_result(host, port, "127.0.0.1")]

    monkeypatch.setattr(GuardedResolver, "resolve", lying)
    channel = WebhookChannel(tls=client_tls(authority))
    outcome = await post(channel, endpoint(receiver))
    await channel.close()
    assert outcome.code == "blocked"
    assert receiver.requests == 0


async def test_a_name_that_the_operator_leads_to_a_private_server_opens_that_server_and_nothing_beside_it(
    receiver, authority
) -> None:
    async with WebhookReceiver(SECRET, tls=server_tls(authority, "other.example.com")) as beside:
        channel = WebhookChannel(hosts={HOST: ("127.0.0.1", receiver.port)}, lookup=here, tls=client_tls(authority))
        named = await post(channel, Endpoint("wh_1", f"https://{HOST.upper()}/in", (SECRET,)))
        others = [Endpoint("wh_2", url, (SECRET,)) for url in (
            f"https://other.example.com:{beside.port}/in", f"https://127.0.0.1:{receiver.port}/in",
        )]  # fmt: skip
        refused = [await post(channel, one) for one in others]
        await channel.close()
        assert (named.kind, [one.code for one in refused]) == ("ok", ["blocked", "blocked"])
        assert (receiver.requests, beside.requests) == (1, 0)


async def test_proxies_of_the_environment_are_not_used(receiver, channel, monkeypatch, unused_tcp_port: int) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_tcp_port}")
    assert (await post(channel, endpoint(receiver))).kind == "ok"


async def test_neither_address_nor_secret_gets_into_an_outcome_or_a_log(receiver, channel, caplog) -> None:
    caplog.set_level(0)
    receiver.faults.script([Answers(status=500, text="s3cret-path"), Resets(), None])
    target = endpoint(receiver, path="/s3cret-path")
    said = [await post(channel, target) for _ in range(3)]
    for secret in ("s3cret-path", SECRET, HOST):
        assert secret not in f"{said} {caplog.text}"
