"""Whose reports are taken stands in one table of the providers' file; a gateway needs nothing else of it."""

import re
from pathlib import Path

import pytest

from engine import metrics
from engine.channels import files
from engine.errors import InvalidSetting
from gateway.providers.settings import Sources
from tests.support.documents import blocks
from tests.support.logs import eventually

BLOCKS = [block.text for block in blocks() if block.text.startswith("[callbacks.")]
SECRET = "s3cret-that-nobody-repeats"


def read(folder: Path, text: str) -> Sources:
    (folder / "providers.toml").write_text(text)
    return Sources(str(folder / "providers.toml"), None)  # type: ignore[arg-type]


def test_what_the_documentation_shows_is_read(tmp_path: Path) -> None:
    assert len(BLOCKS) == 2
    text = "\n".join(BLOCKS)
    for name in re.findall(r'"([a-z]+\.[a-z]+)"', text):
        (tmp_path / name).write_text(SECRET)
    found = read(tmp_path, text)
    for name, channel in {
        "ses": "email",
        "sendgrid": "email",
        "postmark": "email",
        "twilio": "sms",
        "sns": "sms",
    }.items():
        source = found.of(name)
        assert source is not None
        assert source.channel == channel


def test_nobody_posts_where_no_file_or_no_table_says_so(tmp_path: Path) -> None:
    assert Sources(None, None).of("own") is None  # type: ignore[arg-type]
    assert read(tmp_path, '[email.providers.own]\nkind = "smtp"\npassword_file = "/there/is/none"\n').of("own") is None


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


async def test_a_table_or_a_secret_that_changes_is_read_anew_and_one_that_is_broken_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WATCH_SECONDS", 0.01)
    entry = '[callbacks.{}]\nkind = "postmark"\npassword_files = ["password"]\n'
    (tmp_path / "password").write_text("one")
    sources = read(tmp_path, entry.format("first"))
    sources.start()
    try:
        first = sources.of("first")
        assert first is not None
        (tmp_path / "password").write_text("another")
        await eventually(lambda: sources.of("first") is not first)
        second = sources.of("first")
        (tmp_path / "providers.toml").write_text("[callbacks")
        await eventually(lambda: metrics.providers_stale._value.get() == 1)
        assert sources.of("first") is second
        (tmp_path / "providers.toml").write_text(entry.format("second"))
        await eventually(lambda: sources.of("second") is not None)
        assert sources.of("first") is None
    finally:
        await sources.close()
