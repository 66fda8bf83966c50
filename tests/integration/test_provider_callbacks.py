"""What providers post becomes receipts and suppressions: of the message that it is about, once, in any order, and of nobody else.

A message goes out by the channel's own code to a simulated provider; what comes back is what that provider was given with it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from engine import metrics
from engine.channels.aws import Credentials
from engine.channels.channel import Context, Job, Members
from engine.channels.email.channel import EmailChannel, Sender
from engine.channels.email.services import Postmark, SendGrid, Ses
from engine.channels.exchange import open_http
from engine.channels.references import References
from engine.channels.sms.channel import SmsChannel
from engine.channels.sms.twilio import Twilio, TwilioSettings
from engine.directory.changing import Directory
from engine.directory.suppressions import find_suppressions, lift_suppression
from engine.directory.users import UserFields, delete_user, put_user
from engine.jobs.claims import Done
from engine.jobs.digests import digest_id
from engine.postgres import asking
from engine.settings import Secret
from ops.dev.providers.mailservices import PostmarkSimulator, SendGridSimulator, SesSimulator
from ops.dev.providers.sms import TwilioSimulator
from ops.dev.servers import NatsServer, Valkey
from projections.folds.deliveries import fold
from seamark.protocol.subjects import receipt_subject
from tests.support.gateways import TestGateway, gateway_on
from tests.support.providerposts import HOST, Amazon, SendGridKey, amazon, login

SECRETS = ("a" * 40, "b" * 40)
ALICE, NUMBER, SENDER = "alice@example.com", "+4366412345678", "+18005551212"
MAILS = "arn:aws:sns:eu-central-1:123456789012:mails"
TEXTS = "arn:aws:sns:eu-central-1:123456789012:texts"
TOKEN = "twilio-token"
NOW = datetime.now(UTC)
FILE = f"""
[email.providers.ses]
kind = "ses"
secret_file = "there is no such file: it is the worker's"

[callbacks.ses]
kind = "ses"
topic = "{MAILS}"

[callbacks.sendgrid]
kind = "sendgrid"
key_files = ["sendgrid.old", "sendgrid.public"]

[callbacks.postmark]
kind = "postmark"
password_files = ["postmark.password"]

[callbacks.twilio]
kind = "twilio"
url = "https://notify.example.com/v1/providers/twilio/callbacks"
token_files = ["twilio.token"]
tenants = ["acme", "other"]

[callbacks.sns]
kind = "sns"
topic = "{TEXTS}"
tenants = ["acme"]
"""


@dataclass
class Stored:
    """A receipt as the projection reads it."""

    subject: bytes
    payload: bytes
    time_nanoseconds: int = 0


@dataclass
class House:
    """A gateway to which providers post, and what they sign with."""

    gateway: TestGateway
    amazon: Amazon
    sendgrid: SendGridKey

    @property
    def directory(self) -> Directory:
        assert self.gateway.context.directory is not None
        return self.gateway.context.directory

    async def post(self, name: str, body: bytes, headers: dict[str, str] | None = None, query: str = "") -> int:
        """Post to the gateway; the status."""
        url = f"{self.gateway.url}/v1/providers/{name}/callbacks{query}"
        async with self.gateway.http.post(url, data=io.BytesIO(body), headers=headers or {}) as answer:
            return answer.status

    async def events(self, *events: dict[str, Any]) -> int:
        """Post events of SendGrid."""
        body = json.dumps(events).encode()
        return await self.post("sendgrid", body, self.sendgrid.headers(body))

    async def delivery(self) -> tuple[str, str, int] | None:
        """The one delivery that receipts tell of."""
        rows = await self.deliveries()
        assert len(rows) <= 1
        return next(iter(rows.values()), None)

    async def deliveries(self) -> dict[str, tuple[str, str, int]]:
        """State, reason and attempts of what receipts tell of, by the id of the notification."""

        told = [Stored(one.pop("subject").encode(), json.dumps(one).encode()) for one in await self.gateway.receipts()]
        rows = fold(told).deliveries  # type: ignore[arg-type]
        return {key[2]: (row.state, row.reason, row.attempts) for key, row in rows.items()}

    async def suppressed(self, tenant: str = "acme", **addresses: str) -> set[tuple[str, str]]:
        """Reason and scope of what is suppressed, of alice's mails by default."""
        async with asking(self.directory.pool, 20) as connection:
            found = await find_suppressions(connection, tenant, addresses or {"email": ALICE})  # type: ignore[arg-type]
        return {(one.reason, one.scope) for one in found}

    async def lift(self) -> None:
        async with asking(self.directory.pool, 20) as connection:
            for one in await find_suppressions(connection, "acme", {"email": ALICE}):
                await lift_suppression(connection, "acme", one.id)


@pytest.fixture
async def house(nats_server: NatsServer, valkey: Valkey, postgres: str, tmp_path: Path) -> AsyncIterator[House]:
    key = SendGridKey()
    for name, text in {"providers.toml": FILE, "sendgrid.public": key.public, "sendgrid.old": SendGridKey().public,
            "postmark.password": "s3cret", "twilio.token": TOKEN}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    async with (
        amazon(tmp_path) as sns,
        gateway_on(nats_server, postgres_url=postgres, redis_url=valkey.url, unsubscribe_secrets=SECRETS,
            providers=str(tmp_path / "providers.toml"), provider_http=sns.http) as gateway,
    ):  # fmt: skip
        made = House(gateway, sns, key)
        async with made.directory.changing("acme", ["alice"]) as change:
            await put_user(change, "alice", UserFields(email=ALICE, phone=NUMBER))
        yield made


def job(channel: Any = "email", **fields: Any) -> Job:
    made: dict[str, Any] = {"id": "n1", "tenant": "acme", "user": "alice", "type": "news.launch", "category": "news",
        "attempt": 1, "first_at": NOW, "data": {"title": "Hello"}}  # fmt: skip
    return Job(channel=channel, **{**made, **fields})


def reference(**fields: Any) -> str:
    return References(SECRETS).of(job(**fields))


def bounce(token: str, id: str = "e1", **said: Any) -> dict[str, Any]:
    """A bounce as SendGrid tells it."""
    return {"event": "bounce", "type": "bounce", "email": ALICE, "timestamp": int(NOW.timestamp()), "sg_event_id": id,
        "sg_message_id": "m1.x", "seamark": token, "status": "5.1.1", "reason": "550 5.1.1 no such user", **said}  # fmt: skip


async def sent(channel: EmailChannel | SmsChannel, what: Job, target: str) -> None:
    rendered = channel.render(what, Context(now=NOW, reference=References(SECRETS).of(what)))
    outcome = await channel.send(rendered, target, key=what.key, deadline_seconds=20)  # type: ignore[arg-type]
    await channel.close()
    assert outcome.kind == "ok"


def mails_by(service: Any) -> EmailChannel:
    return EmailChannel(service, {"default": Sender(address="news@example.org")})


async def test_sendgrid_gives_back_what_it_got_and_a_bounce_ends_the_mail_and_the_address(house: House) -> None:
    async with SendGridSimulator("key") as server:
        await sent(
            mails_by(SendGrid("sendgrid", open_http(connections_max=1), key=Secret("key"), url=server.url)),
            job(),
            ALICE,
        )
        (accepted,) = server.log.messages()
    event = {**bounce("x"), **accepted.raw["custom_args"], "sg_message_id": f"{accepted.id}.filter1"}
    assert await house.events(event) == 200
    assert await house.delivery() == ("failed", "550/5.1.1", 2)
    assert await house.suppressed() == {("hard_bounce", "all")}
    (receipt,) = await house.gateway.receipts()
    assert receipt["subject"] == receipt_subject(house.gateway.partition("alice", "acme"), "acme", "alice")
    assert (receipt["provider"], receipt["id"]) == ("sendgrid", "n1")
    assert ALICE not in json.dumps(receipt)


async def test_postmark_gives_back_what_it_got_and_a_delivery_is_one(house: House) -> None:
    async with PostmarkSimulator("key") as server:
        service = Postmark("postmark", open_http(connections_max=1), key=Secret("key"), url=server.url)
        await sent(mails_by(service), job(), ALICE)
        (accepted,) = server.log.messages()
    assert ALICE not in json.dumps(accepted.raw["metadata"])
    said = {"RecordType": "Delivery", "MessageID": accepted.id, "Recipient": ALICE, "DeliveredAt": NOW.isoformat(),
        "Metadata": accepted.raw["metadata"]}  # fmt: skip
    body = json.dumps(said).encode()
    for wrong in ({}, login("postmark", "guess"), login("guess", "s3cret")):
        assert await house.post("postmark", body, wrong) == 401
    assert await house.delivery() is None
    assert await house.post("postmark", body, login("postmark", "s3cret")) == 200
    assert await house.delivery() == ("delivered", "", 2)
    assert await house.suppressed() == set()


async def test_ses_publishes_to_a_topic_of_which_only_genuine_messages_count(house: House) -> None:
    credentials = Credentials(key_id="AKIDEXAMPLE", secret="s3cret")
    async with SesSimulator(credentials) as server:
        service = Ses(
            "ses", open_http(connections_max=1), region="eu-central-1", credentials=credentials, url=server.url
        )
        await sent(mails_by(service), job(), ALICE)
        (accepted,) = server.log.messages()
    tags = {name: [value] for name, value in accepted.raw["tags"].items()}
    complaint = {"feedbackId": "f1", "timestamp": NOW.isoformat(), "complainedRecipients": [{"emailAddress": ALICE}]}
    said = {"eventType": "Complaint", "mail": {"messageId": accepted.id, "tags": tags}, "complaint": complaint}
    genuine = house.amazon.published(MAILS, said)
    forged = json.loads(genuine) | {"Message": json.dumps(said | {"eventType": "Bounce"})}
    old = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    for body in (
        json.dumps(forged).encode(),
        house.amazon.published(TEXTS, said),  # of another topic, although one of ours
        house.amazon.published(MAILS, said, SigningCertURL="https://evil.example/a.pem"),
        house.amazon.published(MAILS, said, SigningCertURL="https://sns.us-east-1.amazonaws.com/a.pem"),
        house.amazon.published(MAILS, said, Timestamp=old),
        b"{}",
        b"\xff",
        b"[" * 100_000,
    ):
        assert await house.post("ses", body) == 401
    assert await house.delivery() is None
    assert len(house.amazon.asked) <= 1, "strangers must not have us ask Amazon"
    assert await house.post("ses", genuine) == 200
    assert await house.delivery() == ("delivered", "", 2)
    assert await house.suppressed() == {("complaint", "all")}


async def test_a_topic_is_confirmed_at_amazon_and_nowhere_else_and_waits_while_it_is_away(house: House) -> None:
    house.amazon.away = True
    body = house.amazon.published(TEXTS, {"originationNumber": NUMBER, "messageBody": "STOP", "inboundMessageId": "i1"})
    assert await house.post("sns", body) == 503
    house.amazon.away = False
    assert await house.post("sns", body) == 200
    assert await house.suppressed(sms=NUMBER) == {("opted_out", "all")}

    def asks(url: str) -> bytes:
        return house.amazon.published(
            MAILS, "You have chosen", Type="SubscriptionConfirmation", Token="t", SubscribeURL=url
        )

    assert await house.post("ses", asks("https://evil.example/?Action=ConfirmSubscription")) == 400
    assert await house.post("ses", asks(f"https://{HOST}@evil.example/")) == 400
    assert not [path for path in house.amazon.asked if "Confirm" in path]
    assert await house.post("ses", asks(f"https://{HOST}/?Action=ConfirmSubscription&Token=t")) == 200
    assert house.amazon.asked[-1] == "/?Action=ConfirmSubscription&Token=t"


async def test_what_is_posted_twice_changes_nothing_the_second_time(house: House) -> None:
    event = bounce(reference())
    assert await house.events(event) == 200
    await house.lift()
    assert await asyncio.gather(*(house.events(event, event) for _ in range(4))) == [200] * 4
    assert await house.suppressed() == set(), "what was lifted since stays lifted"
    assert await house.delivery() == ("failed", "550/5.1.1", 2)
    assert await house.events(bounce(reference(), "e2")) == 200  # another one is another matter
    assert await house.suppressed() == {("hard_bounce", "all")}


async def test_reports_in_any_order_come_to_the_same(house: House) -> None:
    for id, order in (("n1", ("delivered", "bounce")), ("n2", ("bounce", "delivered"))):
        for event in order:
            said = bounce(reference(id=id)) | {"event": event, "sg_event_id": f"{event}{id}"}
            assert await house.events(said) == 200
    assert set((await house.deliveries()).values()) == {("delivered", "", 2)}
    assert await house.suppressed() == {("hard_bounce", "all")}


async def test_nobody_reports_of_what_was_not_sent_by_us_nor_of_another_channel_or_a_deleted_user(house: House) -> None:
    token = reference()
    strangers = (References(["z" * 40]).of(job()), token[:-1], "", reference(channel="sms"))
    assert await house.events(*(bounce(one, f"e{n}") for n, one in enumerate(strangers))) == 200
    assert await house.delivery() is None
    assert await house.suppressed() == set()
    assert await house.events(bounce(References(SECRETS[1:]).of(job()))) == 200  # made with the secret before
    assert await house.suppressed() == {("hard_bounce", "all")}
    async with house.directory.changing("acme", ["bob"]) as change:
        await put_user(change, "bob", UserFields(email="bob@example.com"))
        await delete_user(change, "bob")
    assert await house.events(bounce(reference(user="bob"), "e9", email="bob@example.com")) == 200
    assert [one["user"] for one in await house.gateway.receipts()] == ["alice"]


async def test_a_report_about_a_digest_is_about_each_of_its_members_and_carries_their_traces(house: House) -> None:
    digest = digest_id("news/2026-03-04T11:00:00Z")
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    claims = house.gateway.context.claims
    assert claims is not None
    mail = job(id=digest, digest="news/2026-03-04T11:00:00Z", tries_before=2)
    members = Members(("n2", "n1"), NOW, traces={"n2": trace}, tried=3)
    look = await claims.look(mail.claim_key)
    await claims.put(mail.claim_key, look, Done(1, "sent", members=members), keep_seconds=60)
    assert await house.events(bounce(References(SECRETS).of(mail))) == 200
    assert await house.deliveries() == dict.fromkeys(("n1", "n2"), ("failed", "550/5.1.1", 7))
    assert {one["id"]: one.get("trace") for one in await house.gateway.receipts()} == {"n2": trace, "n1": None}
    assert await house.suppressed() == {("hard_bounce", "all")}, "the address is one, however many the members are"
    # Nobody knows its members any more; what is known is stored nevertheless.
    assert await house.events(bounce(reference(id=digest, trace=trace), "e2")) == 200
    assert (await house.gateway.receipts())[-1]["id"] == digest
    # An event may have such an id.
    assert await house.events(bounce(reference(id="digest/x", trace=trace), "e3")) == 200
    last = (await house.gateway.receipts())[-1]
    assert (last["id"], last["trace"]) == ("digest/x", trace)


async def test_a_request_that_is_signed_otherwise_too_large_or_for_nobody_is_refused(house: House) -> None:
    body = json.dumps([bounce(reference())]).encode()
    right = house.sendgrid.headers(body)
    assert await house.post("sendgrid", body) == 401
    assert await house.post("sendgrid", body + b" ", right) == 401
    assert await house.post("sendgrid", body, SendGridKey().headers(body)) == 401
    assert await house.post("nobody", body, right) == 404
    assert await house.post("sendgrid", b"x" * (1 << 20) + b"x", right) == 413
    assert await house.post("sendgrid", b"no json", house.sendgrid.headers(b"no json")) == 400
    assert await house.delivery() is None
    assert await house.post("sendgrid", body, right) == 200


async def test_twilio_reports_to_the_address_of_the_text_and_delivered_wins(house: House) -> None:
    async with TwilioSimulator("AC1", TOKEN) as server:
        # Twilio signs the address that it was given, which the proxy before a gateway takes for this one.
        settings = TwilioSettings(account="AC1", secret=TOKEN, sender=SENDER, url=server.url,
            status_url="https://notify.example.com/v1/providers/twilio/callbacks")  # fmt: skip
        channel = SmsChannel(Twilio(settings, open_http(connections_max=1)))
        await sent(channel, job("sms"), NUMBER)
        (accepted,) = server.log.messages()
        query = "?" + accepted.raw["StatusCallback"].partition("?")[2]
        assert "alice" not in query
        status = {"MessageSid": accepted.id, "To": NUMBER, "AccountSid": "AC1"}
        undelivered = status | {"MessageStatus": "undelivered", "ErrorCode": "30005"}
        for wrong in (query[:-1], "", query + "&a=b"):
            assert await twilio(house, undelivered, query, posted_to=wrong) == 401
        assert await house.delivery() is None
        assert await twilio(house, undelivered, query) == 200
        assert await house.delivery() == ("failed", "30005", 2)
        assert await house.suppressed(sms=NUMBER) == {("invalid_number", "all")}
        assert await twilio(house, status | {"MessageStatus": "delivered"}, query) == 200
        assert await twilio(house, undelivered, query) == 200
        assert (await house.delivery() or ("",))[0] == "delivered"
        alarms = metrics.provider_alarms.labels("sms", "twilio")._value
        before = alarms.get()
        assert await twilio(house, undelivered | {"ErrorCode": "30007"}, query) == 200
        assert alarms.get() == before + 1, "a text that carriers filter is told by a report only"


async def twilio(house: House, form: dict[str, str], query: str = "", *, posted_to: str | None = None) -> int:
    """Post as Twilio does, for the public address of the gateway."""
    url = f"https://notify.example.com/v1/providers/twilio/callbacks{query}"
    text = url + "".join(name + form[name] for name in sorted(form))
    signature = base64.b64encode(hmac.new(TOKEN.encode(), text.encode(), hashlib.sha1).digest()).decode()
    headers = {"X-Twilio-Signature": signature, "Content-Type": "application/x-www-form-urlencoded"}
    return await house.post("twilio", urlencode(form).encode(), headers, query if posted_to is None else posted_to)


async def test_stop_ends_texts_of_all_tenants_of_the_account_and_start_begins_them_again(house: House) -> None:
    def text(body: str, id: str) -> dict[str, str]:
        return {"MessageSid": id, "From": NUMBER, "To": SENDER, "Body": body, "SmsStatus": "received"}

    assert await twilio(house, text("Please don't stop", "SM0")) == 200
    assert await house.suppressed(sms=NUMBER) == set()
    assert await twilio(house, text("Stop.", "SM1")) == 200
    for tenant in ("acme", "other"):
        assert await house.suppressed(tenant, sms=NUMBER) == {("opted_out", "all")}
    assert await twilio(house, text("start", "SM2")) == 200
    assert await twilio(house, text("Stop.", "SM1")) == 200  # posted again
    for tenant in ("acme", "other"):
        assert await house.suppressed(tenant, sms=NUMBER) == set()
    assert await twilio(house, text("STOP", "SM3") | {"From": "whatsapp:x"}) == 200
    published = house.amazon.published(
        TEXTS,
        {"originationNumber": NUMBER, "messageBody": "arrêt", "inboundMessageId": "i1", "destinationNumber": SENDER},
    )
    assert await house.post("sns", published) == 200
    assert await house.suppressed(sms=NUMBER) == {("opted_out", "all")}
    assert await house.suppressed("other", sms=NUMBER) == set()


@pytest.mark.parametrize(
    "words", [("STOP", "START"), ("START", "STOP"), ("STOP", "START", "STOP"), ("START", "STOP", "START")]
)
async def test_of_stop_and_start_the_one_holds_that_was_sent_last_in_whatever_order_they_are_posted(
    house: House, words: tuple[str, ...]
) -> None:
    for round, order in enumerate(itertools.permutations(range(len(words)))):
        number, now = f"+43664123456{round:02}", datetime.now(UTC)
        for place in (*order, order[0]):  # the first is posted again
            sent = now - timedelta(seconds=30 - 3 * place)
            text = {"originationNumber": number, "messageBody": words[place], "inboundMessageId": f"i{round}-{place}"}
            at = sent.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            assert await house.post("sns", house.amazon.published(TEXTS, text, Timestamp=at)) == 200
        expected = {("opted_out", "all")} if words[-1] == "STOP" else set()
        assert await house.suppressed(sms=number) == expected, order


async def test_what_twilio_posts_was_sent_when_it_arrives(house: House) -> None:
    now = datetime.now(UTC)
    early = (now - timedelta(seconds=20)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for number, (word, late) in enumerate((("STOP", "START"), ("START", "STOP"))):
        text = {"MessageSid": f"SM{number}", "From": NUMBER, "To": SENDER, "Body": word, "SmsStatus": "received"}
        assert await twilio(house, text) == 200
        posted = {"originationNumber": NUMBER, "messageBody": late, "inboundMessageId": f"late{number}"}
        assert await house.post("sns", house.amazon.published(TEXTS, posted, Timestamp=early)) == 200
        assert await house.suppressed(sms=NUMBER) == ({("opted_out", "all")} if word == "STOP" else set())


async def test_no_address_or_token_is_in_a_log(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    token = reference()
    await house.events(bounce(token), bounce(token, "e2", email="no address at all", reason="", status=""))
    await house.post("sendgrid", b"[]")
    await twilio(house, {"MessageSid": "SM1", "From": "short", "To": SENDER, "Body": "STOP"})
    said = capsys.readouterr()
    for secret in (ALICE, token, "no address at all", NUMBER, TOKEN):
        assert secret not in said.out + said.err
