"""Push providers on this machine, and senders that know them."""

import base64
import functools
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import trustme
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from engine.channels.channel import Outcome
from engine.channels.push.apns import ApnsSender
from engine.channels.push.apns_pool import ApnsPool
from engine.channels.push.fcm import FcmSender
from engine.channels.push.message import PushMessage, PushTarget
from engine.channels.push.oauth import service_account
from engine.channels.push.signing import ApnsToken, VapidTokens
from engine.channels.push.webpush import WebPushSender
from engine.directory.push_tokens import WebPushKeys
from ops.dev.providers.apns import ApnsSimulator
from ops.dev.providers.fcm import FcmSimulator
from ops.dev.providers.webpush import Browser, WebPushSimulator

KEY_ID, TEAM_ID = "KEY4567890", "TEAM567890"
APP = "com.example.app"
PROJECT, ACCOUNT = "demo-project", "sender@demo-project.iam.gserviceaccount.com"
DEVICE = "ab" * 32
DEADLINE_SECONDS = 20.0


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


def client_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


@functools.cache
def apple_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def google_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def a_message(**members: Any) -> PushMessage:
    ttl = members.pop("ttl_seconds", 3600)
    given = {"id": "order-17", "type": "order.shipped", "title": "Shipped", "body": "It is on its way", **members}
    return PushMessage(ttl_seconds=ttl, expires_at=int(time.time()) + ttl, **given)


def apple_device(token: str = DEVICE, **members: Any) -> PushTarget:
    return PushTarget(id="phone", platform="apns", token=token, app=APP, **members)


def android_device(token: str = "a" * 40) -> PushTarget:
    return PushTarget(id="phone", platform="fcm", token=token, app=APP)


def browser_target(browser: Browser) -> PushTarget:
    keys = WebPushKeys(browser.p256dh, browser.auth)
    return PushTarget(id="tab", platform="webpush", token=browser.endpoint, app="shop", keys=keys)


class Apple(NamedTuple):
    """A sender with both environments of APNs."""

    sender: ApnsSender
    production: ApnsSimulator
    sandbox: ApnsSimulator

    async def send(
        self, *, to: str = DEVICE, key: str = "a", seconds: float = DEADLINE_SECONDS, **members: Any
    ) -> Outcome:
        return await self.sender.send(
            a_message(**members.pop("message", {})), apple_device(to, **members), key=key, deadline_seconds=seconds
        )


@asynccontextmanager
async def apple(now: Callable[[], float] = time.time, theirs: Callable[[], float] = time.time) -> AsyncIterator[Apple]:
    """`now`, `theirs`: our clock and Apple's."""
    keys = {KEY_ID: (apple_key().public_key(), TEAM_ID)}
    async with (
        ApnsSimulator(keys, server_tls(), now=theirs) as production,
        ApnsSimulator(keys, server_tls(), now=theirs) as sandbox,
    ):
        pools = {
            "production": ApnsPool("127.0.0.1", production.port, client_tls()),
            "sandbox": ApnsPool("127.0.0.1", sandbox.port, client_tls()),
        }
        sender = ApnsSender("apple", ApnsToken(apple_key(), KEY_ID, TEAM_ID), pools=pools, now=now)
        try:
            yield Apple(sender, production, sandbox)
        finally:
            await sender.close()


class Google(NamedTuple):
    """A sender with its project of FCM. The account's access token is had already."""

    sender: FcmSender
    fcm: FcmSimulator

    async def send(self, *, to: str = "a" * 40, seconds: float = DEADLINE_SECONDS, **members: Any) -> Outcome:
        return await self.sender.send(a_message(**members), android_device(to), key="a", deadline_seconds=seconds)


def account_file(token_uri: str) -> str:
    pem = google_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    fields = {"type": "service_account", "project_id": PROJECT, "client_email": ACCOUNT, "private_key": pem}
    return json.dumps(fields | {"private_key_id": "1", "token_uri": token_uri})


@asynccontextmanager
async def google(*, signed_in: bool = True, project: str = PROJECT) -> AsyncIterator[Google]:
    async with FcmSimulator(project, ACCOUNT, google_key().public_key(), tls=server_tls()) as fcm:
        account = service_account("test", account_file(f"{fcm.url}/token"))
        sender = FcmSender("google", account, server=fcm.url, tls=client_tls())
        try:
            if signed_in:
                await sender._tokens.get()
            yield Google(sender, fcm)
        finally:
            await sender.close()


def _point(tokens: VapidTokens) -> bytes:
    return base64.urlsafe_b64decode(tokens.public_key + "=")


class Browsers(NamedTuple):
    """A sender with a push service and a browser."""

    sender: WebPushSender
    service: WebPushSimulator
    tokens: VapidTokens
    browser: Browser

    def subscribe(self) -> Browser:
        return self.service.subscribe(_point(self.tokens))

    async def send(self, to: Browser | None = None, *, seconds: float = DEADLINE_SECONDS, **members: Any) -> Outcome:
        target = browser_target(to or self.browser)
        return await self.sender.send(a_message(**members), target, key="a", deadline_seconds=seconds)


@asynccontextmanager
async def browsers() -> AsyncIterator[Browsers]:
    tokens = VapidTokens(ec.generate_private_key(ec.SECP256R1()), "mailto:ops@example.com")
    async with WebPushSimulator(tls=server_tls()) as service:
        sender = WebPushSender("vapid", tokens, hosts=(f"127.0.0.1:{service.port}",), tls=client_tls())
        try:
            yield Browsers(sender, service, tokens, service.subscribe(_point(tokens)))
        finally:
            await sender.close()
