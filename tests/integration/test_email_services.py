"""Mail through HTTP services in the shape of SES, SendGrid and Postmark: each answer of theirs has its consequence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest

from engine.channels.aws import Credentials
from engine.channels.channel import Context, Job
from engine.channels.email.channel import Sender, mail_for
from engine.channels.email.message import Mail
from engine.channels.email.services import Postmark, SendGrid, Service, Ses
from engine.channels.email.tables import POSTMARK, SENDGRID, SES
from engine.channels.exchange import open_http
from engine.settings import Secret
from ops.dev.child import free_port
from ops.dev.providers.faults import Answers, Fault, Hangs, Late, Resets, SlowBody
from ops.dev.providers.mailservices import MailService, PostmarkSimulator, SendGridSimulator, SesSimulator

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
ALICE = "alice@example.com"
CREDENTIALS = Credentials(key_id="AKIDEXAMPLE", secret="s3cret")
NAMES = ("ses", "sendgrid", "postmark")


def mail(data: dict[str, Any] | None = None) -> Mail:
    senders = {"default": Sender(address="news@example.org", name="Exämple", reply_to="help@example.org")}
    job = Job(id="order-17", tenant="t", user="alice", type="order.shipped", channel="email", first_at=NOW, category="orders",
              data=data or {"title": "Shippéd", "text": "On its way"})  # fmt: skip
    return mail_for(job, Context(now=NOW, unsubscribe_url="https://seamark.example/u/abc"), senders)


@asynccontextmanager
async def client(name: str, url: str, key: str = "key") -> AsyncIterator[Service]:
    http = open_http(connections_max=4)
    credentials = Credentials(key_id="AKIDEXAMPLE", secret="s3cret" if key == "key" else key)
    service: Service
    if name == "ses":
        service = Ses("ses", http, region="eu-central-1", credentials=credentials, url=url)
    elif name == "sendgrid":
        service = SendGrid("sendgrid", http, key=Secret(key), url=url)
    else:
        service = Postmark("postmark", http, key=Secret(key), url=url)
    try:
        yield service
    finally:
        await service.close()


def simulated(name: str) -> MailService:
    if name == "ses":
        return SesSimulator(CREDENTIALS)
    return SendGridSimulator("key") if name == "sendgrid" else PostmarkSimulator("key")


@pytest.mark.parametrize("name", NAMES)
async def test_a_mail_arrives_with_its_texts_and_headers(name: str) -> None:
    async with simulated(name) as server, client(name, server.url) as service:
        outcome = await service.send(mail(), ALICE, deadline_seconds=20)
        (accepted,) = server.log.messages()
    assert (outcome.kind, outcome.provider, outcome.provider_id) == ("ok", name, accepted.id)
    assert (accepted.to, accepted.shown["subject"]) == (ALICE, "Shippéd")
    assert "On its way" in accepted.shown["text"]
    assert "<strong>Shippéd</strong>" in accepted.shown["html"]
    assert accepted.key == f"<{mail().message_id}>"
    headers = accepted.shown["headers"]
    assert headers["List-Unsubscribe"] == "<https://seamark.example/u/abc>"
    assert headers["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert headers["List-Id"] == "<orders.t.example.org>"


class Row(NamedTuple):
    service: str
    answer: Answers
    kind: str
    scope: str = "message"
    code: str = ""
    wait: float | None = None
    elsewhere: bool = False


def config(service: str, status: int, code: str, text: str = "no") -> Row:
    return Row(service, Answers(status=status, code=code, text=text), "config", "key", elsewhere=True)


ROWS = [
    *(config("ses", 400, code) for code in ("AccountSuspendedException", "MailFromDomainNotVerifiedException",
        "SendingPausedException",
                                            "IncompleteSignature", "RequestExpired")),
    *(config("ses", 403, code) for code in ("AccessDeniedException", "ExpiredTokenException", "InvalidClientTokenId",
        "InvalidSignatureException",
                                            "MissingAuthenticationToken", "SignatureDoesNotMatch",
                                            "UnrecognizedClientException")),
    config("ses", 404, "NotFoundException", "Configuration set x does not exist"),
    config("ses", 400, "MessageRejected", "Email address is not verified. The following identities failed the check"),
    Row("ses", Answers(status=400, code="MessageRejected", text="Message contains a virus"), "permanent"),
    Row("ses", Answers(status=400, code="BadRequestException", text="Missing content"), "permanent"),
    Row("ses", Answers(status=400, code="BadRequestException", text="Illegal address"), "target_invalid"),
    Row("ses", Answers(status=400, code="LimitExceededException"), "throttled", "key", wait=3600, elsewhere=True),
    Row("ses", Answers(status=429, code="TooManyRequestsException:http://x/"), "throttled", "key", code="429/TooManyRequests",
        elsewhere=True),
    Row("ses", Answers(status=429, code="TooManyRequestsException", text="Daily quota"), "throttled", "key", wait=3600,
        elsewhere=True),
    Row("ses", Answers(status=400, code="ThrottlingException", headers={"Retry-After": "7"}), "throttled", "key", wait=7,
        elsewhere=True),
    Row("ses", Answers(status=500, code="InternalFailure"), "transient"),
    Row("ses", Answers(status=500, code="InternalServiceErrorException"), "transient"),
    Row("ses", Answers(status=503, code="ServiceUnavailable"), "transient", elsewhere=True),
    config("sendgrid", 401, "", "The provided authorization grant is invalid"),
    config("sendgrid", 403, "from", "The from address does not match a verified Sender Identity."),
    config("sendgrid", 400, "from.email", "The from email does not contain a valid address."),
    Row("sendgrid", Answers(status=401, text="Maximum credits exceeded"), "throttled", "key", wait=3600, elsewhere=True),
    Row("sendgrid", Answers(status=400, code="personalizations.0.to.0.email", text="Does not contain a valid address."),
        "target_invalid"),
    Row("sendgrid", Answers(status=400, code="personalizations.0.to"), "target_invalid"),
    Row("sendgrid", Answers(status=400, code="content.0.value", text="The content value must be a string"), "permanent"),
    Row("sendgrid", Answers(status=400, code="personalizations.0.subject"), "permanent"),
    Row("sendgrid", Answers(status=405), "permanent"),
    Row("sendgrid", Answers(status=406), "permanent"),
    Row("sendgrid", Answers(status=415), "permanent"),
    Row("sendgrid", Answers(status=413, text="Payload too large"), "permanent"),
    Row("sendgrid", Answers(status=429, text="Too many requests", headers={"Retry-After": "3"}), "throttled", "key", wait=3,
        elsewhere=True),
    *(config("postmark", status, code) for status, code in ((401, "10"), (422, "400"), (422, "401"), (422, "412"), (422, "413"),
        (422, "1235"))),
    Row("postmark", Answers(status=422, code="406", text="inactive recipient"), "target_invalid", code="422/406"),
    Row("postmark", Answers(status=422, code="300", text="Error parsing 'To': Illegal email address 'x'"), "target_invalid"),
    *(Row("postmark", Answers(status=422, code=code), "permanent") for code in ("300", "402", "403", "409", "411")),
    Row("postmark", Answers(status=422, code="405", text="no credits"), "throttled", "key", wait=3600, elsewhere=True),
    Row("postmark", Answers(status=429, code="429", headers={"Retry-After": "9"}), "throttled", "key", wait=9, elsewhere=True),
    Row("postmark", Answers(status=503, code="100", text="maintenance"), "transient", elsewhere=True),
    *(Row(name, Answers(status=408), "transient") for name in NAMES),
    *(Row(name, Answers(status=500), "transient") for name in NAMES),
    *(Row(name, Answers(status=503), "transient", elsewhere=True) for name in NAMES),
    *(Row(name, Answers(status=status), "ambiguous") for status in (502, 504) for name in NAMES),
    *(Row(name, Answers(status=413), "permanent") for name in NAMES),
]  # fmt: skip


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row.service}-{row.answer.status}-{row.answer.code or row.answer.text[:20]}"
)
async def test_each_answer_has_its_consequence(row: Row) -> None:
    async with simulated(row.service) as server, client(row.service, server.url) as service:
        server.faults.script([row.answer])
        outcome = await service.send(mail(), ALICE, deadline_seconds=20)
        assert (outcome.kind, outcome.scope, outcome.elsewhere) == (row.kind, row.scope, row.elsewhere)
        assert outcome.retry_after_seconds == row.wait
        assert row.code in ("", outcome.code)
        assert outcome.known
        assert (await service.send(mail(), ALICE, deadline_seconds=20)).kind == "ok"
        assert server.log.accepted == 1


def test_every_code_of_the_tables_has_a_row() -> None:
    """`Throttling` and the like come by several names; what counts is that no row of a table stands untried."""
    tried = {(row.service, row.answer.code.partition(":")[0].removesuffix("Exception")) for row in ROWS}
    ours = {"to", "from", "credits"}
    for name, table in (("ses", SES), ("sendgrid", SENDGRID), ("postmark", POSTMARK)):
        missing = {code for code in table.codes if (name, code.partition("/")[0]) not in tried} - ours
        assert missing == set(), name


@pytest.mark.parametrize("name", NAMES)
async def test_an_answer_that_nobody_knows_is_said_to_be_unknown(name: str) -> None:
    async with simulated(name) as server, client(name, server.url) as service:
        server.faults.script([Answers(status=418, code="99999" if name == "postmark" else "Teapot")])
        outcome = await service.send(mail(), ALICE, deadline_seconds=20)
    assert (outcome.kind, outcome.known) == ("permanent", False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", [Hangs(), Hangs(accepts=True), Resets(), Resets(accepts=True)], ids=str)
async def test_without_an_answer_it_is_ambiguous_and_a_repetition_has_the_same_message_id(
    name: str, fault: Fault
) -> None:
    async with simulated(name) as server, client(name, server.url) as service:
        server.faults.script([fault])
        outcome = await service.send(mail(), ALICE, deadline_seconds=0.7)
        assert (outcome.kind, outcome.elsewhere) == ("ambiguous", False)
        await service.send(mail(), ALICE, deadline_seconds=20)
        assert len({accepted.key for accepted in server.log.messages()}) == 1


@pytest.mark.parametrize("name", NAMES)
async def test_one_that_is_away_has_nothing(name: str) -> None:
    async with client(name, f"http://127.0.0.1:{free_port('127.0.0.1')}") as service:
        outcome = await service.send(mail(), ALICE, deadline_seconds=20)
    assert (outcome.kind, outcome.elsewhere) == ("transient", True)


@pytest.mark.parametrize("name", NAMES)
async def test_one_that_is_slow_is_waited_for(name: str) -> None:
    async with simulated(name) as server, client(name, server.url) as service:
        for fault in (Late(seconds=0.2), SlowBody(seconds=0.001)):
            server.faults.script([fault])
            assert (await service.send(mail(), ALICE, deadline_seconds=20)).kind == "ok"


@pytest.mark.parametrize("name", NAMES)
async def test_a_wrong_key_is_an_error_of_the_configuration(name: str) -> None:
    async with simulated(name) as server, client(name, server.url, key="wrong") as service:
        outcome = await service.send(mail(), ALICE, deadline_seconds=20)
        assert (outcome.kind, outcome.elsewhere, server.log.accepted) == ("config", True, 0)


@pytest.mark.parametrize("name", NAMES)
async def test_what_is_no_address_is_not_even_asked_for(name: str) -> None:
    async with simulated(name) as server, client(name, server.url) as service:
        outcome = await service.send(mail(), "a@b, c@d.example", deadline_seconds=20)
        assert (outcome.kind, server.log.accepted) == ("permanent", 0)


@pytest.mark.parametrize("name", NAMES)
async def test_hostile_texts_become_neither_headers_nor_recipients(name: str) -> None:
    hostile = "x\r\nBcc: evil@example.net =?utf-8?q?=0D=0ABcc:_evil@example.net?= \ud800"
    async with simulated(name) as server, client(name, server.url) as service:
        assert (await service.send(mail({"title": hostile, "text": hostile}), ALICE, deadline_seconds=20)).kind == "ok"
        (accepted,) = server.log.messages()
    assert "\n" not in accepted.shown["subject"]
    assert accepted.to == ALICE
    assert "Bcc" not in accepted.shown["headers"]


async def test_an_inactive_recipient_is_told_by_the_service() -> None:
    async with PostmarkSimulator("key") as server, client("postmark", server.url) as service:
        server.inactive.add(ALICE)
        outcome = await service.send(mail(), ALICE, deadline_seconds=20)
    assert outcome.kind == "target_invalid"
    assert ALICE not in repr(outcome)
