"""The roles at work under their own accounts: what `accounts.conf` allows is enough for the whole way of an event."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jwt
from redis.asyncio import Redis

from engine.broker.jetstream import connect as connect_broker
from engine.dispatch.claims import Claims
from engine.dispatch.dispatcher import Dispatcher
from engine.log.incarnations import read_partitions
from engine.topology import server as topology
from gateway.options import GatewayOptions
from gateway.server import run
from ops.dev.servers import NatsServer, Valkey
from seamark import Publisher, connect
from tests.support.logs import FAST, PIN_TIMEOUT_SECONDS
from tests.support.topology import password, passwords, server_with_accounts, settings_for

SECRET = "a secret for tests that is long enough for HS256"


@asynccontextmanager
async def dispatcher_account(server: NatsServer, valkey: Valkey) -> AsyncIterator[None]:
    broker = await connect_broker(settings_for(server.url, "dispatcher"))
    async with Redis.from_url(valkey.url) as redis:
        dispatcher = Dispatcher(
            broker, Claims(redis), await read_partitions(broker), pin_timeout_seconds=PIN_TIMEOUT_SECONDS
        )
        task = asyncio.create_task(dispatcher.run(), name="dispatcher")
        try:
            yield
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await broker.close()


@asynccontextmanager
async def gateway_account(server: NatsServer) -> AsyncIterator[str]:
    options = GatewayOptions(nats=settings_for(server.url, "gateway"), jwt_secret=SECRET)
    stop = asyncio.Event()
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = run(options, stop=stop, port=0, started=lambda port, _context: started.set_result(port))
    task = asyncio.create_task(serving, name="gateway")
    try:
        async with asyncio.timeout(20):
            port = await started
        yield f"http://127.0.0.1:{port}"
        stop.set()
        async with asyncio.timeout(20):
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_every_role_does_its_work_without_a_single_violation(tmp_path: Path, valkey: Valkey, monkeypatch):
    for name, value in passwords().items():
        monkeypatch.setenv(name, value)
    server = server_with_accounts(tmp_path / "nats")
    server.start()
    try:
        provisioner = await connect_broker(settings_for(server.url, "provisioner"))
        await topology.ensure(provisioner, "dev", overrides=FAST)
        await provisioner.close()
        claims = {"sub": "alice", "tenant": "default", "exp": time.time() + 600}
        token = jwt.encode(claims, SECRET, algorithm="HS256")
        publisher = Publisher(nats_url=server.url, user="publisher", password=password("publisher"))
        async with (
            dispatcher_account(server, valkey),
            gateway_account(server) as url,
            publisher,
            connect(url, token=token, device="laptop", cursor="start") as records,
        ):
            for number in range(5):
                await publisher.publish(to="alice", type="demo.n", data={"n": number})
            async with asyncio.timeout(40):
                for _ in range(5):
                    (await anext(records)).ack()
                await records.read(all=True)
                assert (await anext(records)).kind == "read"
        log = server.log_path.read_text()
        assert "iolation" not in log, [line for line in log.splitlines() if "iolation" in line]
    finally:
        server.kill()
