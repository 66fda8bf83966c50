"""The webhook part of the providers' file: what is read, and what is said of what cannot be."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.channels.webhook.settings import webhook_channel, webhook_settings
from engine.errors import InvalidSetting
from tests.support.documents import blocks
from tests.support.pushing import authority


async def test_the_file_that_the_documentation_shows_is_one_and_so_is_none(tmp_path: Path) -> None:
    (shown,) = (block.text for block in blocks() if block.document == "docs/webhooks.md")
    (tmp_path / "authority.pem").write_bytes(authority().cert_pem.bytes())
    for table in (tomllib.loads(shown)["webhook"], {}):
        await webhook_channel(webhook_settings(table), tmp_path).close()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"exempt": ["10.0.0.0/8"]}, "webhook: .*exempt"),
        ({"authority_file": "missing.pem"}, "webhook.authority_file: .*missing.pem cannot be read"),
        ({"authority_file": "empty"}, "webhook.authority_file holds no certificates"),
        ({"hosts": {"localhost": "127.0.0.1:1"}}, "webhook.hosts.localhost: no endpoint can have this name"),
        ({"hosts": {"10.0.0.1": "127.0.0.1:1"}}, "no endpoint can have this name"),
        ({"hosts": {"a.example.com": "127.0.0.1"}}, "webhook.hosts.a.example.com: .*<address>:<port>"),
        ({"hosts": {"a.example.com": "b.example.com:443"}}, "<address>:<port>"),
        ({"hosts": {"a.example.com": "127.0.0.1:65536"}}, "<address>:<port>"),
        ({"hosts": {"A.example.com": "127.0.0.1:1"}}, "in lower case"),
    ],
)
async def test_what_cannot_be_is_refused_with_its_name(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(InvalidSetting, match=said):
        webhook_channel(webhook_settings(table), tmp_path)
