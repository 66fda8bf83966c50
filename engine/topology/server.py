"""Streams and consumers on the server: look, apply a plan, rotate the epoch of what was restored from a backup.

Every call is safe to repeat, and two at once are noticed where they would do harm: a stream is created together with its
epoch, by one of them, and marks and recorded epochs are written by compare-and-set. An update is none: the server has no
such call for configurations. It begins from the configuration the plan has seen and is read back, and whoever finds another
epoch than it has written says so; between these two looks the later one wins. So run one provisioner at a time.

Every call raises ApiError, Unavailable and Unanswered as `Broker` does; after such a failure it is safe to begin again.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from engine.broker.answers import EPOCH_KEY, StreamState, own_metadata
from engine.broker.control import CONTROL_STREAM, ControlBucket, Entry
from engine.broker.jetstream import After, Broker
from engine.broker.refusals import STREAM_MISSING, is_missing, is_overtaken
from engine.broker.writes import stream_of_subject
from engine.dispatch.source import SOURCES
from engine.errors import ApiError, TopologyError
from engine.log.incarnations import restored_metadata, stream_of
from engine.log.writer import read_mark
from engine.planner import position
from engine.topology import plan as topology_plan
from engine.topology.diff import changes_between
from engine.topology.files import Override, Profile, is_log, log_partition, render
from engine.topology.plan import Observed, Plan, Step, recorded_streams, remembered_partitions
from seamark.protocol.subjects import CONTROL_BUCKET, JOBS_STREAM, LATER_STREAM, log_stream

Answer = TypeVar("Answer")

EPOCH_CHARS: Final = 8
"""36^8 tags: two incarnations of a stream never share one by chance, and a cursor stays short."""

EPOCHS_KEY: Final = "epochs"

API_SECONDS: Final = 10.0
"""A meta leader creates a replicated stream in well under a second; an election takes 4-9 s."""

_RACES_MAX: Final = 10
"""Attempts at a compare-and-set that other provisioners keep winning."""

_NAME_IN_USE: Final = 10058
_NOT_ENOUGH_SERVERS: Final = frozenset({10074, 10005})
_NO_STORAGE: Final = frozenset({10047, 10028})
_NOT_FOUND: Final = frozenset({STREAM_MISSING, 10014})


def new_epoch() -> str:
    """A random tag for a new incarnation of a stream: 8 of `[a-z0-9]`."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(EPOCH_CHARS))


# --- files and server ----------------------------------------------------------------------------------------------------


async def plan(
    broker: Broker,
    profile: Profile,
    partitions: int | None = None,
    *,
    overrides: Override | None = None,
    recreate: bool = False,
) -> Plan:
    """What would have to change on the server so that it agrees with the files of `profile`; changes nothing.

    Args:
        partitions: default: the number the server's streams were made for, on an empty server the profile's own.
        recreate: make a stream anew that existed once and is gone, instead of refusing to.

    Raises:
        TopologyError: unknown profile, impossible number, files missing, or the recorded epochs are unreadable.
    """
    observed = await observe(broker, profile)
    count = remembered_partitions(observed) if partitions is None else partitions
    return topology_plan.decide(render(profile, count, overrides=overrides), observed, new_epoch, recreate=recreate)


async def apply(broker: Broker, plan: Plan) -> list[str]:
    """Carry out a plan, in its order; returns one line for each step done.

    Raises:
        TopologyError: the plan holds a refusal (nothing is done then), or the server has changed since it was made.
    """
    for refusal in plan.refusals:
        raise TopologyError(f"{refusal.target}: {refusal.detail}", refusal.remedy)
    done = []
    for step in plan.steps:
        await _STEPS[step.action](broker, step)
        done.append(step.line())
    return done


async def ensure(
    broker: Broker, profile: Profile, partitions: int | None = None, *, overrides: Override | None = None
) -> list[str]:
    """Plan and apply in one call, for embedded stacks and tests; what is gone is made anew. Returns what was done."""
    return await apply(broker, await plan(broker, profile, partitions, overrides=overrides, recreate=True))


async def observe(broker: Broker, profile: Profile) -> Observed:
    """The streams and consumers that the files of `profile` name, and every LOG there is, as their leaders have them now.

    Each is asked for by itself: a list leaves out whatever has no leader at that moment, and what is left out would look
    like something to create.
    """
    files = render(profile, 1)
    named, read = ({_kind(file.stream) for file in each} for each in (files.streams, files.consumers))
    streams, consumers = {}, {}
    for name in await _names(broker, "STREAM.NAMES", "streams"):
        if _kind(name) in named and (seen := await _stream_or_none(broker, name)) is not None:
            streams[name] = seen
    for stream in sorted(name for name in streams if _kind(name) in read):
        for name in await _names(broker, f"CONSUMER.NAMES.{stream}", "consumers"):
            asked = broker.api(f"CONSUMER.INFO.{stream}.{name}", timeout_seconds=API_SECONDS)
            if (answer := await _or_none(asked)) is not None:
                consumers[stream, name] = answer["config"]
    epochs = (await read_epochs(broker))[0] if CONTROL_STREAM in streams else None
    logs = [p for name in streams if (p := log_partition(name)) is not None] if JOBS_STREAM in streams else []
    planned = {p: await read_mark(broker, position.marked(p)) for p in sorted(logs)}
    return Observed(streams, consumers, epochs, planned)


def _kind(stream: str) -> str:
    return "LOG" if is_log(stream) else stream


async def _names(broker: Broker, method: str, key: str) -> list[str]:
    """All names, which the cluster's own leader knows even while a stream has none."""
    names: list[str] = []
    while True:
        answer = await broker.api(method, {"offset": len(names)}, timeout_seconds=API_SECONDS)
        page = answer.get(key) or []
        names += page
        if not page or len(names) >= answer["total"]:
            return names


async def _stream_or_none(broker: Broker, name: str) -> StreamState | None:
    return await _or_none(broker.stream(name, timeout_seconds=API_SECONDS))


async def _or_none(asked: Awaitable[Answer]) -> Answer | None:
    try:
        return await asked
    except ApiError as error:
        if error.err_code in _NOT_FOUND:
            return None
        raise


# --- epochs --------------------------------------------------------------------------------------------------------------


async def read_epochs(broker: Broker) -> Entry[dict[str, str]]:
    """The epochs recorded in the control bucket, with the revision of that entry.

    Raises:
        TopologyError: there is no control bucket, or somebody wrote something else there.
    """
    try:
        return await _recorded(broker).get(EPOCHS_KEY)
    except ApiError as error:
        if is_missing(error):
            remedy = "Run `seamark topology apply`: it makes it, and records the epochs as it finds them"
            raise TopologyError(f"there is no stream {CONTROL_STREAM}, which records the epochs", remedy) from error
        raise
    except msgspec.DecodeError as error:
        remedy = f"Delete it (nats kv del {CONTROL_BUCKET} {EPOCHS_KEY}), then run `seamark topology plan` and `apply`"
        raise TopologyError(
            f"the entry `{EPOCHS_KEY}` of the control bucket is no list of epochs ({error})", remedy
        ) from error


def _recorded(broker: Broker) -> ControlBucket[dict[str, str]]:
    return ControlBucket(broker, dict[str, str])


async def actual_epochs(broker: Broker) -> dict[str, str]:
    """The epochs EVENTS and every LOG carry on the server now; a stream without one is left out."""
    names = recorded_streams(await _names(broker, "STREAM.NAMES", "streams"))
    found = {name: await _stream_or_none(broker, name) for name in names}
    return {name: seen.epoch for name, seen in found.items() if seen is not None and seen.epoch is not None}


def parse_backups(texts: Sequence[str]) -> dict[str, int | None]:
    """Restored streams as written on a command line: `LOG-2`, or `EVENTS=1000` with the last sequence of its backup.

    Raises:
        TopologyError: a text has another form, two of them name the same stream, or a stream of events comes without a number:
            services publish as soon as it is there again, and what they stored since would pass for dispatched.
    """
    backups: dict[str, int | None] = {}
    for text in texts:
        found = re.fullmatch(r"([^=]+)(?:=([0-9]+))?", text)
        if found is None or found[1] in backups:
            remedy = "Write LOG-2, or EVENTS=<its last sequence>, and name each stream once."
            raise TopologyError(f"not a restored stream: {text!r}", remedy)
        backups[found[1]] = int(found[2]) if found[2] else None
    for source in SOURCES:
        if backups.get(source.stream, 0) is None:
            remedy = f"Write {source.stream}=<last sequence>: state.last_seq in the backup's backup.json."
            raise TopologyError(f"{source.stream} is named without the end of its backup", remedy)
    return backups


async def restore(
    broker: Broker, streams: Iterable[str], ends: Mapping[str, int | None] | None = None
) -> dict[str, tuple[str | None, str]]:
    """Give streams that an operator has restored from a backup a new epoch; returns the old and new one of each.

    Every cursor into them gets a `reset` from now on. Dispatchers translate their marks and claims when they read them: a
    stream's metadata says whose numbering it continues, and up to where.

    Args:
        ends: the last sequence that a stream's backup held; without one the last that it holds now, which is right only
            while nothing has been stored in it since.

    Raises:
        TopologyError: a stream is missing or ends before its backup (nothing is changed then), or was changed meanwhile.
    """
    found: dict[str, StreamState] = {}
    for name in streams:
        if name == JOBS_STREAM:
            raise TopologyError("what waited in a backup of JOBS was sent since", position.ANEW)
        stream, end = await _stream_or_none(broker, name), (ends or {}).get(name)
        if stream is None:
            raise TopologyError(f"there is no stream {name}", "Restore it first: nats stream restore <folder>.")
        if end is not None and end > stream.last_seq:
            detail = f"{name} ends at {stream.last_seq}: its backup cannot have ended at {end}"
            raise TopologyError(detail, "Read state.last_seq in the backup's backup.json again.")
        found[name] = stream
    rotated = {}
    for name, stream in found.items():
        rotated[name] = (stream.epoch, fresh := new_epoch())
        config = stream.config | {"metadata": restored_metadata(stream, fresh, (ends or {}).get(name))}
        await _update_stream(broker, Step("update_stream", name, (), config, stream.config))
    return rotated


# --- steps ---------------------------------------------------------------------------------------------------------------


async def _create_stream(broker: Broker, step: Step) -> None:
    name, config = step.target, step.config
    try:
        await broker.api(f"STREAM.CREATE.{name}", config, timeout_seconds=API_SECONDS)
    except ApiError as error:
        if error.err_code == _NAME_IN_USE:
            return await _check_same(broker, step)
        if error.err_code in _NO_STORAGE:
            detail = f"the server has no room left to reserve {config.get('max_bytes', 0) >> 20} MiB for {name}"
            remedy = "Raise max_file_store in its configuration or lower max_bytes in the file."
        elif error.err_code in _NOT_ENOUGH_SERVERS:
            copies = config.get("num_replicas", 1)
            detail = f"{name} is to have {copies} copies, and there are not so many servers ({error.description})"
            remedy = f"Start {copies} servers with nats/cluster.conf, or take --profile dev, which keeps one copy."
        else:
            raise
        raise TopologyError(detail, remedy) from error


async def _check_same(broker: Broker, step: Step) -> None:
    """Another provisioner was quicker: its epoch stands if all else is as we would have made it."""
    seen = await _stream_or_none(broker, step.target)
    metadata = {key: value for key, value in step.config["metadata"].items() if key != EPOCH_KEY}
    other = [] if seen is None else [*changes_between("stream", step.config | {"metadata": metadata}, seen.config)]
    if seen is None or other:
        what = "; ".join(map(str, other)) or "it is gone again"
        raise TopologyError(f"{step.target} was made otherwise by another provisioner: {what}", "Plan again.")


async def _update_stream(broker: Broker, step: Step) -> None:
    name, config = step.target, _comparable(step.config)
    now = await _stream_or_none(broker, name)
    if now is None or _comparable(now.config) != _comparable(step.seen or {}):
        raise TopologyError(f"{name} was changed while this was planned", "Plan again.")
    await broker.api(f"STREAM.UPDATE.{name}", config, timeout_seconds=API_SECONDS)
    after, epoch = await _stream_or_none(broker, name), config["metadata"].get(EPOCH_KEY)
    if after is None or after.epoch != epoch:
        is_now = "is gone" if after is None else f"has epoch {after.epoch}"
        raise TopologyError(
            f"{name} was changed at the same time: it {is_now}, not {epoch}",
            "Run one provisioner at a time; look with `seamark topology plan`, then do it again.",
        )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "metadata": own_metadata(config)}


async def _put_consumer(broker: Broker, step: Step) -> None:
    stream, _, name = step.target.partition("/")
    # The filter is part of the subject so that permissions can name it (ADR-42 of the server's designs).
    method = f"CONSUMER.CREATE.{stream}.{name}.{step.config['filter_subject']}"
    body = {"stream_name": stream, "config": step.config, "action": step.action.partition("_")[0]}
    await broker.api(method, body, timeout_seconds=API_SECONDS)


async def _record_epochs(broker: Broker, _step: Step) -> None:
    """Record epochs of streams seen for the first time. An entry that differs stands: only a repair may replace it."""
    for _ in range(_RACES_MAX):
        recorded, revision = await read_epochs(broker)
        merged = await actual_epochs(broker) | (recorded or {})
        if merged == recorded or await _stored(_put_epochs(broker, merged, revision)):
            return
    raise TopologyError("other provisioners keep changing the recorded epochs", "Run one at a time.")


async def _replace(broker: Broker, step: Step) -> None:
    """Write a mark, or the recorded epochs, in place of what the plan has seen."""
    seq = (step.seen or {})["seq"]
    if step.action == "write_mark":
        stored = await _stored(_put_mark(broker, step.target, step.config, seq))
    else:
        stored = await _stored(_put_epochs(broker, step.config, seq))
    if not stored:
        raise TopologyError(f"{step.target} moved while this was planned", "Stop the dispatchers and plan again.")


async def _begin_planning(broker: Broker, step: Step) -> None:
    """Set a planner's mark behind everything that its log holds now, unless somebody else has set it."""
    p = int(step.target.rpartition(".")[2])
    log, jobs = await stream_of(broker, log_stream(p)), await stream_of(broker, JOBS_STREAM)
    await _stored(_put_mark(broker, step.target, msgspec.to_builtins(position.at_the_end(log, jobs)), 0))


async def _put_mark(broker: Broker, subject: str, mark: Mapping[str, Any], seq: int) -> None:
    """Write a mark behind the one that is at `seq`. In JOBS and LATER it takes its place."""
    stream = stream_of_subject(subject) or ""
    headers = {"Nats-Rollup": "sub"} if stream in (JOBS_STREAM, LATER_STREAM) else {}
    await broker.append(subject, msgspec.json.encode(mark), headers, after=After(stream, seq))


async def _put_epochs(broker: Broker, epochs: Mapping[str, Any], revision: int) -> int:
    return await _recorded(broker).put(EPOCHS_KEY, dict(sorted(epochs.items())), revision)


async def _stored(write: Awaitable[object]) -> bool:
    """Await a write that follows what was read; False: somebody else was quicker."""
    try:
        await write
    except ApiError as error:
        if not is_overtaken(error):
            raise
        return False
    return True


_STEPS: Final = {
    "create_stream": _create_stream,
    "update_stream": _update_stream,
    "create_consumer": _put_consumer,
    "update_consumer": _put_consumer,
    "record_epochs": _record_epochs,
    "begin_planning": _begin_planning,
    "replace_epochs": _replace,
    "write_mark": _replace,
}
