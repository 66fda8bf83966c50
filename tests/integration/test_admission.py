"""What is taken and what is refused before anything is done: by address, by user, for want of room."""

import zlib
from collections.abc import Mapping

import aiohttp
import pytest
from aiohttp.http_parser import DeflateBuffer

from engine.errors import InvalidSetting
from ops.dev.servers import NatsServer
from tests.support.gateways import TestGateway, gateway_on
from tests.support.tokens import bearer

READ = {"device": "tab", "ids": ["r0"]}


async def read(gateway: TestGateway, user: str = "alice") -> int:
    async with gateway.http.post(f"{gateway.url}/v1/inbox/read", json=READ, headers=bearer(user=user)) as response:
        if response.status != 202:
            assert int(response.headers["Retry-After"]) > 0
        return response.status


async def shake_hands(gateway: TestGateway, headers: Mapping[str, str]) -> int:
    try:
        socket = await gateway.http.ws_connect(f"{gateway.url}/v1/ws", headers=headers)
    except aiohttp.WSServerHandshakeError as refused:
        return refused.status
    await socket.close()
    return 101


async def test_a_read_by_request_needs_no_room_for_a_session(nats_server: NatsServer) -> None:
    async with (
        gateway_on(nats_server, sessions_at_most=1, handshakes_per_minute=1) as gateway,
        gateway.device() as device,
    ):
        await device.until("live")
        assert await shake_hands(gateway, {}) == 503
        assert [await read(gateway) for _ in range(3)] == [202] * 3


async def test_requests_of_a_user_are_bounded_and_cost_neither_sessions_nor_others(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.context.REQUESTS_PER_MINUTE", 3)
    async with gateway_on(nats_server) as gateway:
        gateway.context.requests._now = lambda: 0.0  # on a slow machine more would be granted meanwhile
        assert [await read(gateway) for _ in range(5)] == [202, 202, 202, 429, 429]
        assert await read(gateway, "bob") == 202
        async with gateway.http.get(f"{gateway.url}/v1/records?device=tab", headers=bearer()) as response:
            assert response.status == 429
        async with gateway.device("bob") as device:
            await device.until("live")


async def test_a_user_that_opens_sessions_in_a_loop_is_stopped_and_the_open_ones_go_on(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.context.REQUESTS_PER_MINUTE", 3)
    async with gateway_on(nats_server) as gateway:
        gateway.context.requests._now = lambda: 0.0
        async with gateway.device() as device:
            await device.until("live")
            for _ in range(2):
                async with gateway.device() as another:
                    await another.until("live")
            async with gateway.device() as another:
                assert (await another.closed())[0] == 4429
            async with gateway.http.get(f"{gateway.url}/v1/stream?device=tab", headers=bearer()) as response:
                assert response.status == 429
            [seq] = await gateway.append()
            assert (await device.records(1))[0]["seq"] == seq


async def test_handshakes_are_counted_for_the_address_that_a_trusted_proxy_has_seen(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server, handshakes_per_minute=2, trusted_proxies=("127.0.0.0/8",)) as gateway:
        one = [{"X-Forwarded-For": f"198.51.100.{number}, 203.0.113.7"} for number in range(3)]
        assert [await shake_hands(gateway, headers) for headers in one] == [101, 101, 429]
        assert await shake_hands(gateway, {"X-Forwarded-For": "203.0.113.8"}) == 101


async def test_without_a_trusted_proxy_the_header_counts_nothing(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server, handshakes_per_minute=2) as gateway:
        forged = [{"X-Forwarded-For": f"198.51.100.{number}"} for number in range(3)]
        assert [await shake_hands(gateway, headers) for headers in forged] == [101, 101, 429]


async def test_a_proxy_that_is_no_network_is_refused_at_start(nats_server: NatsServer) -> None:
    with pytest.raises(InvalidSetting, match="SEAMARK_TRUSTED_PROXIES"):
        async with gateway_on(nats_server, trusted_proxies=("proxy.example",)):
            raise AssertionError("it started")


async def test_a_compressed_body_is_refused_and_never_unpacked(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[int] = []
    monkeypatch.setattr(DeflateBuffer, "feed_data", lambda _, data, *rest: unpacked.append(len(data)))
    packing = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packing.compress(b"0" * (1 << 20)) for _ in range(20)) + packing.flush()
    async with (
        gateway_on(nats_server) as gateway,
        gateway.http.post(
            f"{gateway.url}/v1/inbox/read", data=bomb, headers={**bearer(), "Content-Encoding": "gzip"}
        ) as response,
    ):
        assert (response.status, (await response.json(content_type=None))["field"]) == (415, "Content-Encoding")
    assert unpacked == []


REFUSED: tuple[tuple[dict[str, object], str], ...] = (
    ({"device": 7, "all": True}, "device"), ({"all": True}, "device"),
    ({"device": "tab", "ids": ["a", 3]}, "ids[1]"), ({"device": "tab", "filter": {"unread": 3}}, "filter.unread"),
    ({"device": "tab", "filter": {"type": ""}}, "filter.type"), ({"device": "a\nb", "all": True}, "device"),
)  # fmt: skip


async def test_a_read_that_is_refused_names_the_member(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        for body, field in REFUSED:
            async with gateway.http.post(f"{gateway.url}/v1/inbox/read", json=body, headers=bearer()) as response:
                problem = await response.json(content_type=None)
                assert (response.status, problem["field"]) == (400, field)
