"""A real headless Chromium, driven by the DevTools protocol over one WebSocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_SECONDS = 60.0
CALL_SECONDS = 60.0
UNTIL_SECONDS = 60.0
"""What these wait for comes within milliseconds, unless the machine stands still."""

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--disable-extensions",
    "--disable-features=Translate,OptimizationHints,MediaRouter",
    # Timers of a tab behind another one run on time.
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--metrics-recording-only",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",
    "--password-store=basic",
    "--use-mock-keychain",
    "--window-size=1280,860",
)


class JavaScriptError(AssertionError):
    """An expression threw in the page."""


class Chromium:
    """A running browser. Pages opened in one `context` share storage, as tabs do; other contexts share nothing.

    Starting a browser takes longer than most tests with it, so tests share one, each in contexts of its own.
    """

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._ws = ws
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._contexts: list[str] = []
        self._reader = asyncio.create_task(self._read(), name="chromium-reader")

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command of the protocol, by its name and parameters."""
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        await self._ws.send_json(message)
        async with asyncio.timeout(CALL_SECONDS):
            answer = await future
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    async def open(self, url: str, *, context: str | None = None) -> Page:
        """A new tab that has loaded `url`, in the first context unless another is named."""
        where = context or (self._contexts[0] if self._contexts else await self.new_context())
        target = (await self.call("Target.createTarget", url="about:blank", browserContextId=where))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            await page.call(f"{domain}.enable")
        await page.call("Page.setLifecycleEventsEnabled", enabled=True)
        await page.goto(url)
        return page

    async def new_context(self) -> str:
        """An empty profile of its own: another person's browser."""
        self._contexts.append((await self.call("Target.createBrowserContext"))["browserContextId"])
        return self._contexts[-1]

    async def _read(self) -> None:
        async for message in self._ws:
            frame = json.loads(message.data)
            if "id" in frame:
                future = self._waiting.pop(frame["id"], None)
                if future is not None and not future.done():
                    future.set_result(frame)
            elif (page := self._pages.get(frame.get("sessionId", ""))) is not None:
                page.note(frame["method"], frame["params"])

    async def close(self) -> None:
        """Close what was opened; the browser goes on."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError, RuntimeError):
            for context in self._contexts:
                await self.call("Target.disposeBrowserContext", browserContextId=context)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self.target = target
        self.errors: list[str] = []
        """What the page threw, and what the browser refused it (for example by its security policy)."""
        self.sent: list[str] = []
        """What the page has written into WebSockets, since it was opened."""
        self._loaded: set[str] = set()
        """The documents that have loaded, by the ids of their loaders: the empty one of a new tab is among them."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command for this tab."""
        return await self._browser.call(method, self._session, **params)

    def note(self, method: str, params: dict[str, Any]) -> None:
        """An event of this tab."""
        if method == "Page.lifecycleEvent":
            if params["name"] == "load" and params["frameId"] == self.target:
                self._loaded.add(params["loaderId"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Network.webSocketFrameSent":
            self.sent.append(params["response"]["payloadData"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            if entry["source"] != "network":  # a connection that a test cuts is no fault of the page
                self.errors.append(f"{entry['source']}: {entry['text']}")

    async def goto(self, url: str) -> None:
        """Load `url` and wait until it has loaded."""
        loader = (await self.call("Page.navigate", url=url))["loaderId"]
        await self._until_loaded(lambda: loader in self._loaded)

    async def _until_loaded(self, has_loaded: Callable[[], bool]) -> None:
        async with asyncio.timeout(CALL_SECONDS):
            while not has_loaded():
                await asyncio.sleep(0.01)

    async def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; promises are awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise JavaScriptError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = UNTIL_SECONDS) -> Any:
        """Poll until `expression` is truthy, and give its value. The page may go to another address meanwhile."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            is_over = asyncio.get_running_loop().time() > deadline
            try:
                value = await self.evaluate(expression)
            except RuntimeError:  # the document in which this was to be evaluated is gone
                if is_over:
                    raise
                value = None
            if value:
                return value
            if is_over:
                shown = await self.evaluate("document.body.innerText.slice(0, 1500)")
                raise AssertionError(f"not within {seconds:g} s: {expression}\n--- the page shows ---\n{shown}")
            await asyncio.sleep(0.03)

    async def click(self, selector: str) -> None:
        """Click the element as its handlers see it; fails when it is absent or disabled."""
        await self.evaluate(
            f"""(() => {{
              const element = document.querySelector({json.dumps(selector)});
              if (!element) throw new Error("nothing matches " + {json.dumps(selector)});
              if (element.disabled) throw new Error({json.dumps(selector)} + " is disabled");
              element.click();
            }})()"""
        )

    async def fill(self, selector: str, text: str) -> None:
        """Put `text` into a field."""
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).value = {json.dumps(text)}")

    async def reload(self) -> None:
        """As with F5."""
        before = len(self._loaded)
        await self.call("Page.reload")
        await self._until_loaded(lambda: len(self._loaded) > before)

    async def block(self, *patterns: str) -> None:
        """Refuse this tab's requests to addresses that match; none lifts it."""
        await self.call("Network.setBlockedURLs", urls=list(patterns))

    async def dark(self, on: bool) -> None:
        """Prefer a dark colour scheme, or a light one."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def size(self, width: int, height: int) -> None:
        """Set the size of the view in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        picture = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def chromium_process(folder: Path) -> Iterator[str]:
    """A browser at work in `folder`; the address of its protocol. Skips where none is installed; in CI a skip fails the run."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: install the package `chromium`")
    profile, log = folder / "profile", folder / "chromium.log"
    profile.mkdir(parents=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "HOME": str(folder)},
        )
    try:
        yield _address(profile / "DevToolsActivePort", process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            # Its own session and so its own group: renderers and helpers go with it.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address(port_file: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the browser speaks its protocol, once it has written that down."""
    deadline = time.monotonic() + START_SECONDS
    while not (port_file.exists() and len(lines := port_file.read_text().split()) == 2):
        assert process.poll() is None, f"Chromium ended with {process.returncode}: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"no Chromium after {START_SECONDS:g} s: {log.read_text()[-2000:]}"
        time.sleep(0.05)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"


@asynccontextmanager
async def chromium(address: str) -> AsyncIterator[Chromium]:
    """The browser that speaks at `address`, with profiles that nobody has seen before and that are gone afterwards."""
    async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as ws:
        browser = Chromium(ws)
        try:
            yield browser
        finally:
            await browser.close()
