"""The embedded stack: servers, topology, schema and roles on this machine, from one command."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from engine.broker.jetstream import connect
from engine.errors import InvalidSetting, Unavailable
from engine.settings import given_settings, load_settings
from engine.topology import server as topology
from gateway.access.key_table import KeyTable
from gateway.access.principals import Scope
from gateway.api.dev_page import PAGE_SCOPES
from ops import postgres
from ops.cli.target import DATA_FOLDER, DevFile
from ops.cli.token import sign
from ops.dev import example
from ops.dev.environment import roles_environment
from ops.dev.fulldisk import keep_writable
from ops.dev.lock import locked
from ops.dev.outbox.messages import Outbox
from ops.dev.outbox.page import serving
from ops.dev.outbox.people import people
from ops.dev.outbox.providers import Providers, running
from ops.dev.reservations import Reservations
from ops.dev.roles import Role, keep
from ops.dev.secretsfile import Kept, read_kept, write_private_json
from ops.dev.servers import HOST, NatsServer, Postgres, Server, Valkey
from ops.migrate import migrate

TENANT = "default"
USER = "alice"
TOKEN_SECONDS = 30 * 86_400
GATEWAY_PORT = 8080
READY_SECONDS_MAX = 60.0
TRACE_PATH = "/traces/{trace_id}"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user of `seamark dev` chooses. `port` None: the port of the last run, else 8080, else a free one."""

    data: Path
    port: int | None = None
    partitions: int | None = None
    processes: int = 1
    traces: bool = False


class Stack:
    """A running development stack; made by `started`."""

    def __init__(self, options: Options, kept: Kept, say: Say, lock: int) -> None:
        self._options = options
        self._kept = kept
        self._say = say
        self._lock = lock
        self._servers: list[Server] = []
        self._roles: list[Role] = []
        self._reserved = Reservations()
        self.nats_url = self.redis_url = self.postgres_url = self.gateway_url = ""
        self.monitor_url: str | None = None
        self.traces_url: str | None = None
        self.outbox_url = ""
        self._providers: Providers | None = None
        self._held = contextlib.AsyncExitStack()

    @property
    def roles(self) -> list[Role]:
        """The role processes."""
        return self._roles

    async def start(self) -> None:
        """Servers, topology, schema, roles; returns when the gateway can serve."""
        if self._options.port:
            self._gateway_port()  # refused before anything is started
        await self._start_servers()
        port = self._gateway_port()  # only now: others may have taken a free one while the servers started
        self.gateway_url = f"http://{HOST}:{port}"
        await self._open_outbox()
        self._say("applying topology and schema")
        await self._prepare_stores()
        if self._options.traces:
            await self._receive_traces()
        write_private_json(self._options.data / "kept.json", self._kept)
        self._start_roles(port)
        await self._wait_for_gateway()

    async def _start_servers(self) -> None:
        data, ports = self._options.data, self._kept.ports
        self._take_given_servers()
        if not self.nats_url:
            nats = NatsServer(data / "nats", port=self._port("nats"))
            await self._start_server(nats)
            self.nats_url, self.monitor_url, ports["nats"] = nats.url, nats.monitor_url, nats.port
        if not self.redis_url:
            valkey = Valkey(data / "valkey", port=self._port("valkey"))
            await self._start_server(valkey)
            self.redis_url, ports["valkey"] = valkey.url, valkey.port
        if not self.postgres_url:
            database = Postgres(data / "postgres", port=self._port("postgres"))
            await self._start_server(database)
            self.postgres_url, ports["postgres"] = database.url, database.port

    def _take_given_servers(self) -> None:
        """Servers that the settings name are used and left alone."""
        given, settings = given_settings(), load_settings()
        if "nats_url" in given:
            self.nats_url = settings.nats_url.reveal()
        if "redis_url" in given:
            self.redis_url = settings.redis_url.reveal()
        if settings.postgres_url is not None:
            self.postgres_url = settings.postgres_url.reveal()

    async def _start_server(self, server: Server) -> None:
        self._say(f"starting {server.name}")
        self._servers.append(server)
        server.child.holds = (self._lock,)
        await _to_the_end(server.prepare)
        server.spawn()
        await asyncio.to_thread(server.wait_ready)

    async def _open_outbox(self) -> None:
        """Every provider, simulated: nothing of what the stack sends leaves this machine, whatever stands in the environment."""
        self._say("starting simulated providers")
        outbox, hold = Outbox(), self._held.enter_async_context
        folder, gateway = self._options.data / "providers", self.gateway_url
        self._providers = await hold(running(folder, outbox, self._kept_port, gateway_url=gateway, tenant=TENANT))
        asked = await hold(people(self.postgres_url))
        port = self._kept_port("outbox")
        self.outbox_url = await hold(serving(HOST, port, outbox, self._providers, asked, lambda: self.gateway_url))

    async def _prepare_stores(self) -> None:
        broker = await connect(replace(load_settings().nats("seamark-dev"), url=self.nats_url))
        try:
            await topology.ensure(broker, "dev", self._options.partitions)
        finally:
            await broker.close()
        await migrate(self.postgres_url)
        connection = await postgres.connect(self.postgres_url)
        try:
            keys = KeyTable(connection)
            await keys.keep(self._kept.api_key, TENANT, list(Scope), name="dev")
            await keys.keep(self._kept.page_key, TENANT, PAGE_SCOPES, name="dev page")
        except postgres.FAILURES as error:
            raise postgres.explained(error) from error
        finally:
            await connection.close(timeout=10)
        if any(
            isinstance(server, Postgres) for server in self._servers
        ):  # a database of somebody else's stays as it is
            assert self._providers is not None, "it is started before"
            await example.fill(self.postgres_url, TENANT, self._providers)

    async def _receive_traces(self) -> None:
        try:
            from ops.dev.traces import receiving
        except ImportError as error:
            raise InvalidSetting("--traces needs an exporter: pip install 'seamark-server[traces]'") from error
        port = self._kept_port("traces")
        self.traces_url = await self._held.enter_async_context(receiving(HOST, port))

    def _gateway_port(self) -> int:
        asked, ports = self._options.port, self._kept.ports
        if asked:
            if not self._reserved.take(asked):
                raise InvalidSetting(f"--port: port {asked} is in use")
            ports["gateway"] = asked
        elif not self._reserved.take(ports.setdefault("gateway", GATEWAY_PORT)):
            ports["gateway"] = self._reserved.take_any()
        return ports["gateway"]

    def _port(self, server: str) -> int:
        """The port of the last run if it is still free: URLs in an operator's history go on to work."""
        kept = self._kept.ports.get(server)
        return kept if kept and self._reserved.take(kept) else self._reserved.take_any()

    def _kept_port(self, name: str) -> int:
        port = self._kept.ports[name] = self._port(name)
        return port

    def _start_roles(self, port: int) -> None:
        data = self._options.data
        assert self._providers is not None, "it is started before"
        ours = {
            "SEAMARK_PROFILE": "dev",
            "SEAMARK_NATS_URL": self.nats_url,
            "SEAMARK_REDIS_URL": self.redis_url,
            "SEAMARK_POSTGRES_URL": self.postgres_url,
            "SEAMARK_JWT_SECRET": self._kept.jwt_secret,
            "SEAMARK_DEV_API_KEY": self._kept.page_key,
            "SEAMARK_GATEWAY_HOST": HOST,
            "SEAMARK_GATEWAY_PORT": str(port),
            "SEAMARK_LOG_FORMAT": "json",
            "SEAMARK_PROVIDERS": str(self._providers.file.resolve()),
            "SEAMARK_DEV_OUTBOX_URL": self.outbox_url,
            "SEAMARK_PUBLIC_URL": self.gateway_url,
            "SEAMARK_UNSUBSCRIBE_SECRETS": self._kept.unsubscribe_secret,
            "SEAMARK_STORAGE_KEYS": self._kept.storage_key,
        }
        if self.monitor_url is not None:
            ours["SEAMARK_NATS_MONITOR_URLS"] = self.monitor_url
        if data != DATA_FOLDER:
            ours["SEAMARK_FOLDER"] = str(data)  # for the command that the page suggests
        if self.traces_url is not None:
            ours["SEAMARK_TRACES_ENDPOINT"], ours["SEAMARK_TRACE_ONE_IN"] = self.traces_url, "1"
            ours["SEAMARK_TRACE_URL"] = f"{self.traces_url}{TRACE_PATH}"
            ours["OTEL_BSP_SCHEDULE_DELAY"] = "500"  # milliseconds: somebody looks at the page
        env = roles_environment(ours, os.environ)
        gateway = ["gateway", "--processes", str(self._options.processes)]
        for words in (["dispatcher"], ["projector"], ["planner"], ["worker"], ["pager"], gateway):
            name = words[0]
            self._say(f"starting {name}")
            role = Role(name, words, env, data / f"{name}.log", self._say)
            role.child.holds = (self._lock,)
            role.spawn()
            self._roles.append(role)

    async def _wait_for_gateway(self) -> None:
        try:
            async with asyncio.timeout(READY_SECONDS_MAX), aiohttp.ClientSession() as http:
                while not await _ready(http, f"{self.gateway_url}/readyz"):
                    for role in self._roles:
                        if not role.child.alive:
                            raise Unavailable(f"{role.name} ended while starting\n{role.child.log_tail()}")
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            tail = self._roles[-1].child.log_tail()
            raise Unavailable(f"the gateway is not ready after {READY_SECONDS_MAX:g} s\n{tail}") from error

    def describe(self) -> DevFile:
        """Where everything is, and keys to it."""
        secret = self._kept.jwt_secret
        return DevFile(
            nats_url=self.nats_url,
            redis_url=self.redis_url,
            postgres_url=self.postgres_url,
            gateway_url=self.gateway_url,
            tenant=TENANT,
            user=USER,
            token=sign(secret, TENANT, USER, TOKEN_SECONDS),
            api_key=self._kept.api_key,
            jwt_secret=secret,
            nats_monitor_url=self.monitor_url,
            outbox_url=self.outbox_url,
            trace_url=None if self.traces_url is None else f"{self.traces_url}{TRACE_PATH}",
        )

    async def keep(self) -> None:
        """Restart what dies; ends by cancellation."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for role in self._roles:
                    tasks.create_task(role.keep(), name=f"keep {role.name}")
                for server in self._servers:
                    tasks.create_task(keep(server.child, server.spawn, self._say), name=f"keep {server.name}")
                    if isinstance(server, NatsServer):
                        tasks.create_task(keep_writable(server, self._say), name="keep nats-server writable")
        except BaseExceptionGroup as failed:  # the first failure has stopped the others
            raise failed.exceptions[0] from None

    def stop(self) -> None:
        """Everything in order: who takes work first, then who does it, then the stores."""
        for role in reversed(self._roles):
            self._say(f"stopping {role.name}")
            role.stop()
        for server in reversed(self._servers):
            self._say(f"stopping {server.name}")
            server.stop()
        self._reserved.close()

    async def close(self) -> None:
        """Take no more messages and spans: after `stop`, during which the last are sent."""
        await self._held.aclose()


@contextlib.asynccontextmanager
async def started(options: Options, say: Say) -> AsyncIterator[Stack]:
    """A stack that runs until the block ends.

    Raises:
        InvalidSetting: another stack runs on this data, or a port is taken. ServerFailed, Unavailable: see the message.
    """
    options.data.mkdir(parents=True, exist_ok=True)
    async with locked(options.data, say) as lock:
        stack = Stack(options, read_kept(options.data), say, lock)
        try:
            await stack.start()
            write_private_json(options.data / "dev.json", stack.describe())
            yield stack
        finally:
            # Commands find the stack by this file: without it they say at once that nothing runs here.
            (options.data / "dev.json").unlink(missing_ok=True)
            await _to_the_end(stack.stop)  # in a thread: meanwhile the last messages and spans are taken here
            await stack.close()


async def _to_the_end(work: Callable[[], None]) -> None:
    """Run `work` in a thread. A cancellation waits for its end: what works on the folder must not outlast the lock."""
    task = asyncio.create_task(asyncio.to_thread(work), name="prepare")
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait((task,))
        task.exception()  # told to whoever still listens


async def _ready(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
