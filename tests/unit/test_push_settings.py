"""The push part of the providers' file: what is read, and what is said of what cannot be."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from engine.channels.push.settings import push_senders, push_settings
from engine.errors import InvalidSetting
from tests.support.documents import blocks
from tests.support.pushing import account_file, apple_key, authority

APPLE = {"kind": "apns", "key_file": "key.p8", "key_id": "ABC1234567", "team_id": "DEF1234567"}
GOOGLE = {"kind": "fcm", "account_file": "account.json"}
BROWSERS = {"kind": "webpush", "key_file": "key.p8", "subject": "mailto:ops@example.com"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pem = apple_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.p8").write_bytes(pem)
    (tmp_path / "account.json").write_text(account_file("https://oauth.example/token"))
    (tmp_path / "authority.pem").write_bytes(authority().cert_pem.bytes())
    (tmp_path / "empty").write_text("")
    (tmp_path / "picture").write_bytes(b"\xff\xfe")
    return tmp_path


async def test_each_kind_becomes_a_sender_and_those_for_named_apps_are_asked_first(folder: Path) -> None:
    table = {
        "apple": APPLE,
        "google": {**GOOGLE, "authority_file": "authority.pem"},
        "browsers": BROWSERS,
        "shop": {**APPLE, "apps": ["com.example.shop"], "production": "127.0.0.1:2197", "sandbox": "[::1]:2197"},
    }
    senders = push_senders(push_settings(table), folder)
    assert [(one.name, one.platform) for one in senders] == [
        ("shop", "apns"), ("apple", "apns"), ("google", "fcm"), ("browsers", "webpush"),
    ]  # fmt: skip
    for one in senders:
        await one.close()


async def test_the_file_that_the_documentation_shows_is_one(folder: Path) -> None:
    (shown,) = (block.text for block in blocks() if block.document == "docs/push.md")
    (folder / "service-account.json").write_text((folder / "account.json").read_text())
    for name in ("AuthKey_ABC1234567.p8", "vapid.pem"):
        (folder / name).write_text((folder / "key.p8").read_text())
    senders = push_senders(push_settings(tomllib.loads(shown)["push"]), folder)
    assert {one.platform for one in senders} == {"apns", "fcm", "webpush"}
    for one in senders:
        await one.close()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "apns"}, "push.x: .*key_file"),
        ({"kind": "pigeon"}, "push.x: .*pigeon"),
        ({**APPLE, "key_id": "short"}, r"push.x: .*\$\.key_id"),
        ({**APPLE, "keyfile": "a"}, "push.x: .*keyfile"),
        ({**APPLE, "production": "not a host"}, "push.x.production"),
        ({**APPLE, "sandbox": "host:99999"}, "push.x.sandbox"),
        ({**APPLE, "key_file": "missing"}, "push.x.key_file: .*missing cannot be read"),
        ({**APPLE, "key_file": "picture"}, "push.x.key_file: .*not text"),
        ({**APPLE, "key_file": "empty"}, "push.x.key_file is no private key"),
        ({**APPLE, "authority_file": "account.json"}, "push.x.authority_file"),
        ({**GOOGLE, "account_file": "key.p8"}, "push.x.account_file"),
        ({**GOOGLE, "server": "fcm.googleapis.com"}, r"push.x: .*\$\.server"),
        ({**BROWSERS, "subject": "ops"}, r"push.x: .*\$\.subject"),
        ("apns", "push.x: "),
    ],
)
def test_what_cannot_be_used_is_named_with_its_entry_and_field(folder: Path, entry: Any, said: str) -> None:
    with pytest.raises(InvalidSetting, match=said) as caught:
        push_senders(push_settings({"x": entry}), folder)
    assert "PRIVATE" not in str(caught.value)
