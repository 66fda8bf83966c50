"""A worker with everything behind it: jobs leave as pushes, mails, texts and webhooks, or do not, for a reason that is stored."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from engine.broker.jetstream import Broker
from engine.controls.document import Kill
from engine.directory.changing import Directory
from engine.directory.push_tokens import tokens_of
from engine.directory.suppressions import NewSuppression, put_suppressions
from engine.plan.preferences import Preferences
from engine.postgres import Pool
from engine.settings import Settings
from engine.topology import server as topology
from ops.dev.providers.faults import Answers
from ops.dev.servers import NatsServer, Valkey
from tests.support.logs import FAST, connected, eventually
from tests.support.sending import (
    DEVICE,
    EMAIL,
    PHONE,
    SECRET,
    TENANT,
    USER,
    Simulated,
    a_job,
    add,
    ended,
    known,
    receipts_of,
    sending,
    settings_of,
    simulated,
)


@pytest.fixture
async def providers(tmp_path: Path) -> AsyncIterator[Simulated]:
    async with simulated(tmp_path / "providers") as found:
        yield found


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", 1, overrides=FAST)
        yield connection


@pytest.fixture
async def settings(
    broker: Broker, nats_server: NatsServer, valkey: Valkey, postgres: str, pool: Pool, providers: Simulated
) -> Settings:
    await known(pool, USER)
    return settings_of(nats_server.url, valkey.url, postgres, providers.file)


async def test_a_job_of_each_channel_arrives_once_and_its_receipt_names_who_took_it(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    async with sending(settings, pool):
        await add(broker, *(a_job(channel, "n1") for channel in ("push", "email", "sms", "webhook")))
        found = await eventually(ended(broker, "n1", "push/phone", "email", "sms"))
        found = await eventually(lambda: _states(broker, "n1", 6))
    assert [one.to for one in providers.accepted("push")] == [DEVICE]
    [mail] = providers.accepted("email")
    assert (mail.to, mail.shown["subject"]) == (EMAIL, "Shipped")
    assert "https://notify.example.com/u/" in mail.shown["headers"]["List-Unsubscribe"]
    [text] = providers.accepted("sms")
    assert (text.to, text.shown["text"]) == (PHONE, "Shipped\nIt is on its way")
    [hook] = providers.accepted("webhook")
    assert hook.shown["data"]["text"] == "It is on its way"
    sent = {one.channel: one for one in found if one.state == "sent"}
    assert {channel: one.provider for channel, one in sent.items()} == {
        "push": "apple", "email": "relay", "sms": "first", "webhook": "webhook"
    }  # fmt: skip
    assert sent["sms"].provider_id == text.id
    assert sent["sms"].segments == 1
    assert sent["push"].provider_id
    assert [one.state for one in found if not one.device and one.channel in {"push", "webhook"}] == ["split", "split"]


async def _states(broker: Broker, id: str, count: int) -> list | None:
    found = await receipts_of(broker, id)
    return found if len(found) >= count else None
