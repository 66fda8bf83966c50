"""A gateway as a process of its own, for tests that measure it or kill it: `python -m tests.support.gatewayprocess '{…}'`.

Prints one line `{"port": …}` once it takes clients; SIGTERM drains it.
"""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import uvloop

from engine.broker.jetstream import NatsSettings
from gateway import collector
from gateway.options import GatewayOptions, Times
from gateway.server import run
from ops.dev.child import READY_SECONDS_MAX
from seamark.protocol.logins import inbox_prefix_of

ROOT = Path(__file__).parents[2]


async def main(given: dict[str, Any]) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    url = given.pop("nats_url")
    nats = NatsSettings(url, inbox_prefix=inbox_prefix_of(url))
    options = GatewayOptions(nats=nats, times=Times(**given.pop("times", {})), **given.pop("options", {}))
    collector.tune()
    await run(
        options,
        stop=stop,
        port=given.get("port", 0),
        reuse_port=given.get("reuse_port", False),
        started=lambda port, _: print(json.dumps({"port": port}), flush=True),
    )


class GatewayProcess:
    """A started process and the port it listens on."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        given_up = threading.Timer(READY_SECONDS_MAX, process.kill)
        given_up.start()
        try:
            line = next((line for line in process.stdout if line.startswith("{")), None)
        finally:
            given_up.cancel()
        assert line is not None, f"the gateway did not start: {process.wait()}"
        self.port: int = json.loads(line)["port"]

    def rss_bytes(self) -> int:
        """Resident memory now."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * 4096

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100


@contextmanager
def gateway_process(nats_url: str, log: Path, **given: Any) -> Iterator[GatewayProcess]:
    """A gateway process, killed at the end. Its log goes to `log`."""
    command = [sys.executable, "-m", "tests.support.gatewayprocess", json.dumps({"nats_url": nats_url, **given})]
    with log.open("a") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield GatewayProcess(process)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1])))
