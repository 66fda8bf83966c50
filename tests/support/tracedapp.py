"""An application that has set up OpenTelemetry, as a process: `python -m tests.support.tracedapp '{…}'` publishes or follows.

It prints one JSON line for each thing it was told: what it has published, or the records it got.
"""

import asyncio
import json
import sys
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from seamark import Publisher, connect


async def publish(way: dict[str, str], events: list[dict[str, Any]]) -> None:
    async with Publisher(**way) as publisher:
        for event in events:
            with trace.get_tracer("shop").start_as_current_span("order"):
                await publisher.publish(**event)
                context = trace.get_current_span().get_span_context()
                print(json.dumps({"trace_id": f"{context.trace_id:032x}"}), flush=True)


async def follow(url: str, token: str, device: str, records: int, cursor: str | None, *, read: bool) -> None:
    async with connect(url, token=token, device=device, cursor=cursor) as connection:
        print(json.dumps({"begun": True}), flush=True)
        got = 0
        async for record in connection:
            if record.kind == "notification":
                got += 1
                print(json.dumps({"id": record.id, "cursor": record.cursor}), flush=True)
            if got == records:
                record.ack()
                if read:
                    await connection.read(ids=[record.id])
                    async for mark in connection:
                        if mark.kind == "read":
                            mark.ack()
                            break
                break


def main(given: dict[str, Any]) -> None:
    provider = TracerProvider(
        ALWAYS_ON if given.get("sampled", True) else ALWAYS_OFF,
        Resource.create({"service.name": given["service"]}),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{given['traces']}/v1/traces")))
    trace.set_tracer_provider(provider)
    asyncio.run(publish(**given["publish"]) if "publish" in given else follow(**given["follow"]))
    provider.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
