"""What checks of commands have in common: their names, a second process of a role, answers as JSON."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ops.dev.child import free_port
from tests.support.commands import started
from tests.support.manual import Manual
from tests.support.waiting import wait_for

Check = Callable[[Manual, Path], None]
CHECKS: Final[dict[str, Check]] = {}


def checks(name: str) -> Callable[[Check], Check]:
    """This function is what `seamark <name>` is held against."""

    def kept(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return kept


def lines(output: str) -> list[Any]:
    return [json.loads(line) for line in output.splitlines()]


def answered(url: str, token: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a request with a bearer's token."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


@contextmanager
def role(reader: Manual, name: str, **env: str) -> Iterator[str]:
    """One more process of a role beside the stack's own; its health address. It must end in good order when asked to."""
    # A gateway has a process per core, and each has a port behind this one.
    health, stack = free_port(row=1 + (os.cpu_count() or 1)), reader.described
    settings = {
        "SEAMARK_PROFILE": "dev",
        "SEAMARK_NATS_URL": stack.nats_url,
        "SEAMARK_REDIS_URL": stack.redis_url,
        "SEAMARK_POSTGRES_URL": stack.postgres_url,
        "SEAMARK_JWT_SECRET": stack.jwt_secret,
        "SEAMARK_HEALTH_PORT": str(health),
    }
    log = reader.stack.folder / f"second-{name}.log"
    with log.open("wb") as output:
        process = started(name, folder=reader.stack.folder, output=output, env=reader.environment({**settings, **env}))
    try:
        address = f"http://127.0.0.1:{health}"
        wait_for(lambda: process.poll() is not None or status_of(f"{address}/readyz") == 200)
        assert process.poll() is None, log.read_text()
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return int(answer.status)
    except OSError:
        return 0


def records(reader: Manual, user: str, *options: str) -> list[dict[str, Any]]:
    return [line["record"] for line in lines(reader.seamark("log", user, *options, "--json"))]
