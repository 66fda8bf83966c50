"""The providers' file: what is wrong with it is said with the member and the remedy, and no secret is repeated."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from engine import metrics
from engine.channels import files
from engine.channels.sms.channel import SmsChannel
from engine.errors import InvalidSetting
from engine.jobs.bucket import Limit
from engine.plan.rules import Channel
from engine.settings import Secret, Settings
from engine.tasks import end
from engine.worker import providers as module
from engine.worker.providers import SENT_BY_WORKERS, Providers, ProvidersFile, read_providers
from ops.cli import app
from ops.cli.worker import chosen
from ops.working import unset
from tests.support.forks import ROOT
from tests.support.logs import eventually
from tests.support.pushing import apple_key

SMS = """
[sms.providers.first]
kind = "twilio"
account = "AC0123456789abcdef0123456789abcdef"
secret_file = "twilio.secret"
sender = "+15005550006"
per_second = 20
"""


def written(folder: Path, text: str, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    file = folder / "providers.toml"
    file.write_text(text)
    return file


async def ignored(reading: int) -> None: ...


async def test_the_file_of_the_documentation_has_a_provider_for_every_channel(tmp_path: Path) -> None:
    found = re.search(r"```toml\n(.*?)```", (ROOT / "docs" / "worker.md").read_text(), re.DOTALL)
    assert found is not None
    file = written(tmp_path, found[1], smtp_password="sesame", twilio_secret="t", sns_secret="s")
    pem = apple_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    (tmp_path / "AuthKey_ABC1234567.p8").write_text(pem)
    providers = Providers(ProvidersFile(file), SENT_BY_WORKERS, ignored)
    names = {channel: [one.name for one in providers.of(channel)] for channel in SENT_BY_WORKERS}
    assert names == {"push": ["apple"], "email": ["own"], "sms": ["first", "spare"], "webhook": ["webhook"]}
    assert providers.of("email")[0].limit == Limit(50)
    assert providers.of("push")[0].platform == "apns"
    await providers.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sms = 1", "sms must be a table"),
        ("[fax]", "there is no table [fax]; known are callbacks, email, push, sms, webhook"),
        ("[sms", "is not TOML"),
        ("[sms.providers]", "sms.providers: there are none"),
        (SMS.replace('"+15005550006"', '"no sender at all"'), "sms: "),
        (SMS.replace("per_second = 20", "per_second = -1"), "per_second"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidSetting) as error:
        ProvidersFile(written(tmp_path, text))
    assert said in str(error.value)


def test_without_a_file_the_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="SEAMARK_PROVIDERS is not set"):
        read_providers(None)
    with pytest.raises(InvalidSetting, match=r"SEAMARK_PROVIDERS: .*none\.toml cannot be read"):
        read_providers(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("secret", "said"), [(None, "cannot be read"), ("", "must hold the secret"), ("two\nlines", "must hold the secret")]
)
async def test_a_secret_that_cannot_be_used_is_named_and_not_repeated(
    tmp_path: Path, secret: str | None, said: str
) -> None:
    file = written(tmp_path, SMS, **({} if secret is None else {"twilio_secret": secret}))
    with pytest.raises(InvalidSetting) as error:
        ProvidersFile(file).providers("sms")
    assert "sms.providers.first.secret_file" in str(error.value)
    assert said in str(error.value)
    assert "two" not in str(error.value)


def test_a_worker_serves_what_it_is_told_to_or_all_that_the_file_names(tmp_path: Path) -> None:
    named = ProvidersFile(written(tmp_path, SMS + "[webhook]\n", twilio_secret="t")).named
    assert chosen(None, named) == ("sms", "webhook")
    assert chosen(["webhook"], named) == ("webhook",)
    with pytest.raises(InvalidSetting, match="there is no such channel"):
        chosen(["fax"], named)
    with pytest.raises(InvalidSetting, match="names no channel"):
        chosen(None, ())


async def test_a_file_or_a_secret_that_changes_is_read_anew_and_one_that_is_broken_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.01)
    forgotten: list[int] = []

    async def forget(reading: int) -> None:
        forgotten.append(reading)

    file = written(tmp_path, SMS, twilio_secret="one")
    providers = Providers(ProvidersFile(file), ("sms",), forget)
    watching = asyncio.create_task(providers.watch())
    try:
        first = providers.of("sms")
        (tmp_path / "twilio.secret").write_text("another")
        await eventually(lambda: providers.of("sms") is not first)
        second = providers.of("sms")
        await eventually(lambda: forgotten == [1])
        file.write_text("[sms")
        await eventually(lambda: metrics.providers_stale._value.get() == 1)
        assert providers.of("sms") is second
        file.write_text(SMS.replace("20", "30"))
        await eventually(lambda: providers.of("sms")[0].limit == Limit(30))
    finally:
        await end(watching)
        await providers.close()


async def test_all_connections_are_closed_at_the_end_be_they_replaced_in_that_very_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []

    async def close(channel: SmsChannel) -> None:
        closed.append(channel)
        await channel._provider.close()

    monkeypatch.setattr(SmsChannel, "close", close)
    providers = Providers(ProvidersFile(written(tmp_path, SMS, twilio_secret="one")), ("sms",), ignored)
    (first,) = providers.of("sms")
    providers._read_anew()  # its task has had no turn when all is closed
    (second,) = providers.of("sms")
    await providers.close()
    assert closed == [first.channel, second.channel]


def test_the_command_only_looks_whether_the_file_can_be_used(tmp_path: Path) -> None:
    file = written(tmp_path, SMS + "[webhook]\n")
    found = CliRunner().invoke(app, ["worker", "--check"], env={"SEAMARK_PROVIDERS": str(file)})
    assert "sms.providers.first.secret_file" in str(found.exception)
    (tmp_path / "twilio.secret").write_text("t")
    links = {"SEAMARK_UNSUBSCRIBE_SECRETS": "u" * 40, "SEAMARK_STORAGE_KEYS": f"{'A' * 43}="}
    found = CliRunner().invoke(app, ["worker", "--check"], env={"SEAMARK_PROVIDERS": str(file), **links})
    assert (found.exit_code, found.output) == (0, "sms: first\nwebhook: webhook\n")
    found = CliRunner().invoke(
        app, ["worker", "--check"], env={"SEAMARK_PROVIDERS": str(file), "SEAMARK_STORAGE_KEYS": "a"}
    )
    assert "SEAMARK_STORAGE_KEYS: key 1 is not 32 bytes" in str(found.exception)


@pytest.mark.parametrize(
    ("channels", "named", "missing"),
    [
        (["email", "sms"], {}, ["SEAMARK_PUBLIC_URL", "SEAMARK_UNSUBSCRIBE_SECRETS"]),
        (["email"], {"public_url": "https://notify.example.com"}, ["SEAMARK_UNSUBSCRIBE_SECRETS"]),
        (["email"], {"unsubscribe_secrets": Secret("u" * 40)}, ["SEAMARK_PUBLIC_URL"]),
        (["sms"], {}, ["SEAMARK_UNSUBSCRIBE_SECRETS"]),
        (["push"], {}, []),
        (["push", "webhook"], {}, ["SEAMARK_STORAGE_KEYS"]),
        (
            SENT_BY_WORKERS,
            {
                "public_url": "https://notify.example.com",
                "unsubscribe_secrets": Secret("u" * 40),
                "storage_keys": Secret("k"),
            },
            [],
        ),
    ],
)
def test_what_is_not_set_for_a_channel_is_said_when_its_worker_starts(
    channels: Sequence[Channel], named: dict[str, Any], missing: list[str]
) -> None:
    settings = Settings(redis_url=Secret("redis://127.0.0.1"), **named)
    assert [variable for variable, _ in unset(settings, channels)] == missing
