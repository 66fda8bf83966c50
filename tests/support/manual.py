"""A stack as `make run` starts it, with traffic on it, and somebody who types what the documentation says."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import asyncpg

from engine.topology.files import files_folder
from ops.cli.target import DevFile
from ops.cli.token import sign
from seamark import Publisher, connect
from tests.support.commands import seamark, started
from tests.support.devstack import Stack
from tests.support.forks import ROOT, Fork
from tests.support.logs import connected
from tests.support.waiting import wait_for

USERS: Final = ("alice", "bob", "alice@example.com")
FIRST_EVENT: Final = "e1"
"""The event that the documentation asks about, for alice."""

PAUSE_SECONDS: Final = 0.25
"""Between two events. Each worker of the tests has such a stack: more events would take its two cores from the others."""
WAIT_SECONDS: Final = 90.0
COMMAND_SECONDS: Final = 90.0


class Traffic:
    """Events for a few users and a device of alice that acknowledges, on a thread of its own until `stop`."""

    def __init__(self, stack: DevFile) -> None:
        self._stack = stack
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic", daemon=True)
        self.published = 0
        self.received = 0
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Returns when a record has reached the device."""
        self._thread.start()
        wait_for(lambda: self.received or self.failure, seconds=WAIT_SECONDS)
        self.check()

    def stop(self) -> None:
        """End it; what went wrong meanwhile is raised."""
        self._stop.set()
        self._thread.join(WAIT_SECONDS)
        self.check()

    def check(self) -> None:
        """Raises what ended it."""
        if self.failure is not None:
            raise self.failure

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                device = tasks.create_task(self._follow(), name="device")
                await self._publish()
                device.cancel()
        except BaseException as error:
            self.failure = error

    async def _publish(self) -> None:
        async with connected(self._stack.nats_url) as broker:
            broker.publish("events.default.alice.demo.hello", b"not json")  # there is a dead letter to look at
            await broker.flush()
        async with Publisher(nats_url=self._stack.nats_url) as publisher:
            await publisher.publish(to=["alice"], type="demo.hello", id=FIRST_EVENT)
            while not self._stop.is_set():
                user = USERS[self.published % len(USERS)]
                await publisher.publish(to=[user], type="demo.tick", data={"number": self.published}, category="ticks")
                self.published += 1
                await asyncio.sleep(PAUSE_SECONDS)

    async def _follow(self) -> None:
        async with connect(self._stack.gateway_url, token=self._stack.token, device="phone", cursor="start") as records:
            async for _ in records:
                self.received += 1


@dataclass
class Manual:
    """Whoever reads the documentation and types it, beside a running stack."""

    stack: Stack
    described: DevFile
    traffic: Traffic

    def stood_in(self, text: str) -> str:
        """The text with this stack's addresses in the place of those that documents show."""
        for shown, ours in {
            "nats://127.0.0.1:32735": self.described.nats_url,
            "nats://127.0.0.1:4222": self.described.nats_url,
            "http://127.0.0.1:8080": self.described.gateway_url,
            "https://notify.example.com": self.described.gateway_url,
        }.items():
            text = text.replace(shown, ours)
        if text == "users.csv":  # a tenant's own file
            (self.stack.folder / text).write_text("id,email,attributes.plan\nalice,alice@example.com,pro\nbob,,free\n")
        if text == "event.json":  # a service's own event
            (self.stack.folder / text).write_text('{"to":["alice"],"type":"order.shipped"}')
        if text == "nats/accounts.conf":  # an operator's own copy
            copy = self.stack.folder / text
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(files_folder() / "accounts.conf", copy)
        if "@db.internal/" in text:  # an operator's own database, which is empty
            text = self.empty_database()
        return text

    def empty_database(self) -> str:
        """URL of a new database on the stack's server."""
        name = f"manual_{secrets.token_hex(4)}"

        async def create() -> None:
            admin = await asyncpg.connect(self.described.postgres_url, timeout=10)
            try:
                await admin.execute(f"CREATE DATABASE {name}")
            finally:
                await admin.close(timeout=10)

        asyncio.run(create())
        return self.described.postgres_url.rpartition("/")[0] + f"/{name}"

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**self.stack.env, **(env or {})}

    def seamark(
        self, *words: str, env: Mapping[str, str] | None = None, text: str = "", code: int = 0, ends: bool = True
    ) -> str:
        """Run the command; its standard output. One that never `ends` by itself gets a Ctrl-C after its first lines."""
        if ends:
            done = self.tried(*words, env=env, text=text)
        else:
            folder, environment = self.stack.folder, self.environment(env)
            done = self._interrupted(
                words, lambda output: started(*words, folder=folder, output=output, env=environment), bool
            )
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def tried(
        self, *words: str, env: Mapping[str, str] | None = None, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, however it ends."""
        settings = {**self.stack.settings, **(env or {})}
        return seamark(*words, folder=self.stack.folder, text=text, timeout_seconds=COMMAND_SECONDS, **settings)

    def run(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run it in the stack's folder to its end."""
        return subprocess.run(
            argv,
            cwd=self.stack.folder,
            env=self.environment(env),
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )

    def interrupted(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, until: Callable[[str], Any] = bool
    ) -> subprocess.CompletedProcess[str]:
        """Run it until what it prints satisfies `until`, then press Ctrl-C."""
        environment = self.environment(env)

        def run(output: IO[bytes]) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                argv, cwd=self.stack.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

        return self._interrupted(argv, run, until)

    def _interrupted(
        self,
        argv: Sequence[str],
        run: Callable[[IO[bytes]], subprocess.Popen[bytes] | Fork],
        until: Callable[[str], Any],
    ) -> subprocess.CompletedProcess[str]:
        log = self.stack.folder / f"output-{secrets.token_hex(4)}.txt"
        with log.open("wb") as output:
            process = run(output)
        try:
            wait_for(lambda: process.poll() is not None or until(log.read_text()), seconds=WAIT_SECONDS)
            process.send_signal(signal.SIGINT)
            code = process.wait(WAIT_SECONDS)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(argv, code, log.read_text(), "")

    def python(self, program: str) -> subprocess.CompletedProcess[str]:
        """Run a block of Python as the body of a coroutine, until it ends or has printed a line."""
        token = sign(self.described.jwt_secret, "default", "alice", 3600)
        lines = [
            "import asyncio, contextlib",
            f"token = {token!r}",
            "fetch_token = lambda: token",
            "show = print",
            "async def block():",
            textwrap.indent(self.stood_in(program), "    "),
            "with contextlib.suppress(KeyboardInterrupt):",
            "    asyncio.run(block())",
        ]
        path = self.stack.folder / f"block-{secrets.token_hex(4)}.py"
        path.write_text("\n".join(lines))
        env = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        return self.interrupted([sys.executable, str(path)], env=env)


@contextlib.contextmanager
def manual(folder: Path) -> Iterator[Manual]:
    """A running stack with traffic; traffic that broke meanwhile fails whoever used it."""
    stack = Stack(folder)
    stack.start()
    try:
        traffic = Traffic(stack.describe())
        traffic.start()
        reader = Manual(stack, stack.describe(), traffic)
        wait_for(
            lambda: reader.tried("prove", FIRST_EVENT, "--user", "alice").returncode == 0, seconds=WAIT_SECONDS
        )  # projections have begun
        yield reader
        traffic.stop()
    finally:
        stack.close()
