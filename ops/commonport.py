"""One health port for processes that do the same work side by side: it asks each of them at the port it has of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Final

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from engine.errors import InvalidSetting
from engine.settings import PORT_MAX, Settings
from ops.addedup import AddedUp
from ops.healthport import health_port

ANSWER_SECONDS: Final = 2.0
"""How long a process may take to answer: probes of `/readyz` wait for 3 s, Prometheus for 10 s. All are asked at once."""


DEAD_SECONDS: Final = 90.0
"""How long a process may give no sign of life. One that has ended is replaced after 30 s at most, and then has to start. Nobody
replaces one that hangs, and clients that the system gives it wait."""


@contextlib.contextmanager
def common_port(settings: Settings, count: int) -> Iterator[Sequence[int]]:
    """Answer for `count` processes, in a thread, for as long as the block runs; gives the ports they are to have of their own.

    The health port that is set is the common one, and the ports behind it are theirs. 0: each has one that the system
    chooses, and there is no common one.

    `/readyz` is 200 while one of them is ready, `/healthz` while one is alive and none has been dead for `DEAD_SECONDS`. Both
    name the others. `/metrics` adds them up.

    Raises:
        InvalidSetting: somebody listens on the common port, or too few ports follow it.
    """
    common = settings.health_port
    if common == 0:
        yield [0] * count
        return
    if common + count > PORT_MAX:
        raise InvalidSetting(
            f"SEAMARK_HEALTH_PORT: {count} processes take {count + 1} ports in a row: choose a lower one"
        )
    ports = range(common + 1, common + 1 + count)
    with _serving(settings, ports):
        yield ports


@contextlib.contextmanager
def _serving(settings: Settings, ports: Sequence[int]) -> Iterator[None]:
    started: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        common, stop = _Common(settings.health_host, ports), asyncio.Event()
        try:
            async with common.http, health_port(settings, common.healthz, common.readyz, common.metrics):
                started.set_result(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))
                await stop.wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="common-port", daemon=True)
    thread.start()
    end = started.result()
    try:
        yield
    finally:
        end()
        thread.join(ANSWER_SECONDS)


class _Common:
    """What the port says. To be made in the loop that serves it."""

    def __init__(self, host: str, ports: Sequence[int], now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._dead_since: dict[int, float] = {}
        self._addresses = [URL.build(scheme="http", host=host, port=port) for port in ports]
        self._added = AddedUp()
        self._asking = asyncio.Lock()
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_SECONDS))

    async def healthz(self, _: web.Request) -> web.Response:
        """Alive, while one of them is and none has been dead for long: else whoever asks should start all of them anew."""
        said, now = await self._ask("/healthz"), self._now()
        self._dead_since = {number: self._dead_since.get(number, now) for number, text in said.items() if text is None}
        for_long = any(now - since >= DEAD_SECONDS for since in self._dead_since.values())
        return _answer_of(said, "alive", well=not for_long)

    async def readyz(self, _: web.Request) -> web.Response:
        """Ready, while one of them is: connections are given to those that listen."""
        return _answer_of(await self._ask("/readyz"), "ready")

    async def metrics(self, _: web.Request) -> web.Response:
        """The sums. One question at a time: else an older answer could come last, and be taken for one of a new process."""
        async with self._asking:
            said = await self._ask("/metrics")
            self._added.take({
                number: list(text_string_to_metric_families(text)) for number, text in said.items() if text is not None
            })  # fmt: skip
            return web.Response(body=generate_latest(self._added), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _ask(self, path: str) -> dict[int, str | None]:
        """What each process says, by its number; None: nothing, or that it is not well."""
        said = await asyncio.gather(*(self._answer(address.with_path(path)) for address in self._addresses))
        return dict(enumerate(said))

    async def _answer(self, url: URL) -> str | None:
        try:
            async with self.http.get(url) as response:
                return await response.text() if response.status == web.HTTPOk.status_code else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None


def _answer_of(said: Mapping[int, str | None], word: str, *, well: bool = True) -> web.Response:
    """200 while at least one of the processes is `word`, and all is `well` besides. It names the others."""
    reasons = [f"process {number} is not {word}" for number, text in said.items() if text is None]
    good = len(reasons) < len(said) and well
    body = json.dumps({"status": word if good else f"not {word}", "reasons": reasons})
    return web.Response(text=body, content_type="application/json", status=200 if good else 503)
