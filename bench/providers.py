"""Simulated providers as a process of their own, so that they cost the measured one nothing: their file, and counts."""

import asyncio
import contextlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import uvloop
from aiosmtpd.smtp import Envelope

from bench.processes import commands, say
from ops.dev.providers.acceptlog import AcceptLog
from ops.dev.providers.certificates import write_certificate
from ops.dev.providers.push import AUTHORITY, AUTHORITY_KEY, PushProviders
from ops.dev.providers.sms import TwilioSimulator
from ops.dev.providers.smtp import SmtpSimulator

ACCOUNT = "AC" + "1" * 32


def toml(value: Any) -> str:
    """A value as TOML writes it inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


class _Mails(SmtpSimulator):
    """Counts mails. Taking one apart as a person would see it takes five times as long as sending it: that would be the limit."""

    def accept(self, envelope: Envelope) -> str:
        self.log.accepted += 1
        return f"S{self.log.accepted:08d}"


async def _main(folder: Path) -> None:
    folder.mkdir()
    write_certificate(folder / AUTHORITY, folder / AUTHORITY_KEY)
    async with contextlib.AsyncExitStack() as running:
        push = await running.enter_async_context(PushProviders(folder))
        mail = await running.enter_async_context(_Mails())
        texts = await running.enter_async_context(TwilioSimulator(ACCOUNT, "secret"))
        (folder / "twilio.secret").write_text("secret")
        relay = {"kind": "smtp", "host": "127.0.0.1", "port": mail.port, "tls": "none"}
        account = {"kind": "twilio", "account": ACCOUNT, "secret_file": "twilio.secret", "sender": "+15005550006"}
        tables: dict[str, Any] = {
            "push": push.table,
            "email": {"providers": {"relay": relay}, "senders": {"default": {"address": "bench@example.com"}}},
            "sms": {"providers": {"texts": account | {"url": texts.url}}},
        }
        text = "\n".join(f"{name} = {toml(table)}" for name, table in tables.items())
        assert tomllib.loads(text) == tables
        file = folder / "providers.toml"
        file.write_text(text)
        logs: dict[str, AcceptLog] = {"push": push.production.log, "email": mail.log, "sms": texts.log}
        say("providers", file=str(file))
        async for _ in commands():
            say("accepted", **{channel: log.accepted for channel, log in logs.items()})


if __name__ == "__main__":
    uvloop.run(asyncio.wait_for(_main(Path(sys.argv[1])), None))
