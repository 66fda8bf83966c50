"""All push providers of a development stack: their keys, where they are, and what the file of providers says of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self, cast

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ops.dev.providers.apns import ApnsSimulator
from ops.dev.providers.certificates import server_tls
from ops.dev.providers.fcm import FcmSimulator
from ops.dev.providers.webpush import Browser, WebPushSimulator
from ops.dev.secretsfile import kept_private, write_private

AUTHORITY: Final = "authority.pem"
"""The certificate of all simulators over TLS, with its key beside it: whoever sends to them is told to trust it."""

AUTHORITY_KEY: Final = "authority-key.pem"

KEY_ID: Final = "SIMULATED1"
TEAM_ID: Final = "SIMULATED2"
PROJECT: Final = "seamark-dev"
ACCOUNT: Final = "sender@seamark-dev.iam.gserviceaccount.com"

Port = Callable[[str], int]

_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def any_port(_simulator: str) -> int:
    """A free one."""
    return 0


class PushProviders:
    """Both environments of APNs, a project of FCM, and a push service of browsers. Use it as `async with`.

    Args:
        folder: where the certificate is, and where keys and browsers are kept, so that what was registered stays good.
        port: of a simulator by its name, as the table names them; 0: a free one.
    """

    def __init__(self, folder: Path, port: Port = any_port) -> None:
        certificate, key = folder / AUTHORITY, folder / AUTHORITY_KEY
        self._folder = folder
        self._apple, self._vapid = (_kept_point(folder / name) for name in ("apns-key.pem", "vapid-key.pem"))
        self._google = cast("rsa.RSAPrivateKey", _kept(folder / "google-key.pem", _new_rsa))
        keys = {KEY_ID: (self._apple.public_key(), TEAM_ID)}
        self.production = ApnsSimulator(keys, server_tls(certificate, key), port=port("apns"))
        self.sandbox = ApnsSimulator(keys, server_tls(certificate, key), port=port("apns sandbox"))
        self.fcm = FcmSimulator(
            PROJECT, ACCOUNT, self._google.public_key(), tls=server_tls(certificate, key), port=port("fcm")
        )
        self.webpush = WebPushSimulator(tls=server_tls(certificate, key), port=port("webpush"))
        self._running = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as starting:
            for one in (self.production, self.sandbox, self.fcm, self.webpush):
                await starting.enter_async_context(one)
            self._running = starting.pop_all()
        account = {"project_id": PROJECT, "client_email": ACCOUNT, "token_uri": f"{self.fcm.url}/token"}
        write_private(self._folder / "fcm-account.json", json.dumps(account | {"private_key": _pem(self._google)}))
        for kept in self._folder.glob("browser-*.pem"):
            self.subscribe(kept.stem.removeprefix("browser-"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    @property
    def table(self) -> dict[str, Any]:
        """The part `push` of the file of providers; its files are beside it in the folder."""
        trust = {"authority_file": AUTHORITY}
        apple = {"kind": "apns", "key_file": "apns-key.pem", "key_id": KEY_ID, "team_id": TEAM_ID}
        places = {"production": f"127.0.0.1:{self.production.port}", "sandbox": f"127.0.0.1:{self.sandbox.port}"}
        browsers = {"kind": "webpush", "key_file": "vapid-key.pem", "subject": "mailto:dev@example.com"}
        return {
            "apple": apple | places | trust,
            "google": {"kind": "fcm", "account_file": "fcm-account.json", "server": self.fcm.url} | trust,
            "browsers": browsers | {"hosts": [self.webpush.url.removeprefix("https://")]} | trust,
        }

    def subscribe(self, name: str) -> Browser:
        """The browser of this name (letters, digits and hyphens), which has subscribed with the key of the stack and is kept."""
        point = self._vapid.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        key = _kept_point(self._folder / f"browser-{name}.pem")
        # The other secret of a browser. It is made of the key, so that one file keeps both.
        secret = hashlib.sha256(key.private_numbers().private_value.to_bytes(32)).digest()[:16]
        return self.webpush.subscribe(point, name, key, secret)


def _kept(path: Path, make: Callable[[], _Key]) -> _Key:
    return cast("_Key", load_pem_private_key(kept_private(path, lambda: _pem(make())).encode(), None))


def _kept_point(path: Path) -> ec.EllipticCurvePrivateKey:
    return cast("ec.EllipticCurvePrivateKey", _kept(path, lambda: ec.generate_private_key(ec.SECP256R1())))


def _new_rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def _pem(key: _Key) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
