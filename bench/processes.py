"""Child processes of a benchmark. Workers speak JSON lines: commands on stdin, facts on stdout."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from ops.dev.child import death_signal_setter

LINE_BYTES_MAX = 64 << 20
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05


class WorkerFailed(RuntimeError):
    """A child process ended, or did not say in time what was expected of it."""


class Worker:
    """One child process; its facts are read as they come, its stderr goes to a file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        return [self.pid]

    async def until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Returns once `ready()`.

        Raises:
            WorkerFailed: not within `seconds`, or the process has ended.
        """
        deadline = time.monotonic() + seconds
        while not await asyncio.to_thread(ready):
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise WorkerFailed(f"{self.name} is not ready (exit code {self._process.returncode})\n{self._tail()}")
            await asyncio.sleep(POLL_SECONDS)

    async def fact(self, kind: str, seconds: float) -> dict[str, Any]:
        """The next fact of this kind; others before it are passed over.

        Raises:
            WorkerFailed: not within `seconds`, or the process has ended.
        """
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                while line := await self._process.stdout.readline():
                    found: dict[str, Any] = json.loads(line)
                    if found.get("fact") == kind:
                        return found
        except TimeoutError as error:
            raise WorkerFailed(f"{self.name}: no `{kind}` within {seconds:.0f} s\n{self._tail()}") from error
        raise WorkerFailed(f"{self.name} ended before it said `{kind}`\n{self._tail()}")

    async def command(self, do: str, **fields: Any) -> None:
        """Give an order; a worker that has ended is noticed when its next fact is waited for."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            await self._process.stdin.drain()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL when that is not enough."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _tail(self) -> str:
        try:
            return self._log.read_bytes()[-2_000:].decode(errors="replace")
        except OSError as error:
            return f"(no log: {error})"


@contextlib.asynccontextmanager
async def running(
    name: str, arguments: list[str], log: Path, *, env: Mapping[str, str] | None = None, speaks: bool = True
) -> AsyncIterator[Worker]:
    """`python <arguments>` for as long as the block lasts; it dies with this process, too.

    Args:
        speaks: it tells facts on stdout; otherwise that goes to the log as stderr does.
    """
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if speaks else errors,
            stderr=errors,
            env={**os.environ, **(env or {})},
            limit=LINE_BYTES_MAX,
            start_new_session=True,
            preexec_fn=death_signal_setter(signal.SIGTERM),
        )
    worker = Worker(name, process, log)
    try:
        yield worker
    finally:
        await worker.stop()


def say(fact: str, **fields: Any) -> None:
    """A worker tells its parent a fact."""
    print(json.dumps({"fact": fact, **fields}), flush=True)


async def commands() -> AsyncIterator[dict[str, Any]]:
    """What the parent of this worker orders; ends when the parent closes the pipe."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)
