"""What providers post, signed as they sign it: a topic of Amazon SNS with its certificate, SendGrid, Postmark."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

from engine.channels.exchange import open_http

REGION = "eu-central-1"
HOST = f"sns.{REGION}.amazonaws.com"
MEMBERS = ("Message", "MessageId", "SubscribeURL", "Subject", "Timestamp", "Token", "TopicArn", "Type")


class _Here(AbstractResolver):
    """Every name is this machine, at one port: Amazon's is reached here, and TLS still checks that it is Amazon's."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host="127.0.0.1", port=self._port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        return None


@dataclass
class Amazon:
    """SNS in one region: it serves its certificate, and signs what a topic publishes."""

    key: rsa.RSAPrivateKey
    certificate: bytes
    port: int = 0
    asked: list[str] = field(default_factory=list)
    """The paths that were asked for."""
    away: bool = False

    def http(self) -> aiohttp.ClientSession:
        """What reaches it by Amazon's names, and trusts nobody else."""
        tls = ssl.create_default_context(cadata=self.certificate.decode())
        return open_http(connections_max=4, resolver=_Here(self.port), tls=tls)

    def published(self, topic: str, message: Any, **members: str) -> bytes:
        """A message of a topic, as it is posted. `members` take the place of others before it is signed."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = message if isinstance(message, str) else json.dumps(message)
        said = {"Type": "Notification", "MessageId": f"m{time.monotonic_ns()}", "TopicArn": topic, "Message": text,
            "SignatureVersion": "2", "Timestamp": now,
            "SigningCertURL": f"https://{HOST}/SimpleNotificationService-0.pem", **members}  # fmt: skip
        signed = "".join(f"{name}\n{said[name]}\n" for name in MEMBERS if name in said).encode()
        signature = self.key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return json.dumps(said | {"Signature": base64.b64encode(signature).decode()}).encode()


@asynccontextmanager
async def amazon(folder: Path) -> AsyncIterator[Amazon]:
    """SNS on this machine, over TLS."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.KeyUsage(True, False, True, False, False, True, False, False, False), critical=True)
        .sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )  # fmt: skip
    (folder / "sns.pem").write_bytes(certificate)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "sns.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "sns.pem", folder / "sns.key")
    made = Amazon(key, certificate)

    async def answer(request: web.Request) -> web.Response:
        made.asked.append(request.path_qs)
        if made.away:
            return web.Response(status=503)
        return web.Response(body=certificate if request.path.endswith(".pem") else b"<ConfirmSubscriptionResponse/>")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        made.port = runner.addresses[0][1]
        yield made
    finally:
        await runner.cleanup()


@dataclass
class SendGridKey:
    """What SendGrid signs with. `public`: as it is shown."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def public(self) -> str:
        form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        return base64.b64encode(self.key.public_key().public_bytes(*form)).decode()

    def headers(self, body: bytes) -> dict[str, str]:
        """Of a request with this body."""
        timestamp = str(int(time.time()))
        signature = self.key.sign(timestamp.encode() + body, ec.ECDSA(hashes.SHA256()))
        return {
            "X-Twilio-Email-Event-Webhook-Signature": base64.b64encode(signature).decode(),
            "X-Twilio-Email-Event-Webhook-Timestamp": timestamp,
        }


def login(user: str, password: str) -> dict[str, str]:
    """The header of Postmark's requests."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
