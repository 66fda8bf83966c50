"""The part `email` of the providers' file: what is read, and what is said of what cannot be."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import trustme

from engine.channels.email.settings import email_channels, email_settings
from engine.errors import InvalidSetting
from tests.support.documents import blocks

SMTP = {"kind": "smtp", "host": "smtp.example.com", "username": "u", "password_file": "secret"}
SENDERS = {"default": {"address": "news@example.com", "layout_files": {"default": "layout.html"}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("s3cret\n")
    (tmp_path / "layout.html").write_text("<html><body>{{ content }}</body></html>")
    (tmp_path / "authority.pem").write_bytes(trustme.CA().cert_pem.bytes())
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("one\ntwo\n")
    (tmp_path / "picture").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.html").write_text("{{ content }}{% set a = 1 %}")
    (tmp_path / "without.html").write_text("<html></html>")
    return tmp_path


async def test_each_kind_becomes_a_provider_in_the_order_of_the_file(folder: Path) -> None:
    providers = {
        "own": {**SMTP, "authority_file": "authority.pem"},
        "amazon": {"kind": "ses", "region": "eu-central-1", "key_id": "AKID", "secret_file": "secret"},
        "grid": {"kind": "sendgrid", "key_file": "secret"},
        "post": {"kind": "postmark", "key_file": "secret", "authority_file": "authority.pem"},
        "here": {"kind": "smtp", "host": "localhost", "tls": "none"},
    }
    channels = email_channels(email_settings({"providers": providers, "senders": SENDERS}), folder)
    assert list(channels) == list(providers)
    found: Any = {name: channel._provider for name, channel in channels.items()}
    assert (found["own"]._relay.port, found["here"]._relay.port) == (587, 25)
    assert "s3cret" not in "".join(repr(vars(provider)) for provider in found.values())
    for channel in channels.values():
        await channel.close()


async def test_the_file_that_the_documentation_shows_is_one(folder: Path) -> None:
    (shown,) = (
        block.text for block in blocks() if block.document == "docs/email.md" and "[email.providers" in block.text
    )
    for name in ("smtp.password", "postmark.token"):
        (folder / name).write_text("s3cret")
    (folder / "layout.de.html").write_text("{{ content }}")
    settings = email_settings(tomllib.loads(shown)["email"])
    assert settings.domains["gmail.com"].at_once == 10
    channels = email_channels(settings, folder)
    assert list(channels) == ["own", "spare"]
    for channel in channels.values():
        await channel.close()


@pytest.mark.parametrize(("change", "said"), [
    ({"providers": {}}, "email.providers: there are none"),
    ({"senders": {}}, "email.senders: there are none"),
    ({"more": 1}, "more"),
    ({"providers": {"a": {"kind": "pigeon"}}}, "pigeon"),
    ({"providers": {"a": {"kind": "smtp"}}}, "host"),
    ({"providers": {"a": {**SMTP, "tls": "none"}}}, "email.providers.a: `tls`"),
    ({"providers": {"a": {**SMTP, "password_file": ""}}}, "email.providers.a: `username` and `password`"),
    ({"providers": {"a": {**SMTP, "password_file": "nowhere"}}},
        "email.providers.a.password_file: .*nowhere cannot be read: No such file"),
    ({"providers": {"a": {**SMTP, "password_file": "picture"}}}, "cannot be read: it is not text"),
    ({"providers": {"a": {**SMTP, "password_file": "empty"}}}, "email.providers.a.password_file: .*must hold the secret"),
    ({"providers": {"a": {**SMTP, "password_file": "two"}}}, "email.providers.a.password_file: .*must hold the secret"),
    ({"providers": {"a": {**SMTP, "authority_file": "secret"}}}, "email.providers.a.authority_file holds no certificates"),
    ({"providers": {"a": {**SMTP, "port": 70000}}}, "port"), ({"providers": {"a": {**SMTP, "hello": "a b"}}}, "hello"),
    ({"providers": {"a": {"kind": "ses", "region": "EU!", "key_id": "x", "secret_file": "secret"}}}, "region"),
    ({"providers": {"a": {"kind": "postmark", "key_file": "secret", "url": "ftp://x"}}}, "url"),
    ({"domains": {"Gmail.com": {}}}, "domains"),
    ({"domains": {"gmail.com": {"per_minute": 1}}}, "per_minute"),
    ({"senders": {"t": {"address": "nobody"}}}, "email.senders.t: `address` is no e-mail address"),
    ({"senders": {"t": {"address": "a@b.example", "layout_files": {"de": "broken.html"}}}},
        "email.senders.t.layout_files.de: line 1: templates have no assign"),
    ({"senders": {"t": {"address": "a@b.example", "layout_files": {"de": "without.html"}}}},
        "email.senders.t.layout_files.de shows no content"),
    ({"senders": {"t": {"address": "a@b.example", "layout_files": {"german": "layout.html"}}}}, "layout_files"),
])  # fmt: skip
async def test_what_cannot_be_is_named_with_the_remedy_and_without_the_secret(
    folder: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidSetting, match=said) as refused:
        email_channels(email_settings({"providers": {"a": SMTP}, "senders": SENDERS} | change), folder)
    assert "s3cret" not in str(refused.value)
