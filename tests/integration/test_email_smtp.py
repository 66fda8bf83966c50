"""Mail through real SMTP connections: what every stage's failure comes to, and that nothing is sent twice unknowingly."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import trustme

from engine.channels.channel import Context, Job, Outcome
from engine.channels.email.channel import Sender, mail_for
from engine.channels.email.message import Mail
from engine.channels.email.replies import parse, table
from engine.channels.email.smtp import CONNECTIONS_MAX, MAILS_PER_CONNECTION, MailRelay, SmtpProvider
from engine.settings import Secret
from ops.dev.child import free_port
from ops.dev.providers.faults import Answers, Hangs, Late, Resets
from ops.dev.providers.smtp import Scripted, SmtpSimulator

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
ALICE = "alice@example.com"
SENDERS = {"default": Sender(address="news@example.org", name="Example", envelope_from="bounces@example.org")}


def job(id: str = "order-17", **fields: Any) -> Job:
    fields = {"data": {"title": "Shipped", "text": "On its way"}, "category": "orders"} | fields
    return Job(id=id, tenant="t", user="alice", type="order.shipped", channel="email", first_at=NOW, **fields)


def mail(id: str = "order-17", **fields: Any) -> Mail:
    return mail_for(job(id, **fields), Context(now=NOW), SENDERS)


@asynccontextmanager
async def relay(port: int, trust: ssl.SSLContext | None = None, **settings: Any) -> AsyncIterator[SmtpProvider]:
    provider = SmtpProvider(
        MailRelay(**{"name": "relay", "host": "127.0.0.1", "port": port, "tls": "none"} | settings), trust
    )
    try:
        yield provider
    finally:
        await provider.close()


async def sent(provider: SmtpProvider, to: str = ALICE, *, id: str = "order-17", seconds: float = 20.0) -> Outcome:
    return await provider.send(mail(id), to, deadline_seconds=seconds)


@pytest.fixture
async def server() -> AsyncIterator[SmtpSimulator]:
    async with SmtpSimulator() as simulator:
        yield simulator


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def certificate(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


async def test_a_mail_arrives_as_it_was_written(server: SmtpSimulator) -> None:
    async with relay(server.port) as provider:
        outcome = await sent(provider)
    (accepted,) = server.log.messages()
    assert outcome == Outcome(kind="ok", provider="relay", code="250", provider_id=accepted.id)
    assert (accepted.to, accepted.raw["from"]) == (ALICE, "bounces@example.org")
    assert accepted.shown["subject"] == "Shipped"
    assert accepted.shown["from"] == "Example <news@example.org>"
    assert accepted.shown["text"].splitlines()[:3] == ["Shipped", "", "On its way"]
    assert "<strong>Shipped</strong>" in accepted.shown["html"]


async def test_lines_that_are_only_a_dot_or_begin_with_one_do_not_end_the_mail(server: SmtpSimulator) -> None:
    text = "begin\n\n.\n\n..\n\n.x\n\nend"
    async with relay(server.port) as provider:
        await provider.send(mail(data={"title": ".", "text": text}), ALICE, deadline_seconds=20)
    assert server.log.messages()[0].shown["text"].split() == [".", *text.split()]


@pytest.mark.parametrize(
    "row", [row for row in table().rows if row.stages[:1] != ("auth",)], ids=lambda row: row.example[:50]
)
async def test_each_row_of_the_table_holds_on_the_wire(server: SmtpSimulator, row) -> None:
    stage = row.stages[0] if row.stages else "rcpt"
    code, _, text = row.example.partition(" ")
    server.script([Scripted(stage, Answers(status=int(code), text=text))])
    async with relay(server.port) as provider:
        outcome = await sent(provider)
        assert (outcome.kind, outcome.scope, outcome.soft_bounce, outcome.suppress_seconds) == (
            row.kind, row.scope, row.soft_bounce, row.suppress_seconds)  # fmt: skip
        assert outcome.code == parse(int(code), text).name
        assert outcome.known
        assert server.log.messages() == []
        assert (await sent(provider)).kind == "ok", "and the next mail goes out as if nothing had been"
    assert server.log.accepted == 1


async def test_a_relay_that_takes_mails_is_set_up_rightly_whatever_the_server_of_one_recipient_says(
    server: SmtpSimulator,
) -> None:
    """Relays that ask the recipient's server first pass on its words, and must not be stopped for everybody by them."""
    denied = Scripted("rcpt", Answers(status=554, text="5.7.1 <nobody@example.com>: Relay access denied"))
    async with relay(server.port) as provider:
        server.script([denied])
        first = await sent(provider)
        assert (await sent(provider)).kind == "ok"
        server.script([denied])
        second = await sent(provider)
    assert [(one.kind, one.scope, one.elsewhere) for one in (first, second)] == [
        ("config", "key", True),
        ("config", "target", True),
    ]


@pytest.mark.parametrize("stage", ["connect", "mail", "rcpt", "data"])
@pytest.mark.parametrize("fault", [Resets(), Hangs()], ids=["reset", "hang"])
async def test_before_the_final_dot_nothing_is_ambiguous(server: SmtpSimulator, stage, fault) -> None:
    server.script([Scripted(stage, fault)])
    async with relay(server.port) as provider:
        outcome = await sent(provider, seconds=0.5)
        assert (outcome.kind, outcome.elsewhere) == ("transient", True)
        assert outcome.code.startswith(f"{stage}/")
        assert (await sent(provider)).kind == "ok"
    assert server.log.accepted == 1


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("fault", [Resets, Hangs])
async def test_behind_the_final_dot_silence_is_ambiguous_and_a_repetition_has_the_same_message_id(
    server: SmtpSimulator, fault, accepts: bool
) -> None:
    server.script([Scripted("end", fault(accepts=accepts))])
    async with relay(server.port) as provider:
        outcome = await sent(provider, seconds=0.5)
        assert (outcome.kind, outcome.elsewhere) == ("ambiguous", False)
        await sent(provider)
    assert server.log.accepted == 1 + accepts
    assert len({message.key for message in server.log.messages()}) == 1
    assert len({message.raw["message"] for message in server.log.messages()}) == 1, "it is the same to the last byte"


async def test_a_slow_answer_is_waited_for_as_long_as_there_is_time(server: SmtpSimulator) -> None:
    server.script([Scripted("end", Late(seconds=0.3))])
    async with relay(server.port) as provider:
        assert (await sent(provider)).kind == "ok"


async def test_a_connection_is_used_again_and_not_for_ever(server: SmtpSimulator) -> None:
    async with relay(server.port) as provider:
        for number in range(MAILS_PER_CONNECTION + 1):
            assert (await sent(provider, id=f"n{number}")).kind == "ok"
    assert server.connections == 2


async def test_a_connection_that_the_relay_has_closed_meanwhile_costs_nothing(server: SmtpSimulator) -> None:
    async with relay(server.port) as provider:
        await sent(provider)
        server.script([Scripted("mail", Resets())])
        outcome = await sent(provider, id="second")
    assert outcome.kind == "ok"
    assert server.log.accepted == 2


async def test_a_relay_is_never_asked_by_more_connections_than_it_allows(server: SmtpSimulator) -> None:
    async with relay(server.port) as provider:
        outcomes = await asyncio.gather(*(sent(provider, id=f"n{number}") for number in range(3 * CONNECTIONS_MAX)))
    assert {outcome.kind for outcome in outcomes} == {"ok"}
    assert server.connections <= CONNECTIONS_MAX


async def test_whoever_waits_in_vain_for_a_connection_is_not_the_relays_fault(server: SmtpSimulator) -> None:
    server.faults.stand(Hangs())
    async with relay(server.port) as provider:
        busy = [asyncio.create_task(sent(provider, id=f"n{n}", seconds=2.0)) for n in range(CONNECTIONS_MAX)]
        await asyncio.sleep(0)
        outcome = await sent(provider, seconds=0.2)
        await asyncio.gather(*busy)
    assert (outcome.kind, outcome.code, outcome.elsewhere, outcome.begun) == ("transient", "busy", False, False)


async def test_one_whose_address_cannot_be_is_not_even_asked_for(server: SmtpSimulator) -> None:
    async with relay(server.port) as provider:
        for address in (
            "",
            "nobody",
            "a b@example.com",
            "a@b\r\nRCPT TO:<c@d.example>",
            "<a@b.example>",
            "ü@example.com",
            "a@-",
        ):
            outcome = await sent(provider, address)
            assert (outcome.kind, outcome.code) == ("permanent", "address"), "and nobody is suppressed"
    assert server.connections == 0


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "implicit"])
async def test_a_login_goes_over_tls(authority, implicit: bool) -> None:
    tls = {"tls": "implicit" if implicit else "starttls", "trust": trust(authority)}
    async with SmtpSimulator(tls=certificate(authority), implicit=implicit, accounts={"u": "p"}) as server:
        async with relay(server.port, username="u", password=Secret("p"), **tls) as provider:
            assert (await sent(provider)).kind == "ok"
        async with relay(server.port, username="u", password=Secret("wrong"), **tls) as provider:
            outcome = await sent(provider)
            assert (outcome.kind, outcome.code, outcome.elsewhere) == ("config", "535/5.7.8", True)
        # Where a mechanism is refused the library tries the other one.
        for said in [[Answers(status=454, text="4.7.0 Temporary authentication failure")] * 2, [Hangs()], [Resets()]]:
            server.script([Scripted("auth", fault) for fault in said])
            async with relay(server.port, username="u", password=Secret("p"), **tls) as provider:
                outcome = await sent(provider, seconds=1.0)
                assert (outcome.kind, outcome.elsewhere) == ("transient", True)
        assert server.log.accepted == 1


@pytest.mark.parametrize("trouble", ["stranger", "name", "none"])
async def test_without_the_right_certificate_nothing_is_sent(authority, trouble: str) -> None:
    tls = {"stranger": certificate(trustme.CA()), "name": certificate(authority, "other.example"), "none": None}[
        trouble
    ]
    async with SmtpSimulator(tls=tls) as server, relay(server.port, trust(authority), tls="starttls") as provider:
        outcome = await sent(provider)
        assert (outcome.kind, outcome.elsewhere) == ("transient", True)
        assert outcome.code == ("connect/unsupported" if trouble == "none" else "connect/tls")
        assert server.log.accepted == 0


def test_mail_leaves_the_machine_encrypted_or_not_at_all() -> None:
    with pytest.raises(ValueError, match="`tls`"):
        MailRelay(name="r", host="smtp.example.com", port=25, tls="none")


async def test_a_relay_that_is_away_has_taken_nothing() -> None:
    async with relay(free_port("127.0.0.1")) as provider:
        outcome = await sent(provider)
    assert (outcome.kind, outcome.elsewhere) == ("transient", True)


@pytest.mark.parametrize(("scripted", "kind"), [
    (Scripted("rcpt", Answers(status=550, text="5.1.1 User unknown")), "target_invalid"),
    (Scripted("rcpt", Answers(status=450, text="4.2.0 Greylisted")), "transient"),
    (Scripted("end", Answers(status=554, text="5.6.0 Malformed")), "permanent"),
    (Scripted("end", Resets(accepts=True)), "ambiguous"),
    (Scripted("end", Resets()), "ambiguous"),
])  # fmt: skip
async def test_what_is_about_the_mail_or_may_have_been_sent_is_not_tried_elsewhere(server, scripted, kind) -> None:
    server.script([scripted])
    async with relay(server.port) as provider:
        outcome = await sent(provider)
    assert (outcome.kind, outcome.elsewhere) == (kind, False)


@pytest.mark.parametrize("scripted", [
    Scripted("connect", Answers(status=554, text="5.7.1 Client host blocked")),
    Scripted("rcpt", Answers(status=554, text="5.7.1 <alice@example.com>: MailRelay access denied")),
    Scripted("mail", Answers(status=421, text="4.3.2 Shutting down")),
    Scripted("end", Answers(status=454, text="Throttling failure: Maximum sending rate exceeded.")),
], ids=str)  # fmt: skip
async def test_what_is_a_relays_own_trouble_is_tried_elsewhere(server: SmtpSimulator, scripted) -> None:
    server.script([scripted])
    async with relay(server.port) as provider:
        assert (await sent(provider)).elsewhere
    assert server.log.accepted == 0
