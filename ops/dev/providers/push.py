"""All push providers of a development stack: their keys, where they are, and what the file of providers says of them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from ops.dev.providers.apns import ApnsSimulator
from ops.dev.providers.certificates import server_tls, write_certificate
from ops.dev.providers.fcm import FcmSimulator
from ops.dev.providers.webpush import Browser, WebPushSimulator
from ops.dev.secretsfile import write_private

KEY_ID: Final = "SIMULATED1"
TEAM_ID: Final = "SIMULATED2"
PROJECT: Final = "seamark-dev"
ACCOUNT: Final = "sender@seamark-dev.iam.gserviceaccount.com"


class PushProviders:
    """Both environments of APNs, a project of FCM, and a push service of browsers. Use it as `async with`.

    Args:
        folder: where their keys and certificate are written; made anew each time.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        certificate, key = folder / "authority.pem", folder / "authority-key.pem"
        write_certificate(certificate, key)
        self._folder = folder
        self._apple, self._vapid = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self._google = rsa.generate_private_key(65537, 2048)
        keys = {KEY_ID: (self._apple.public_key(), TEAM_ID)}
        self.production = ApnsSimulator(keys, server_tls(certificate, key))
        self.sandbox = ApnsSimulator(keys, server_tls(certificate, key))
        self.fcm = FcmSimulator(PROJECT, ACCOUNT, self._google.public_key(), tls=server_tls(certificate, key))
        self.webpush = WebPushSimulator(tls=server_tls(certificate, key))
        self._running = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as starting:
            for one in (self.production, self.sandbox, self.fcm, self.webpush):
                await starting.enter_async_context(one)
            self._running = starting.pop_all()
        write_private(self._folder / "apns-key.pem", _pem(self._apple))
        write_private(self._folder / "vapid-key.pem", _pem(self._vapid))
        account = {"project_id": PROJECT, "client_email": ACCOUNT, "token_uri": f"{self.fcm.url}/token"}
        account |= {"private_key": _pem(self._google)}
        write_private(self._folder / "fcm-account.json", json.dumps(account))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    @property
    def table(self) -> dict[str, Any]:
        """The part `push` of the file of providers; its files are beside it in the folder."""
        trust = {"authority_file": "authority.pem"}
        apple = {"kind": "apns", "key_file": "apns-key.pem", "key_id": KEY_ID, "team_id": TEAM_ID}
        places = {"production": f"127.0.0.1:{self.production.port}", "sandbox": f"127.0.0.1:{self.sandbox.port}"}
        browsers = {"kind": "webpush", "key_file": "vapid-key.pem", "subject": "mailto:dev@example.com"}
        return {
            "apple": apple | places | trust,
            "google": {"kind": "fcm", "account_file": "fcm-account.json", "server": self.fcm.url} | trust,
            "browsers": browsers | {"hosts": [self.webpush.url.removeprefix("https://")]} | trust,
        }

    def subscribe(self) -> Browser:
        """A browser that has subscribed with the key of the stack."""
        point = self._vapid.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return self.webpush.subscribe(point)


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
