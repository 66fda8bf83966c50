"""A newer client and today's gateway, a newer gateway and today's clients: they get on with each other."""

from __future__ import annotations

import asyncio
import json

import pytest

from ops.dev.servers import NatsServer
from seamark import Live, Record, connect
from tests.support.chromium import Chromium
from tests.support.gateways import gateway_on
from tests.support.logs import eventually
from tests.support.newer import newer_gateway
from tests.support.tokens import token

pytestmark = pytest.mark.timeout(240)


async def test_a_client_with_fields_and_an_op_that_this_gateway_does_not_know_is_served(
    nats_server: NatsServer,
) -> None:
    newer = {"sparkle": {"colour": [1]}, "parts": {"topic:news": "p~9"}}
    async with gateway_on(nats_server) as gateway, gateway.socket() as device:
        await gateway.append(count=2)
        await device.say("sparkle", id="before hello", **newer)
        refused = await device.next()
        assert (refused["code"], refused["id"]) == ("unknown_op", "before hello")
        await device.say("hello", token=token(), device="d", cursor="start", capabilities=["feeds", "sparkle"], **newer)
        ready = await device.next()
        assert (ready["resumed"], ready["capabilities"]) == (True, ["now"])
        records = await device.records(2)
        await device.until("live")
        await device.say("sparkle", id="1", **newer)
        refused = await device.next()
        assert (refused["op"], refused["code"], refused["id"]) == ("error", "unknown_op", "1")
        await device.say("ack", cursor=records[-1]["cursor"], **newer)
        await device.say("read", ids=["r0"], id="2", **newer)
        assert (await device.records(1))[0]["record"]["ids"] == ["r0"]
        await device.say("ping", **newer)
        pong = await device.next()
        assert (pong["op"], pong["seq"]) == ("pong", 3)
        assert await gateway.append() == [frame["seq"] for frame in await device.records(1)]
        assert not any("feed" in frame for frame in device.frames)

        async def acknowledged() -> bool:
            return [one["up_to"] for one in await gateway.receipts() if one["state"] == "acknowledged"] == [2]

        await eventually(acknowledged)


async def test_a_gateway_with_frames_and_fields_that_the_python_sdk_does_not_know_is_followed(
    nats_server: NatsServer,
) -> None:
    async with gateway_on(nats_server) as today, newer_gateway(today.url) as gateway:
        seqs = await today.append(count=3)
        async with asyncio.timeout(60), connect(gateway.url, token=token(), device="d", cursor="start") as connection:
            events = connection.events()
            got = [await anext(events) for _ in range(4)]
            assert [item.seq for item in got if isinstance(item, Record | Live)] == [*seqs, seqs[-1]]
            await connection.read(up_to=got[1])  # type: ignore[arg-type]
            mark = await anext(events)
            assert isinstance(mark, Record)
            assert (mark.kind, mark.record["up_to"]) == ("read", seqs[1])
            assert connection.capabilities == ("feeds", "sparkle")
            assert connection.reconnects == 0
    assert [frame["op"] for frame in gateway.said][:1] == ["hello"]


async def test_a_gateway_with_frames_and_fields_that_the_javascript_sdk_does_not_know_is_followed(
    nats_server: NatsServer, browser: Chromium
) -> None:
    async with gateway_on(nats_server) as today, newer_gateway(today.url) as gateway:
        seqs = await today.append(count=3)
        page = await browser.open(f"{gateway.url}/")
        await page.evaluate(
            f"""(async () => {{
              const {{ Seamark }} = await import("/seamark.js");
              window.got = {{ records: [], resets: 0, errors: 0 }};
              window.s = new Seamark({{ token: {json.dumps(token())}, cursor: "start", device: "tab" }});
              s.addEventListener("record", ({{ detail }}) => got.records.push(detail));
              s.addEventListener("reset", () => got.resets += 1);
              s.addEventListener("error", () => got.errors += 1);
              s.connect();
            }})()"""
        )
        await page.until("s.state === 'live' && got.records.length === 3")
        await page.evaluate("s.read({ upTo: got.records[1] })")
        await page.until("got.records.length === 4")
        said = await page.evaluate(
            "[got.records.map((one) => one.seq), got.records[3].record.up_to, got.resets, got.errors]"
        )
        assert said == [[*seqs, seqs[-1] + 1], seqs[1], 0, 0]
        assert await page.evaluate("s.capabilities") == ["feeds", "sparkle"]
        assert page.errors == []
        assert [frame["op"] for frame in gateway.said].count("hello") == 1
