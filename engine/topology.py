"""Streams and consumers on the server: look, apply a plan, rotate the epoch of what was restored from a backup.

Every call is safe to repeat and to run beside itself: a stream is created together with its epoch, an update happens
only to the configuration the plan has seen, and the recorded epochs are written by compare-and-set.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from engine import topology_plan
from engine.errors import ApiError, TopologyError
from engine.jetstream import Broker
from engine.subjects import CONTROL_BUCKET
from engine.topology_files import Overrides, Profile, is_log, render
from engine.topology_plan import (
    Observed,
    ObservedStream,
    Plan,
    Step,
    recorded_streams,
    remembered_partitions,
)

EPOCH_CHARS: Final = 8
"""36^8 tags: two incarnations of a stream never share one by chance, and a cursor stays short."""

EPOCHS_SUBJECT: Final = f"$KV.{CONTROL_BUCKET}.epochs"
CONTROL_STREAM: Final = f"KV_{CONTROL_BUCKET}"

API_SECONDS: Final = 10.0
"""A meta leader creates a replicated stream in well under a second; an election takes 4-9 s."""

_RACES_MAX: Final = 10
"""Attempts at a compare-and-set that other provisioners keep winning."""

_NAME_IN_USE: Final = 10058
_NO_STORAGE: Final = frozenset({10047, 10028})
_NOT_FOUND: Final = frozenset({10059, 10014})
_WRONG_SEQUENCE: Final = frozenset({10071, 10164})


def new_epoch() -> str:
    """A random tag for a new incarnation of a stream: 8 of `[a-z0-9]`."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(EPOCH_CHARS))


async def plan(
    broker: Broker, profile: Profile, partitions: int | None = None, *, overrides: Overrides | None = None
) -> Plan:
    """What would have to change on the server so that it agrees with the files of `profile`; changes nothing.

    Without `partitions` the number the server's streams were made for counts, on an empty server the profile's own.

    Raises:
        TopologyError: unknown profile or files missing. Unavailable, Unanswered, ApiError: the server cannot be read.
    """
    observed = await observe(broker, profile)
    topology = render(profile, partitions or remembered_partitions(observed), overrides=overrides)
    return topology_plan.decide(topology, observed, new_epoch)


async def apply(broker: Broker, plan: Plan) -> list[str]:
    """Carry out a plan, in its order; returns one line for each step done.

    Raises:
        TopologyError: the plan holds a refusal (nothing is done then), or the server has changed since it was made.
        ApiError, Unavailable, Unanswered: as the server says; applying a fresh plan continues where this one stopped.
    """
    if plan.refusals:
        first = plan.refusals[0]
        raise TopologyError(f"{first.target}: {first.detail}", first.remedy)
    done = []
    for step in plan.steps:
        await _STEPS[step.action](broker, step)
        done.append(step.line())
    return done


async def ensure(
    broker: Broker, profile: Profile, partitions: int | None = None, *, overrides: Overrides | None = None
) -> list[str]:
    """Plan and apply in one call, for embedded stacks and tests; returns what was done."""
    return await apply(broker, await plan(broker, profile, partitions, overrides=overrides))


async def observe(broker: Broker, profile: Profile) -> Observed:
    """The streams and consumers that the files of `profile` name, and every LOG there is, as their leaders have them now.

    Each is asked for by itself: a list leaves out whatever has no leader at that moment, and what is left out would look
    like something to create.
    """
    files = render(profile, 1)
    named = {file.name for file in files.streams}
    streams = {}
    for name in await _names(broker, "STREAM.NAMES", "streams"):
        if (name in named or is_log(name)) and (seen := await _stream_or_none(broker, name)) is not None:
            streams[name] = seen
    consumers = {}
    read = {file.stream for file in files.consumers}
    for stream in sorted(name for name in streams if name in read or (is_log(name) and any(map(is_log, read)))):
        for name in await _names(broker, f"CONSUMER.NAMES.{stream}", "consumers"):
            answer = await _api_or_none(broker, f"CONSUMER.INFO.{stream}.{name}")
            if answer is not None:
                consumers[stream, name] = answer["config"]
    epochs = (await read_epochs(broker))[0] if CONTROL_STREAM in streams else None
    return Observed(streams, consumers, epochs)


def observed_stream(info: Mapping[str, Any]) -> ObservedStream:
    """A stream from an answer of `STREAM.INFO`."""
    state = info["state"]
    return ObservedStream(
        config=info["config"],
        messages=state["messages"],
        bytes=state["bytes"],
        first_seq=state["first_seq"],
        last_seq=state["last_seq"],
        first_at=parse_time(state.get("first_ts")),
        asked_at=parse_time(info.get("ts")),
    )


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time of the server, cut to microseconds."""
    return datetime.fromisoformat(text) if text else None


async def read_epochs(broker: Broker) -> tuple[dict[str, str] | None, int]:
    """The epochs recorded in the control bucket and the sequence of that entry; (None, 0) when there is none."""
    entry = await broker.leader_last(CONTROL_STREAM, EPOCHS_SUBJECT)
    if entry is None or not entry.payload:
        return None, entry.seq if entry else 0
    return msgspec.json.decode(entry.payload, type=dict[str, str]), entry.seq


async def write_epochs(broker: Broker, epochs: Mapping[str, str], revision: int) -> int:
    """Record epochs if the entry is still `revision` (0: none); returns the new revision.

    Raises:
        ApiError: 10071 or 10164 when another provisioner was quicker.
    """
    body = msgspec.json.encode(dict(sorted(epochs.items())))
    return (await broker.append(EPOCHS_SUBJECT, body, expected_last_subject_seq=revision)).seq


async def restore(broker: Broker, streams: Sequence[str]) -> dict[str, tuple[str | None, str]]:
    """Give streams that an operator has restored from a backup a new epoch; returns the old and new one of each.

    Every cursor into them gets a `reset` from now on, and dispatchers refuse to start until `seamark topology repair`
    has set their positions: the recorded epochs stay as they are until then.

    Raises:
        TopologyError: a stream does not exist (nothing is changed then), or it was changed at the same time.
    """
    found = {}
    for name in streams:
        seen = await _stream_or_none(broker, name)
        if seen is None:
            raise TopologyError(f"there is no stream {name}", f"Restore it first: nats stream restore {name} <folder>.")
        found[name] = seen
    rotated = {}
    for name, seen in found.items():
        old, fresh = seen.epoch, new_epoch()
        # Its messages keep the numbers they had: written down, so that marks and claims can be carried over.
        await _update_stream(broker, name, seen.config, seen.config | {"metadata": seen.restored(fresh)})
        rotated[name] = (old, fresh)
    return rotated


async def _names(broker: Broker, method: str, key: str) -> list[str]:
    """All names, which the cluster's own leader knows even while a stream has none."""
    names: list[str] = []
    while True:
        answer = await broker.api(method, {"offset": len(names)}, timeout_seconds=API_SECONDS)
        page = answer.get(key) or []
        names += page
        if not page or len(names) >= answer["total"]:
            return names


async def _stream_or_none(broker: Broker, name: str) -> ObservedStream | None:
    answer = await _api_or_none(broker, f"STREAM.INFO.{name}")
    return None if answer is None else observed_stream(answer)


async def _api_or_none(broker: Broker, method: str) -> dict[str, Any] | None:
    try:
        return await broker.api(method, timeout_seconds=API_SECONDS)
    except ApiError as error:
        if error.err_code in _NOT_FOUND:
            return None
        raise


async def _create_stream(broker: Broker, step: Step) -> None:
    try:
        await broker.api(f"STREAM.CREATE.{step.target}", step.config, timeout_seconds=API_SECONDS)
    except ApiError as error:
        if error.err_code in _NO_STORAGE:
            size = step.config.get("max_bytes", 0) >> 20
            raise TopologyError(
                f"the server has no room left to reserve {size} MiB for {step.target}",
                "Raise max_file_store in its configuration or lower max_bytes in the file.",
            ) from error
        # Another provisioner was quicker; its epoch stands, and so does ours if it was our own unanswered request.
        if error.err_code != _NAME_IN_USE:
            raise


async def _change_stream(broker: Broker, step: Step) -> None:
    await _update_stream(broker, step.target, step.seen or {}, step.config)


async def _update_stream(broker: Broker, name: str, seen: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    now = await _stream_or_none(broker, name)
    if now is None or _essence(now.config) != _essence(seen):
        raise TopologyError(f"{name} was changed while this was planned", "Plan again.")
    metadata = {key: value for key, value in config["metadata"].items() if not key.startswith("_nats.")}
    await broker.api(f"STREAM.UPDATE.{name}", {**config, "metadata": metadata}, timeout_seconds=API_SECONDS)


def _essence(config: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {key: value for key, value in (config.get("metadata") or {}).items() if not key.startswith("_nats.")}
    return {**config, "metadata": metadata}


async def _put_consumer(broker: Broker, step: Step) -> None:
    stream, _, name = step.target.partition("/")
    action = "update" if step.action == "update_consumer" else "create"
    # The filter is part of the subject so that permissions can name it (ADR-42 of the server's designs).
    method = f"CONSUMER.CREATE.{stream}.{name}.{step.config['filter_subject']}"
    body = {"stream_name": stream, "config": step.config, "action": action}
    await broker.api(method, body, timeout_seconds=API_SECONDS)


async def _record_epochs(broker: Broker, _step: Step) -> None:
    """Record epochs of streams seen for the first time. An entry that differs stands: only a repair may replace it."""
    for _ in range(_RACES_MAX):
        recorded, revision = await read_epochs(broker)
        actual = await actual_epochs(broker)
        merged = actual | (recorded or {})
        if merged == recorded:
            return
        try:
            await write_epochs(broker, merged, revision)
        except ApiError as error:
            if error.err_code not in _WRONG_SEQUENCE:
                raise
        else:
            return
    raise TopologyError("other provisioners keep changing the recorded epochs", "Run one at a time.")


async def actual_epochs(broker: Broker) -> dict[str, str]:
    """The epochs EVENTS and every LOG carry on the server now; a stream without one is left out."""
    found = {}
    for name in recorded_streams(await _names(broker, "STREAM.NAMES", "streams")):
        seen = await _stream_or_none(broker, name)
        if seen is not None and seen.epoch is not None:
            found[name] = seen.epoch
    return found


_STEPS: Final = {
    "create_stream": _create_stream,
    "update_stream": _change_stream,
    "create_consumer": _put_consumer,
    "update_consumer": _put_consumer,
    "record_epochs": _record_epochs,
}
