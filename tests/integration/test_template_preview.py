"""A preview shows what would be sent, by the code that sends, or says why nothing would be."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from engine.directory.changes import changing
from engine.directory.templates import TemplateKey, put_template
from gateway.access.principals import Scope
from ops.dev.servers import NatsServer
from tests.support.gateways import TestGateway, gateway_on

MAIL = {"subject": "Order {{ data.order }}", "body": "**Shipped**: {{ data.note }}"}


@pytest.fixture
async def gateway(patient: None, nats_server: NatsServer, postgres: str) -> AsyncIterator[TestGateway]:
    connection = await asyncpg.connect(postgres, timeout=20)
    for key, scope in (("reader", Scope.CONFIG_READ), ("stranger", Scope.EVENTS_WRITE)):
        await connection.execute(
            "INSERT INTO api_keys (key_hash, tenant, name, scopes) VALUES ($1, 'acme', 'test', $2)",
            hashlib.sha256(key.encode()).digest(),
            [scope],
        )
    await connection.close()
    async with gateway_on(nats_server, postgres_url=postgres) as running:
        assert running.context.directory is not None
        async with changing(running.context.directory.pool, "acme", 20) as change:
            await put_template(change, TemplateKey("order.*", "email", "default"), MAIL)
            await put_template(
                change, TemplateKey("order.*", "email", "de"), MAIL | {"subject": "Bestellung {{ data.order }}"}
            )
        yield running


async def asked(gateway: TestGateway, key: str = "reader", **body: Any) -> tuple[int, dict[str, Any]]:
    url, headers = f"{gateway.url}/v1/templates/preview", {"Authorization": f"Bearer {key}"}
    async with gateway.http.post(url, json={"type": "order.shipped", **body}, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_a_mail_is_shown_in_the_language_that_comes_nearest_and_values_mean_nothing(gateway: TestGateway) -> None:
    data = {"order": "17\r\nBcc: eve@example.com", "note": "<script>alert(1)</script> [x](https://evil.example)"}
    status, shown = await asked(gateway, channel="email", locale="de-AT", data=data)
    assert (status, shown["from_template"]) == (200, True)
    assert shown["subject"] == "Bestellung 17 Bcc: eve@example.com"
    assert "<strong>Shipped</strong>" in shown["html"]
    assert "<script" not in shown["html"]
    assert 'href="https://evil.example' not in shown["html"]
    assert "Shipped" in shown["text"]
    assert (await asked(gateway, channel="email", data={"order": 1, "note": "x"}))[1]["subject"] == "Order 1"


async def test_a_text_is_shown_with_what_it_costs_and_a_push_with_its_title(gateway: TestGateway) -> None:
    status, shown = await asked(gateway, channel="sms", data={"text": "10 € " * 40})
    assert (status, shown["from_template"], shown["encoding"], shown["units"]) == (200, False, "gsm-7", 239)
    assert [len(part) for part in shown["segments"]] == [128, 71]
    parts = {"body": "{{ data.name }} ✓"}
    status, shown = await asked(gateway, channel="sms", data={"name": "Alice"}, parts=parts)
    assert (status, shown["encoding"], shown["text"]) == (200, "ucs-2", "Alice ✓")
    status, shown = await asked(gateway, channel="push", data={"title": "Hi", "text": "there"})
    assert (status, shown["title"], shown["body"]) == (200, "Hi", "there")


async def test_what_nothing_would_be_sent_of_is_refused_with_its_reason(gateway: TestGateway) -> None:
    status, said = await asked(gateway, channel="email", data={"note": "secret value"})
    assert (status, said["code"]) == (422, "unsendable")
    assert "secret value" not in said["detail"]
    status, said = await asked(gateway, channel="sms", data={"text": "a" * 5000})
    assert (status, "too_many_segments" in said["detail"]) == (422, True)
    assert (await asked(gateway, channel="push"))[0] == 422
    sly = {"body": "{{ data.__class__ }}"}
    assert (await asked(gateway, channel="sms", parts=sly))[0] == 422
    for wrong in (
        {"channel": "webhook"},
        {"channel": "sms", "type": "order.*"},
        {"channel": "sms", "parts": {"subject": "x"}},
    ):
        assert (await asked(gateway, **wrong))[0] == 400, wrong
    assert (await asked(gateway, "stranger", channel="sms"))[0] == 403
