"""`/healthz`: the process is alive. `/readyz`: it can serve, so a load balancer may send it clients."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web

from gateway.context import Context
from gateway.http.endpoint import Call, Endpoint


def not_ready(context: Context) -> list[str]:
    """Why this process cannot serve; empty when it can. Redis and PostgreSQL are not asked: sessions go on without them."""
    reasons = []
    if context.draining:
        reasons.append("draining")
    reasons += context.broker_health.not_ready()
    reasons += context.controls.not_ready()
    reasons += context.sign_outs.not_ready()
    if context.descriptors.exhausted:
        reasons.append("out of file descriptors")
    unknown = [partition.stream for partition in context.partitions if partition.watch.last is None]
    if unknown:
        reasons.append(f"no answer yet from the leader of {', '.join(unknown)}")
    return reasons


class Health(msgspec.Struct, omit_defaults=True):
    """`reasons`: why this process is not ready."""

    status: str
    reasons: list[str] | None = None


@Endpoint("GET", "/healthz")
async def healthz(call: Call[None, None, None]) -> Health:
    """Whether the process is alive: its loop turns. Losing a store must not restart it."""
    return Health("alive")


@Endpoint("GET", "/readyz", also=(503,))
async def readyz(call: Call[None, None, None]) -> Annotated[web.Response, Health]:
    """Whether the process can serve, so that a load balancer may send it clients; 503 with the reasons if it cannot."""
    reasons = not_ready(call.context)
    said = Health("not ready" if reasons else "ready", reasons)
    return web.Response(status=503 if reasons else 200, body=msgspec.json.encode(said), content_type="application/json")
