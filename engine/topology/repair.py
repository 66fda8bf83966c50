"""Repair: look, decide, and set the positions of dispatchers after a restore or a loss, with nobody dispatching meanwhile.

`prepare` gives a plan, an operator reads its lines, `apply` carries it out.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple, cast, get_args

import msgspec
from redis.asyncio import Redis

from engine.broker.jetstream import After, Broker
from engine.dispatch.claims import claim_key
from engine.dispatch.source import EVENTS
from engine.errors import ApiError, TopologyError, Unanswered
from engine.log.incarnations import younger_than_mark
from engine.log.marks import encode_mark
from engine.log.writer import read_mark
from engine.topology import repair_plan
from engine.topology import server as topology
from engine.topology.plan import ObservedStream
from engine.topology.repair_plan import Found, Positions, RepairPlan
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import EVENTS_STREAM, dispatch_consumer, log_stream, parse_stored_event

STOPPED_WAIT_SECONDS: Final = 10.0
"""A stopped dispatcher's pulls end within 2.5 s and its pin within 5 s (`priority_timeout`)."""

STALE_REPLICA_SECONDS: Final = 30.0
"""A replica that lags this long behind its leader is out of order."""

REDIS_SECONDS: Final = 10.0
PAGE_EVENTS: Final = 500
_WRONG_SEQUENCE: Final = frozenset({10071, 10164})

# Only what was found is removed: a claim taken anew since then is somebody's.
_FORGET: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end"

ClaimsRule = Literal["replayed", "all", "none"]
"""Which claims of another incarnation of EVENTS are forgotten.

`replayed`: those held by the very events that will be dispatched again. A restored EVENTS numbers them as before, but
under a new epoch, so they would take themselves for duplicates. `all`: every one, for when the logs are lost too and
services publish anew. `none`: keep them.
"""


def claims_rule(text: str) -> ClaimsRule:
    """The rule of this name.

    Raises:
        TopologyError: there is none.
    """
    for rule in get_args(ClaimsRule):
        if rule == text:
            return cast(ClaimsRule, rule)
    raise TopologyError(f"unknown rule for claims: {text!r}", f"Choose one of {', '.join(get_args(ClaimsRule))}.")


class StaleClaim(NamedTuple):
    """A claim to be removed, if its holder is still this one."""

    key: bytes
    holder: bytes


class _Identity(msgspec.Struct):
    id: str = ""


_decode_identity = msgspec.json.Decoder(_Identity).decode


async def examine(broker: Broker) -> Found:
    """Epochs and every mark, as the leaders have them now.

    Raises:
        TopologyError: EVENTS or a LOG is missing, or does not say how many partitions there are.
        Unavailable, Unanswered: a leader does not answer.
    """
    await _stream(broker, EVENTS_STREAM)
    partitions = (await broker.stream(EVENTS_STREAM)).partitions
    if partitions is None:
        raise TopologyError("EVENTS does not say how many partitions it has", "Run seamark topology apply first.")
    logs = {p: await _stream(broker, log_stream(p)) for p in range(partitions)}
    pairs = [(p, q) for p in range(partitions) for q in range(partitions)]
    marks = dict(zip(pairs, [await read_mark(broker, EVENTS.marked(p, q)) for p, q in pairs], strict=True))
    recorded, revision = await topology.read_epochs(broker)
    # EVENTS after the marks: a dispatcher at work would be ahead of what was read before.
    found = Found(partitions, await _stream(broker, EVENTS_STREAM), logs, marks, recorded or {}, revision)
    covered = {pair: seq for pair in pairs if (seq := found.covered(*pair))}
    late = [pair for pair, seq in covered.items() if await younger_than_mark(broker, EVENTS.marked(*pair), seq)]
    return replace(found, late=frozenset(late))


async def prepare(
    broker: Broker, redis: Redis | None, positions: Positions, *, claims: ClaimsRule = "replayed"
) -> RepairPlan:
    """What a repair would do; changes nothing.

    Args:
        broker: a connection that may read every stream (the provisioner's).
        redis: where claims are; None leaves them alone.
        positions: see `parse_positions`.
        claims: which claims are forgotten, see `ClaimsRule`.

    Raises:
        TopologyError, Unavailable, Unanswered: as `examine`. RedisError, TimeoutError: Redis does not answer.
    """
    plan = replace(
        repair_plan.decide(await examine(broker), positions, f"repair-{secrets.token_hex(4)}"), claims=claims
    )
    if plan.refusals or redis is None:
        return plan
    count = 0
    async for _ in _stale_claims(broker, redis, plan):
        count += 1
    return replace(plan, stale_claims=count)


async def apply(
    broker: Broker, redis: Redis | None, plan: RepairPlan, *, wait_seconds: float = STOPPED_WAIT_SECONDS
) -> list[str]:
    """Carry out a plan; returns one line for each thing done. Safe to plan and apply again after a failure.

    Claims go first, then foreign marks, home marks, and the recorded epochs last: a dispatcher that starts too early finds
    what it found before, and refuses.

    Args:
        broker: as for `prepare`.
        redis: as for `prepare`.
        plan: made by `prepare` from what the server holds now.
        wait_seconds: how long dispatchers that were just stopped may take to disappear.

    Raises:
        TopologyError: the plan holds a refusal, dispatchers are running, or something moved since the plan was made.
    """
    if plan.refusals:
        first = plan.refusals[0]
        raise TopologyError(f"{first.target}: {first.detail}", first.remedy)
    await check_stopped(broker, len(plan.next_seqs), wait_seconds=wait_seconds)
    done = []
    if redis is not None and plan.stale_claims:
        removed = 0
        async for claim in _stale_claims(broker, redis, plan):
            removed += await _forget(redis, claim)
        done.append(f"- {removed} claim(s) removed")
    for step in plan.marks:
        try:
            after = After(log_stream(step.partition), step.before.seq)
            await broker.append(step.subject, encode_mark(step.after), after=after)
        except ApiError as error:
            raise _moved(step.subject, error) from error
        done.append(step.line())
    if plan.epochs_after != plan.epochs_before:
        try:
            await topology.write_epochs(broker, plan.epochs_after, plan.revision)
        except ApiError as error:
            raise _moved("the recorded epochs", error) from error
        done.append("~ recorded epochs")
    return done


def _moved(what: str, error: ApiError) -> Exception:
    if error.err_code not in _WRONG_SEQUENCE:
        return error
    return TopologyError(f"{what} moved while this was planned", "Stop the dispatchers and plan again.")


async def check_stopped(broker: Broker, partitions: int, *, wait_seconds: float = STOPPED_WAIT_SECONDS) -> None:
    """Returns once nobody reads any event partition.

    Raises:
        TopologyError: after `wait_seconds` somebody still does.
    """
    deadline = time.monotonic() + wait_seconds
    while busy := [q for q in range(partitions) if await _is_read(broker, q)]:
        if time.monotonic() > deadline:
            names = ", ".join(dispatch_consumer(q) for q in busy)
            raise TopologyError(f"dispatchers are running: {names} are being read", "Stop them, then repair.")
        await asyncio.sleep(0.25)


async def _is_read(broker: Broker, q: int) -> bool:
    try:
        info = await broker.api(f"CONSUMER.INFO.{EVENTS_STREAM}.{dispatch_consumer(q)}")
    except ApiError as error:
        if error.code == 404:
            return False
        raise
    pinned = any(group.get("pinned_client_id") for group in info.get("priority_groups") or [])
    return pinned or bool(info.get("num_waiting"))


async def _stream(broker: Broker, name: str) -> ObservedStream:
    try:
        return topology.observed_stream(await broker.api(f"STREAM.INFO.{name}", timeout_seconds=topology.API_SECONDS))
    except ApiError as error:
        if error.code == 404:
            raise TopologyError(
                f"there is no stream {name}", "Restore it or run seamark topology apply first."
            ) from error
        raise


# --- claims --------------------------------------------------------------------------------------------------------------


async def _stale_claims(broker: Broker, redis: Redis, plan: RepairPlan) -> AsyncIterator[StaleClaim]:
    if plan.claims == "all":
        async for claim in _claims_of_other_epochs(redis, plan.events_epoch):
            yield claim
    elif plan.claims == "replayed":
        for q, next_seq in plan.next_seqs.items() if plan.inherited else ():
            async for claim in _claims_of_replayed(broker, redis, plan, q, next_seq):
                yield claim


async def _claims_of_other_epochs(redis: Redis, epoch: str) -> AsyncIterator[StaleClaim]:
    cursor: Any = 0
    while True:
        async with asyncio.timeout(REDIS_SECONDS):
            cursor, found = await redis.scan(cursor, match="claim:{*", count=PAGE_EVENTS)
            keys = cast(list[bytes], found)
            holders = await _holders(redis, keys)
        for key, holder in zip(keys, holders, strict=True):
            if holder and not holder.startswith(f"{epoch}.".encode()):
                yield StaleClaim(key, holder)
        if not int(cursor):
            return


async def _claims_of_replayed(
    broker: Broker, redis: Redis, plan: RepairPlan, q: int, next_seq: int
) -> AsyncIterator[StaleClaim]:
    """Claims that the events to be dispatched again took themselves, before the restore, under the same number."""
    async for page in _events(broker, q, next_seq):
        async with asyncio.timeout(REDIS_SECONDS):
            holders = await _holders(redis, [key for key, _ in page])
        for (key, seq), holder in zip(page, holders, strict=True):
            own = {f"{epoch}.{seq}".encode() for epoch, shared in plan.inherited.items() if seq <= shared}
            if holder in own:
                yield StaleClaim(key, holder)


async def _events(broker: Broker, q: int, next_seq: int) -> AsyncIterator[list[tuple[bytes, int]]]:
    """Pages of (claim key, sequence) of the events of a partition; what is no event has no claim."""
    subject, seq, deadline = f"ev.{q}.>", next_seq, time.monotonic() + STALE_REPLICA_SECONDS
    while True:
        page = await broker.next_by_subject(EVENTS_STREAM, subject, seq, batch=PAGE_EVENTS, timeout_seconds=10.0)
        if not page.records:
            # Any replica answered; only the leader's word that there is nothing counts.
            if await broker.leader_next(EVENTS_STREAM, subject, seq) is None:
                return
            if time.monotonic() > deadline:
                raise Unanswered(f"no replica of EVENTS shows event {seq} of partition {q}")
            await asyncio.sleep(0.25)
            continue
        deadline = time.monotonic() + STALE_REPLICA_SECONDS
        keys = []
        for stored in page.records:
            try:
                at = parse_stored_event(stored.subject)
                keys.append((claim_key(at.tenant_token, _decode_identity(stored.payload).id).encode(), stored.seq))
            except (InvalidToken, msgspec.DecodeError):
                continue
        if keys:
            yield keys
        seq = page.records[-1].seq + 1


async def _holders(redis: Redis, keys: list[bytes]) -> list[bytes | None]:
    """One GET per key in one pipeline: on a Redis cluster a multi-key command could not cross tenants."""
    if not keys:
        return []
    pipeline = redis.pipeline(transaction=False)
    for key in keys:
        pipeline.get(key)
    return cast(list[bytes | None], await pipeline.execute())


async def _forget(redis: Redis, claim: StaleClaim) -> int:
    async with asyncio.timeout(REDIS_SECONDS):
        return int(await cast(Any, redis.eval(_FORGET, 1, claim.key, claim.holder)))
