"""The simulated providers of a development stack, all in this process, and the file by which its worker finds them."""

from __future__ import annotations

import base64
import contextlib
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from engine.directory.webhooks import make_secret
from ops.config_files import toml_of
from ops.dev.outbox.faults import FaultName, fault_of
from ops.dev.outbox.messages import Message, Outbox
from ops.dev.providers.acceptlog import AcceptLog
from ops.dev.providers.certificates import server_tls, write_certificate
from ops.dev.providers.faults import Faults
from ops.dev.providers.mailservices import SendGridSimulator
from ops.dev.providers.push import AUTHORITY, AUTHORITY_KEY, Port, PushProviders, any_port
from ops.dev.providers.sms import SnsSimulator, TwilioSimulator
from ops.dev.providers.smtp import SmtpSimulator
from ops.dev.providers.webhook import WebhookReceiver
from ops.dev.secretsfile import kept_private, write_private

FILE: Final = "providers.toml"

RECEIVER: Final = "receiver.example.com"
"""What the receiver of webhooks is called: endpoints must have a public name, and example.com is nobody's (RFC 2606). Only the
worker of the stack is told where it leads."""

SENDER: Final = "notifications@example.com"
NUMBER: Final = "+447700900100"
"""Kept free for dramas by Ofcom: no phone has it."""

TEXTS: Final = "Twilio"
MAILS: Final = "SendGrid"
_ENTRIES: Final = {TEXTS: "texts", MAILS: "mails"}
"""What providers that report later are called: on the page, and in the providers' file."""

MAIL_USER: Final = "seamark"
ACCOUNT: Final = "AC" + "0" * 32
KEY_ID: Final = "AKIASIMULATED"
REGION: Final = "eu-central-1"


_SECRETS: Final = {
    "sendgrid-key": lambda: secrets.token_urlsafe(24),
    "sendgrid-events-key": lambda: _private_text(ec.generate_private_key(ec.SECP256R1())),
    "smtp-password": lambda: secrets.token_urlsafe(24),
    "twilio-secret": lambda: secrets.token_urlsafe(24),
    "sns-secret": lambda: secrets.token_urlsafe(24),
    "webhook-secret": make_secret,
}
"""Files that are made once, and how. The providers' file names all but two: of the key of SendGrid's events it names the public
part, and the last is in the endpoint's row."""

EVENTS_PUBLIC: Final = "sendgrid-events-public"


Word = Literal["delivered", "undelivered", "invalid", "stop", "start", "bounced", "complained"]
"""What can be told. Of a text: that the phone has it, or is off, or that nobody has the number; that its owner answers. Of a
mail: that it was delivered, that nobody has the address, that its reader calls it spam."""

_REPORTS: Final[Mapping[Word, tuple[str, str]]] = {
    "delivered": ("delivered", ""),
    "undelivered": ("undelivered", "30003"),
    "invalid": ("undelivered", "30005"),
}
"""The status and the code by which Twilio reports it."""

_NOBODY: Final = "550 5.1.1 The email account that you tried to reach does not exist"
_EVENTS: Final[Mapping[Word, Mapping[str, str]]] = {
    "delivered": {"event": "delivered", "response": "250 OK"},
    "bounced": {"event": "bounce", "type": "bounce", "status": "5.1.1", "reason": _NOBODY},
    "complained": {"event": "spamreport"},
}
"""The event by which SendGrid reports it."""


class Simulator(Protocol):
    """What all simulators have."""

    log: AcceptLog
    faults: Faults


class Simulated(NamedTuple):
    """A simulator. `kind`: as `fault_of` knows it. `title`: as people call it."""

    kind: str
    channel: str
    title: str
    simulator: Simulator


class Others(NamedTuple):
    """The simulators beside those of push."""

    sendgrid: SendGridSimulator
    smtp: SmtpSimulator
    twilio: TwilioSimulator
    sns: SnsSimulator
    webhook: WebhookReceiver


class Providers:
    """Running simulators; made by `running`.

    Attributes:
        file: what the worker is given as SEAMARK_PROVIDERS.
        push: of them, those of push.
        webhook_secret: by which the receiver checks signatures.
        standing: the fault that each channel has now.
    """

    def __init__(self, outbox: Outbox, file: Path, push: PushProviders, others: Others, secret: str) -> None:
        self.file, self.push, self.webhook_secret = file, push, secret
        self.standing: dict[str, FaultName] = {}
        self._outbox, self._texts, self._mails = outbox, others.twilio, others.sendgrid
        self._all = (
            Simulated("apns", "push", "APNs", push.production),
            Simulated("apns", "push", "APNs sandbox", push.sandbox),
            Simulated("fcm", "push", "FCM", push.fcm),
            Simulated("webpush", "push", "Web Push", push.webpush),
            Simulated("sendgrid", "email", MAILS, others.sendgrid),
            Simulated("smtp", "email", "SMTP", others.smtp),
            Simulated("twilio", "sms", TEXTS, others.twilio),
            Simulated("sns", "sms", "Amazon SNS", others.sns),
            Simulated("webhook", "webhook", "Receiver", others.webhook),
        )
        for one in self._all:
            one.simulator.log = outbox.log_of(one.title)
        push.fcm.spared = frozenset({"/token"})  # what the buttons say is about messages, and not about signing in
        others.webhook.unverified = outbox.refused("Receiver")

    def switch(self, channel: str, fault: FaultName | None) -> None:
        """From now on all providers of the channel have this fault, or none."""
        for one in self._all:
            if one.channel == channel:
                one.simulator.faults.clear()
                if fault is not None:
                    one.simulator.faults.stand(fault_of(one.kind, fault))
        self.standing.pop(channel, None)
        if fault is not None:
            self.standing[channel] = fault
        self._outbox.touch()

    async def tell(self, message: Message, word: Word) -> int:
        """Have a provider post to the gateway what has become of a message, or what its receiver answers; the answer's status.

        Raises:
            LookupError: the provider has not taken this message, or cannot say that of it.
            OSError, aiohttp.ClientError: the gateway does not answer.
        """
        if message.provider == MAILS:
            return await self._mails.report(message.id, **_EVENTS[word])
        if message.provider != TEXTS or word in ("bounced", "complained"):
            raise LookupError(message.provider)
        if word in _REPORTS:
            return await self._texts.report(message.id, *_REPORTS[word])
        return await self._texts.answer(message.to, NUMBER, word.upper())


@contextlib.asynccontextmanager
async def running(
    folder: Path, outbox: Outbox, port: Port = any_port, *, gateway_url: str = "", tenant: str = "default"
) -> AsyncIterator[Providers]:
    """Run all simulators for as long as the block does, and write the file of providers.

    Args:
        folder: keeps their keys and the file; only its owner can read what is secret there.
        port: of a simulator by its name; 0: a free one.
        gateway_url: of the gateway that reports and answers are posted to; "": they are posted nowhere.
        tenant: whose texts an answer ends.
    """
    _prepare(folder)
    sendgrid, events, password, twilio, sns, webhook = (
        kept_private(folder / name, make) for name, make in _SECRETS.items()
    )
    events_key = load_pem_private_key(events.encode(), None)
    assert isinstance(events_key, ec.EllipticCurvePrivateKey), "we have made it"
    write_private(folder / EVENTS_PUBLIC, _public_text(events_key))

    def tls() -> ssl.SSLContext:
        return server_tls(folder / AUTHORITY, folder / AUTHORITY_KEY)

    callback_urls = {
        name: f"{gateway_url}/v1/providers/{entry}/callbacks" if gateway_url else "" for name, entry in _ENTRIES.items()
    }
    others = Others(
        sendgrid=SendGridSimulator(
            sendgrid,
            SENDER.partition("@")[2],
            events_url=callback_urls[MAILS],
            events_key=events_key,
            port=port("sendgrid"),
        ),
        smtp=SmtpSimulator(tls=tls(), accounts={MAIL_USER: password}, port=port("smtp")),
        twilio=TwilioSimulator(ACCOUNT, twilio, inbound_url=callback_urls[TEXTS], port=port("twilio")),
        sns=SnsSimulator(KEY_ID, sns, REGION, port=port("sns")),
        webhook=WebhookReceiver(webhook, tls=tls(), port=port("webhook")),
    )
    async with contextlib.AsyncExitStack() as stack:
        push = await stack.enter_async_context(PushProviders(folder, port))
        for one in others:
            await stack.enter_async_context(one)
        file = folder / FILE
        write_private(file, toml_of(_document(push, others, callback_urls[TEXTS], tenant)))
        yield Providers(outbox, file, push, others, webhook)


def _prepare(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_certificate(folder / AUTHORITY, folder / AUTHORITY_KEY, [RECEIVER])


def _private_text(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _public_text(key: ec.EllipticCurvePrivateKey) -> str:
    """As SendGrid shows its verification key."""
    shown = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(shown).decode()


def _document(push: PushProviders, others: Others, callback_url: str, tenant: str) -> dict[str, Any]:
    """The file of providers; the files that it names are beside it."""
    reports: dict[str, Any] = {"status_url": callback_url} if callback_url else {}
    callbacks: dict[str, Any] = {
        _ENTRIES[TEXTS]: {"kind": "twilio", "url": callback_url, "token_files": ["twilio-secret"], "tenants": [tenant]},
        _ENTRIES[MAILS]: {"kind": "sendgrid", "key_files": [EVENTS_PUBLIC]},
    }
    mails = {"kind": "sendgrid", "key_file": "sendgrid-key", "url": others.sendgrid.url}
    relay = {
        "kind": "smtp",
        "host": "127.0.0.1",
        "port": others.smtp.port,
        "username": MAIL_USER,
        "password_file": "smtp-password",
        "authority_file": AUTHORITY,
    }
    texts = {
        "kind": "twilio",
        "account": ACCOUNT,
        "secret_file": "twilio-secret",
        "sender": NUMBER,
        "url": others.twilio.url,
        **reports,
    }
    spare = {
        "kind": "sns",
        "region": REGION,
        "key_id": KEY_ID,
        "secret_file": "sns-secret",
        "url": others.sns.url,
    }
    return {
        "push": push.table,
        "email": {
            "providers": {_ENTRIES[MAILS]: mails, "relay": relay},
            "senders": {"default": {"address": SENDER, "name": "Seamark"}},
        },
        "sms": {"providers": {_ENTRIES[TEXTS]: texts, "spare": spare}},
        "webhook": {"authority_file": AUTHORITY, "hosts": {RECEIVER: f"127.0.0.1:{others.webhook.port}"}},
        **({"callbacks": callbacks} if callback_url else {}),
    }
