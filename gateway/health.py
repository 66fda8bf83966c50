"""`/healthz`: the process is alive. `/readyz`: it can serve, so a load balancer may send it clients."""

from __future__ import annotations

from aiohttp import web

from gateway.context import CONTEXT, Context


def not_ready(context: Context) -> list[str]:
    """Why this process cannot serve; empty when it can. Redis and PostgreSQL are not asked: sessions go on without them."""
    reasons = []
    if context.draining:
        reasons.append("draining")
    reasons += context.broker_health.not_ready()
    if context.descriptors.exhausted:
        reasons.append("out of file descriptors")
    unknown = [partition.stream for partition in context.partitions if partition.watch.last is None]
    if unknown:
        reasons.append(f"no answer yet from the leader of {', '.join(unknown)}")
    return reasons


async def healthz(_: web.Request) -> web.Response:
    """200 as long as the loop turns: losing a store must not restart the process."""
    return web.json_response({"status": "alive"})


async def readyz(request: web.Request) -> web.Response:
    """200 or 503 with the reasons."""
    reasons = not_ready(request.app[CONTEXT])
    return web.json_response({"status": "ready" if not reasons else "not ready", "reasons": reasons},
                             status=503 if reasons else 200)  # fmt: skip
