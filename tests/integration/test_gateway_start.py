"""How a gateway starts, what it refuses to start with, and what its handshake looks like from outside."""

import asyncio
import json
import time
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa

from engine.broker.jetstream import NatsSettings
from engine.errors import InvalidSetting, TopologyError, Unavailable
from gateway.options import GatewayOptions
from gateway.server import run
from ops.dev.servers import NatsServer
from tests.support.gateways import again_and_again, gateway_on
from tests.support.tokens import SECRET, token


async def refused(nats: NatsServer, **options: Any) -> None:
    given = {"nats": NatsSettings(nats.url), "jwt_secret": SECRET, **options}
    async with asyncio.timeout(20):
        await run(GatewayOptions(**given), stop=asyncio.Event(), port=0)


async def test_without_a_topology_it_does_not_start_and_says_what_to_do(nats_server: NatsServer) -> None:
    with pytest.raises(TopologyError, match="seamark topology apply"):
        await refused(nats_server)


async def test_a_topology_for_another_number_of_partitions_is_refused(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server):
        with pytest.raises(TopologyError, match="SEAMARK_PARTITIONS is 8"):
            await refused(nats_server, partitions=8)


@pytest.mark.parametrize(("options", "says"), [
    ({"jwt_secret": None}, "exactly one"),
    ({"jwks_url": "https://issuer.example/jwks"}, "exactly one"),
    ({"jwt_secret": "short"}, "32 bytes"),
    ({"jwt_secret": None, "jwks_url": "http://issuer.example/jwks"}, "https"),
    ({"origins": ("*",)}, "SEAMARK_ORIGINS"),
])  # fmt: skip
async def test_settings_that_cannot_be_meant_are_refused(
    nats_server: NatsServer, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidSetting, match=says):
        await refused(nats_server, **options)


async def test_without_a_broker_it_does_not_start(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.broker.connection.CONNECT_TIMEOUT_SECONDS", 1.0)
    nats_server.kill()
    with pytest.raises(Unavailable):
        await refused(nats_server)


async def test_compression_is_never_agreed_on(nats_server: NatsServer) -> None:
    async with (
        gateway_on(nats_server) as gateway,
        gateway.http.ws_connect(f"{gateway.url}/v1/ws", compress=15) as socket,
    ):
        assert socket.compress == 0
        assert "Sec-WebSocket-Extensions" not in socket._response.headers


@pytest.mark.parametrize(("offered", "agreed"), [
    ("seamark.v1", "seamark.v1"), ("other, seamark.v1", "seamark.v1"), ("", None), ("other", 400), ("seamark.v2", 400),
])  # fmt: skip
async def test_the_sub_protocol_is_agreed_on_or_the_handshake_refused(
    nats_server: NatsServer, offered: str, agreed: str | int | None
) -> None:
    protocols = tuple(offered.split(", ")) if offered else ()
    async with gateway_on(nats_server) as gateway:
        if agreed == 400:
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await gateway.http.ws_connect(f"{gateway.url}/v1/ws", protocols=protocols)
            assert error.value.status == 400
        else:
            async with gateway.http.ws_connect(f"{gateway.url}/v1/ws", protocols=protocols) as socket:
                assert socket.protocol == agreed


async def test_health_and_readiness_are_told_apart(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        async with asyncio.timeout(20):
            while True:
                async with gateway.http.get(f"{gateway.url}/readyz") as response:
                    if response.status == 200:
                        break
                    assert (await response.json())["reasons"], "what it still waits for"
        async with gateway.http.get(f"{gateway.url}/healthz") as response:
            assert (response.status, response.headers["Server"]) == (200, "seamark")
        gateway.context.draining = True
        async with gateway.http.get(f"{gateway.url}/readyz") as response:
            assert (response.status, (await response.json())["reasons"][0]) == (503, "draining")
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            await gateway.http.ws_connect(f"{gateway.url}/v1/ws")
        assert error.value.status == 503


async def test_the_page_of_the_dev_profile_is_served_and_only_there(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server, dev=True) as gateway:
        async with gateway.http.get(f"{gateway.url}/") as response:
            assert (response.status, response.content_type) == (200, "text/html")
        own = {"Origin": gateway.url}
        async with gateway.socket(headers=own) as device:
            await device.say("hello", token=token(), device="d", cursor="start")
            await device.until("live")
        other = {"Origin": "http://127.0.0.1:1"}
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await gateway.http.ws_connect(f"{gateway.url}/v1/ws", headers=other)


async def test_production_serves_no_page(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        for path in ("/", "/dev/session", "/seamark.js"):
            async with gateway.http.get(gateway.url + path) as response:
                assert response.status == 404


async def test_sessions_open_with_rotating_keys_of_an_issuer_and_close_when_the_issuer_is_away_and_unknown(
    nats_server: NatsServer,
) -> None:
    old, new = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
    listed = [("old", old)]

    async def jwks(_: web.Request) -> web.Response:
        algorithm = jwt.get_algorithm_by_name("RS256")
        keys = [{**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid} for kid, key in listed]
        return web.json_response({"keys": keys})

    app = web.Application()
    app.router.add_get("/jwks", jwks)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()

    def signed(kid: str, key: rsa.RSAPrivateKey) -> str:
        claims = {"sub": "alice", "tenant": "default", "exp": time.time() + 60}
        return jwt.encode(claims, key, algorithm="RS256", headers={"kid": kid})

    url = f"http://127.0.0.1:{site.port}/jwks"
    try:
        async with gateway_on(nats_server, jwt_secret=None, jwks_url=url, dev=True) as gateway:
            keys = gateway.context.verifier._keys
            async with gateway.socket() as device:
                await device.say("hello", token=signed("old", old), device="d", cursor="start")
                await device.until("live")
                listed[:] = [("old", old), ("new", new)]
                keys._tried_at = -1e9  # type: ignore[attr-defined]  # as after the cooldown
                async with gateway.socket() as other:
                    await other.say("hello", token=signed("new", new), device="e", cursor="start")
                    await other.until("live")
                await device.say("refresh", token=signed("new", new))
                await device.say("ping")
                await device.until("pong")
            keys._tried_at = -1e9  # type: ignore[attr-defined]  # else a key may have been published since the last look
            async with gateway.socket() as device:
                await device.say("hello", token=token(), device="d")
                assert (await device.closed())[0] == 4401
            await runner.cleanup()
            keys._fetched_at = keys._tried_at = -1e9  # type: ignore[attr-defined]  # as after an hour without the issuer
            async with gateway.socket() as device:
                await device.say("hello", token=signed("unseen", new), device="d")
                code, _ = await device.closed()
                assert code == 1011  # the client is not at fault: it should come back
    finally:
        await runner.cleanup()


async def test_a_flood_of_protocol_pings_ends_the_session_with_4429(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        async with again_and_again(device.socket.ping):
            assert (await device.closed(timeout=60))[0] == 4429
