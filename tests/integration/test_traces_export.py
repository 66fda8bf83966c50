"""Spans reach a collector over both of its protocols, and one that is away holds nobody up."""

import asyncio
import concurrent.futures
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from ops.dev.child import free_port
from ops.dev.spans import Span, spans_of
from ops.exitcode import MISCONFIGURED
from tests.support.forks import ROOT
from tests.support.logs import eventually
from tests.support.traces import collected

PROGRAM = """
import sys
from engine.settings import load_settings
from engine.traces import names
from engine.traces.export import exporting
from engine.traces.hopspans import HopSpan
from engine.traces.spans import active
from engine.telemetry import identity_of
del HopSpan.dropped_events  # OpenTelemetry's own encoder needs it, ours does not
with exporting(load_settings(), identity_of("test")) as spans:
    assert active() is spans
    for _ in range(int(sys.argv[1])):
        spans.begin_apart(names.RESUME, (), {names.OUTCOME: "resumed"}).end()
assert active() is None
"""


def run(endpoint: str, spans: int = 3, **env: str) -> "subprocess.CompletedProcess[str]":
    """A process that makes so many spans and ends."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(spans)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SEAMARK_TRACES_ENDPOINT": endpoint, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def collector() -> Iterator[tuple[str, "queue.Queue[Span]"]]:
    """A collector that speaks gRPC."""
    came: queue.Queue[Span] = queue.Queue()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
            for span in spans_of(request):
                came.put(span)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", came
    finally:
        server.stop(None).wait(10)


def test_a_collector_over_grpc_gets_every_span_with_who_made_it(collector: tuple[str, "queue.Queue[Span]"]) -> None:
    url, came = collector
    done = run(url)
    assert done.returncode == 0, done.stderr
    found = [came.get(timeout=20) for _ in range(3)]
    assert came.empty()
    assert {(span.name, span.service) for span in found} == {("resume log.{partition}.{tenant}.{user}", "seamark-test")}
    assert all(span.instance.rpartition("-")[2].isdigit() for span in found)


async def test_a_collector_over_http_gets_every_span_however_it_is_packed() -> None:
    async with collected() as traces:
        for packing in ("none", "gzip"):
            done = await asyncio.to_thread(run, traces.url, 700, OTEL_EXPORTER_OTLP_TRACES_COMPRESSION=packing)
            assert done.returncode == 0, done.stderr
        await eventually(lambda: len(traces.all()) == 1400, seconds=20)


def test_a_collector_that_is_away_costs_spans_and_nothing_else() -> None:
    done = run(f"http://127.0.0.1:{free_port()}", 5_000)
    assert done.returncode == 0, done.stderr


def test_a_role_without_an_exporter_names_what_to_install() -> None:
    program = """
import sys
sys.modules["opentelemetry.exporter"] = None
from ops.cli import main
sys.argv = ["seamark", "pager"]
main()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SEAMARK_TRACES_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == MISCONFIGURED, done.stderr
    assert "seamark-server[traces]" in done.stdout
