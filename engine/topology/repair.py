"""Repair: look, decide, and set the positions of dispatchers that an operator names, with nobody dispatching meanwhile.

`prepare` gives a plan, an operator reads its lines, `apply` carries it out, both on a connection of the provisioner's.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

from redis.asyncio import Redis

from engine.broker.jetstream import Broker
from engine.dispatch.source import EVENTS, LATER, SOURCES, EventSource
from engine.errors import ApiError, TopologyError
from engine.log.incarnations import is_younger, stream_of
from engine.log.writer import read_mark
from engine.planner import position
from engine.topology import repair_plan
from engine.topology import server as topology
from engine.topology.plan import Plan, Step
from engine.topology.repair_plan import Found, Positions
from seamark.protocol.subjects import EVENTS_STREAM, JOBS_STREAM, log_stream

STOPPED_WAIT_SECONDS: Final = 10.0
"""A stopped dispatcher's pulls end within 2.5 s and its pin within 5 s (`priority_timeout`)."""

REDIS_SECONDS: Final = 10.0
PAGE_CLAIMS: Final = 500

# Only what was found is removed: a claim taken anew since then is somebody's.
_FORGET: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end"


async def examine(broker: Broker, source: EventSource = EVENTS) -> Found:
    """Epochs and every mark of a source, as the leaders have them now; of EVENTS also those of the planners.

    Raises:
        TopologyError: the source or a LOG is missing, or does not say how many partitions there are.
    """
    partitions = (await stream_of(broker, EVENTS_STREAM)).partitions
    if partitions is None:
        raise TopologyError("EVENTS does not say how many partitions it has", "Run seamark topology apply first.")
    logs = {p: await stream_of(broker, log_stream(p)) for p in range(partitions)}
    places = source.places(partitions)
    marks = {(place, q): await read_mark(broker, source.marked(place, q)) for place in places for q in logs}
    planned = {p: await read_mark(broker, position.marked(p)) for p in logs} if source == EVENTS else {}
    recorded, revision = await topology.read_epochs(broker)
    # The source after the marks: a dispatcher at work would be ahead of what was read before.
    found = Found(await stream_of(broker, source.stream), logs, marks, recorded or {}, revision, source=source)
    found = replace(found, later=await stream_of(broker, LATER.stream))
    if planned:
        found = replace(found, jobs=await stream_of(broker, JOBS_STREAM), planned=planned)
    known = {pair: mark.seq for pair in marks if (mark := found.known(*pair)) is not None}
    return replace(
        found,
        late=frozenset([pair for pair, seq in known.items() if await is_younger(broker, source.marked(*pair), seq)]),
    )


async def prepare(broker: Broker, positions: Mapping[str, Positions], *, forget_claims: bool = False) -> Plan:
    """What a repair would do; changes nothing.

    Args:
        positions: see `parse_positions`.
        forget_claims: whether claims of other incarnations of the sources go: the logs are lost too, and services publish anew.
    """
    founds = [await examine(broker, source) for source in SOURCES]
    plan = repair_plan.decide(founds, positions, f"repair-{secrets.token_hex(4)}")
    if not forget_claims:
        return plan
    present = {found.events.name: found.events.epoch for found in founds}
    named = " and ".join(f"{name} {epoch}" for name, epoch in present.items())
    why = (f"all but those that events of {named} hold",)
    return replace(plan, steps=(Step("forget_claims", "claims", why, {"epochs": [*present.values()]}), *plan.steps))


async def apply(
    broker: Broker, plan: Plan, redis: Redis | None = None, *, wait_seconds: float = STOPPED_WAIT_SECONDS
) -> list[str]:
    """Carry out a plan; returns one line for each thing done. Safe to plan and apply again after a failure.

    Claims go first, then foreign marks, home marks, and the recorded epochs last: a dispatcher that starts too early finds what
    it found before, and refuses.

    Args:
        redis: where claims are; needed only to forget some.
        wait_seconds: how long dispatchers that were just stopped may take to disappear.

    Raises:
        TopologyError: the plan holds a refusal, dispatchers are running, or something moved since the plan was made.
        RedisError, TimeoutError: Redis does not answer; no mark is written then.
    """
    if plan.refusals:
        return await topology.apply(broker, plan)
    await check_stopped(broker, wait_seconds=wait_seconds)
    forget = [step for step in plan.steps if step.action == "forget_claims"]
    if forget and redis is None:
        raise TopologyError("claims cannot be forgotten without Redis", "Name it.")
    removed = [await _forget_claims(cast(Redis, redis), step.config["epochs"]) for step in forget]
    rest = replace(plan, steps=tuple(step for step in plan.steps if step not in forget))
    return [f"~ {count} claim(s) removed" for count in removed] + await topology.apply(broker, rest)


async def check_stopped(broker: Broker, *, wait_seconds: float = STOPPED_WAIT_SECONDS) -> None:
    """Returns once nobody reads any event partition.

    Raises:
        TopologyError: after `wait_seconds` somebody still does.
    """
    count = (await stream_of(broker, EVENTS_STREAM)).partitions or 0
    names = [f"{each.stream}.{each.partition(q).consumer}" for each in SOURCES for q in range(count)]
    deadline = time.monotonic() + wait_seconds
    while busy := [name for name in names if await _is_read(broker, name)]:
        if time.monotonic() > deadline:
            raise TopologyError(f"dispatchers are running: {', '.join(busy)} are being read", "Stop them, then repair.")
        await asyncio.sleep(0.25)


async def _is_read(broker: Broker, consumer: str) -> bool:
    try:
        info = await broker.api(f"CONSUMER.INFO.{consumer}")
    except ApiError as error:
        if error.code == 404:
            return False
        raise
    pinned = any(group.get("pinned_client_id") for group in info.get("priority_groups") or [])
    return pinned or bool(info.get("num_waiting"))


async def _forget_claims(redis: Redis, epochs: Sequence[str]) -> int:
    """Remove the claims of all incarnations of sources but `epochs`; returns how many."""
    kept = tuple(f"{epoch}.".encode() for epoch in epochs)
    cursor, removed = 0, 0
    while True:
        async with asyncio.timeout(REDIS_SECONDS):
            cursor, keys = cast(Any, await redis.scan(cursor, match="claim:{*", count=PAGE_CLAIMS))
            # One command per key: on a Redis cluster a multi-key command could not cross tenants.
            pipeline = redis.pipeline(transaction=False)
            for key in keys:
                pipeline.get(key)
            holders = await pipeline.execute()
            for key, holder in zip(keys, holders, strict=True):
                if holder and not holder.startswith(kept):
                    removed += int(await cast(Any, redis.eval(_FORGET, 1, key, holder)))
        if not int(cursor):
            return removed
