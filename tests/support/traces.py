"""Spans for tests: what a receiver got from real processes, and how they hang together."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from ops.dev import traces as dev_traces
from ops.dev.spans import Span, SpanStore, decode
from ops.dev.traces import receiving
from tests.support.forks import ROOT
from tests.support.logs import eventually


@dataclass
class Traces:
    """What came to the receiver at `url`."""

    url: str
    store: SpanStore
    bodies: list[bytes] = field(default_factory=list)
    """All that was sent, as it came: a receiver keeps no events, descriptions of a status or states."""

    def spans(self, trace_id: str) -> list[Span]:
        return self.store.trace(trace_id)

    def all(self) -> list[Span]:
        return [span for spans in self.store._traces.values() for span in spans]

    async def until(self, trace_id: str, names: Iterable[str]) -> list[Span]:
        """The spans of a trace once there is one of each name; AssertionError with those that came."""
        wanted = set(names)

        def missing() -> set[str]:
            return wanted - {span.name for span in self.spans(trace_id)}

        with contextlib.suppress(AssertionError):
            await eventually(lambda: not missing(), seconds=30)
        assert not missing(), f"missing {missing()}; there are {[(s.service, s.name) for s in self.spans(trace_id)]}"
        return self.spans(trace_id)


@contextlib.asynccontextmanager
async def collected() -> AsyncIterator[Traces]:
    """A receiver at work."""
    store, bodies = SpanStore(), list[bytes]()

    def kept(body: bytes) -> list[Span]:
        bodies.append(body)
        return decode(body)

    with mock.patch.object(dev_traces, "decode", kept):
        async with receiving("127.0.0.1", 0, store) as url:
            yield Traces(url, store, bodies)


class App:
    """A process of `tests.support.tracedapp`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout is not None
        async with asyncio.timeout(40):
            said = await self._process.stdout.readline()
        assert said, await self.ended()
        found: dict[str, Any] = json.loads(said)
        return found

    async def ended(self) -> str:
        """Wait for its end; what it has said on standard error."""
        async with asyncio.timeout(40):
            _, errors = await self._process.communicate()
        return errors.decode()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


@contextlib.asynccontextmanager
async def app(**given: Any) -> AsyncIterator[App]:
    """An application of its own, see `tests.support.tracedapp`; it has ended without an error when the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.tracedapp", json.dumps(given),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    running = App(process)
    try:
        yield running
        said = await running.ended()
        assert process.returncode == 0, said
    finally:
        running.kill()


def logs(folder: Path) -> str:
    """All that the roles have logged."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))


def only(spans: Iterable[Span], which: Callable[[Span], bool]) -> Span:
    """The one span that is meant."""
    found = [span for span in spans if which(span)]
    assert len(found) == 1, [(span.service, span.name) for span in found]
    return found[0]
