"""Whether a role can do its work with the broker: connected, and what is written gets stored."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import aiohttp
import structlog

from engine.broker.jetstream import Broker
from engine.limits import MONITOR_SECONDS
from engine.tasks import end

_log = structlog.get_logger("seamark.nats")

_WRITE_ERROR: Final = re.compile(r"stream '(?:[^']*> )?([^'>]+)' write error: (.*)")
REMEDY: Final = "make room, then restart nats-server (docs/operations.md, A full disk)"


class BrokerHealth:
    """What `/readyz` says of the broker.

    A role's own writes show whether the broker stores. A role that writes nothing knows only what the servers say at their
    monitoring addresses.

    Args:
        broker: the role's connection.
        monitor_urls: monitoring addresses of all servers; without them no server is asked.
    """

    def __init__(self, broker: Broker, monitor_urls: Sequence[str] = ()) -> None:
        self._broker = broker
        self._urls = tuple(monitor_urls)
        self._write_errors: dict[str, str | None] = {}

    def not_ready(self) -> list[str]:
        """Why the broker cannot be worked with; empty when it can."""
        if not self._broker.connected:
            return ["not connected to NATS"]
        reasons = [
            f"NATS has stored nothing in {stream} for {seconds:.0f} s: if its disk was full, {REMEDY}"
            for stream, seconds in self._broker.writes.stopped().items()
        ]
        # While one server of a cluster can write, its streams are led there.
        if self._write_errors and all(self._write_errors.values()):
            reasons += [
                f"NATS cannot write {error}: {REMEDY}"
                for error in sorted(set(filter(None, self._write_errors.values())))
            ]
        return reasons

    async def watch(self) -> None:
        """Ask the servers every few seconds, for ever. Ends by cancellation."""
        timeout = aiohttp.ClientTimeout(total=MONITOR_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                answers = await asyncio.gather(*(_healthz(http, url) for url in self._urls))
                self._note(dict(zip(self._urls, answers, strict=True)))
                await asyncio.sleep(MONITOR_SECONDS)

    def _note(self, answers: Mapping[str, Mapping[str, Any] | None]) -> None:
        found = {url: write_error(answer) for url, answer in answers.items() if answer is not None}
        for url, error in found.items():
            if error and not self._write_errors.get(url):
                _log.error("broker_cannot_write", server=url, why=error, remedy=REMEDY)
        self._write_errors = found


@contextlib.asynccontextmanager
async def watched(broker: Broker, monitor_urls: Sequence[str] = ()) -> AsyncIterator[BrokerHealth]:
    """The health of a broker, watched until the block ends."""
    health = BrokerHealth(broker, monitor_urls)
    if not monitor_urls:
        yield health
        return
    task = asyncio.create_task(health.watch(), name="broker-health")
    try:
        yield health
    finally:
        await end(task)


def write_error(healthz: Mapping[str, Any]) -> str | None:
    """What a server's `/healthz` says it cannot write, such as `EVENTS (no space left on device)`; None when it can.

    The path of the file is left out: whoever reads `/readyz` has no business with it.
    """
    found = _WRITE_ERROR.search(str(healthz.get("error", "")))
    return f"{found[1]} ({found[2].rpartition(': ')[2]})" if found else None


async def _healthz(http: aiohttp.ClientSession, url: str) -> dict[str, Any] | None:
    try:
        async with http.get(f"{url.rstrip('/')}/healthz") as reply:
            answer = await reply.json(content_type=None)
            return answer if isinstance(answer, dict) else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
