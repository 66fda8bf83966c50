"""Whose reports are taken stands in one table of the providers' file; a gateway needs nothing else of it."""

import re
from pathlib import Path

import pytest

from engine.errors import InvalidSetting
from gateway.providers.settings import read_sources
from gateway.providers.sources import Source
from tests.support.documents import blocks

BLOCKS = [block.text for block in blocks() if block.text.startswith("[callbacks.")]
SECRET = "s3cret-that-nobody-repeats"


def read(folder: Path, text: str) -> dict[str, Source]:
    (folder / "providers.toml").write_text(text)
    return read_sources(str(folder / "providers.toml"), None)  # type: ignore[arg-type]


def test_what_the_documentation_shows_is_read(tmp_path: Path) -> None:
    assert len(BLOCKS) == 2
    text = "\n".join(BLOCKS)
    for name in re.findall(r'"([a-z]+\.[a-z]+)"', text):
        (tmp_path / name).write_text(SECRET)
    found = read(tmp_path, text)
    assert {name: source.channel for name, source in found.items()} == {
        "ses": "email", "sendgrid": "email", "postmark": "email", "twilio": "sms", "sns": "sms"}  # fmt: skip


def test_nobody_posts_where_no_file_or_no_table_says_so(tmp_path: Path) -> None:
    assert read_sources(None, None) == {}  # type: ignore[arg-type]
    assert read(tmp_path, '[email.providers.own]\nkind = "smtp"\npassword_file = "/there/is/none"\n') == {}


TWILIO = 'kind = "twilio"\nurl = "https://a.example/x"\ntoken_files = ["t"]\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[callbacks", "is not TOML"),
        ("callbacks = 1", "callbacks"),
        ('[callbacks.a]\nkind = "carrier pigeon"', "kind"),
        ('[callbacks."a/b"]\nkind = "ses"\ntopic = "arn:aws:sns:eu-central-1:123456789012:t"', "callbacks"),
        ('[callbacks.a]\nkind = "ses"\ntopic = "https://evil.example"', "topic"),
        ('[callbacks.a]\nkind = "sendgrid"\nkey_files = []', "key_files"),
        ('[callbacks.a]\nkind = "sendgrid"\nkey_files = ["none"]', "callbacks.a.key_files"),
        ('[callbacks.a]\nkind = "postmark"\npassword_files = ["empty"]', "callbacks.a.password_files"),
        ('[callbacks.a]\nkind = "postmark"\npassword_files = ["lines"]', "callbacks.a.password_files"),
        (f"[callbacks.a]\n{TWILIO}", "tenants"),
        (f'[callbacks.a]\n{TWILIO}tenants = ["acme"]\nsecret = "{SECRET}"', "secret"),
        ("[callbacks.a]\n" + TWILIO.replace("/x", "/x?a=b") + 'tenants = ["acme"]', "url"),
    ],
    ids=range(12),
)
def test_what_is_wrong_is_said_by_its_name_and_no_secret_is_repeated(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "t").write_text(SECRET)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "lines").write_text(f"{SECRET}\n{SECRET}")
    with pytest.raises(InvalidSetting, match=re.escape(named)) as raised:
        read(tmp_path, text)
    assert SECRET not in str(raised.value)
