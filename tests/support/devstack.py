"""A `seamark dev` as a newcomer runs it: a process in a folder of its own."""

import json
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from ops.cli.target import DevFile, read_dev_file
from ops.dev.child import free_port
from tests.support.commands import ENV, seamark, started
from tests.support.forks import Fork
from tests.support.waiting import wait_for

READY_SECONDS_MAX = 120


class Stack:
    """A `seamark dev` in a folder of its own, called by the relative name that its output suggests."""

    def __init__(self, folder: Path, data: str = ".seamark", **env: str) -> None:
        self.folder = folder
        self.data = folder / data
        # Two stacks that look at the same moment would both find the usual port free, and share it.
        self.words = ["--port", str(free_port()), *([] if data == ".seamark" else ["--folder", data])]
        self.output = folder / "output.txt"
        self.settings = env
        self.env = ENV | env
        self.process: Fork | None = None

    def start(self) -> None:
        """Returns when it can be used."""
        self.spawn()
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def spawn(self) -> None:
        """Returns at once."""
        (self.data / "dev.json").unlink(missing_ok=True)
        with self.output.open("wb") as output:
            self.process = started("dev", *self.words, folder=self.folder, output=output, env=self.env)

    def _wait_until_ready(self) -> None:
        process, dev_json = self.process, self.data / "dev.json"
        assert process is not None

        def ready() -> bool:
            assert process.poll() is None, self.output.read_text()
            return dev_json.exists() and "Ctrl-C stops everything" in self.output.read_text()

        wait_for(ready, seconds=READY_SECONDS_MAX, said=self.output.read_text)

    def describe(self) -> DevFile:
        return read_dev_file(self.data)

    def served(self, method: str, path: str, body: Any = None, *, key: str | None = None) -> tuple[int, Any]:
        """What the gateway answers a service that has this key; the developer's where none is given."""
        described = self.describe()
        headers = {"Authorization": f"Bearer {key or described.api_key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        url = f"{described.gateway_url}{urllib.parse.quote(path, safe='/?=&')}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data=data, headers=headers, method=method), timeout=60
            ) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            return refused.code, json.load(refused)

    def run(self, *words: str, timeout: float = 60) -> str:
        done = seamark(*words, folder=self.folder, timeout_seconds=timeout, **self.settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *words: str) -> str:
        """What a command says on standard error, however it ends; its standard input is empty."""
        return seamark(*words, folder=self.folder, timeout_seconds=60, **self.settings).stderr

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def child(self, what: str) -> psutil.Process:
        """The server or role of this name, once there is exactly one. Others begin and end while they are looked at."""

        def is_it(child: psutil.Process) -> bool:
            try:
                return Path(child.exe()).name.startswith(what) or what in child.cmdline()
            except psutil.Error:  # it has just ended
                return False

        def one() -> psutil.Process | None:
            found = [child for child in psutil.Process(self.pid).children() if is_it(child)]
            return found[0] if len(found) == 1 else None

        return wait_for(one, said=self.output.read_text)

    def stop(self) -> list[psutil.Process]:
        """Ctrl-C; the processes that were there before it."""
        assert self.process is not None
        family = self.children()
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(120) == 0, self.output.read_text()
        finally:
            self.close()
        return family

    def close(self) -> None:
        """End it if it still runs, whatever happened: in good order if it can, and its servers with it."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
