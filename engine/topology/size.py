"""How large streams, servers and disks have to be for a rate of records, and the production files written with these sizes.

Everything is worked out from a few numbers that were measured on nats-server 2.15.1 (ADR 0013). The result names each of them,
so that readers can put in their own.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.broker.answers import WATERMARK_KEY
from engine.errors import TopologyError
from engine.limits import BATCH_MESSAGES_MAX, DUE_SECONDS, LINGER_SECONDS
from engine.topology.accounts import with_logs
from engine.topology.files import PARTITIONS_MAX, check_partitions, files_folder, is_log, render
from seamark.protocol.subjects import JOBS_STREAM, LATER_STREAM

# What a record takes on disk beside its JSON: subject, headers of its batch, the file's own frame. Measured: 137 with a
# tenant and a user of 20 bytes together.
RECORD_OVERHEAD_BYTES: Final = 150
# The dispatcher's mark that ends each batch. Measured: 226.
MARK_BYTES: Final = 230
# What an event takes beside its JSON, message id and trace header included. Measured: 208.
EVENT_OVERHEAD_BYTES: Final = 210
# One receipt, whole. Measured: 357 for an acknowledgement with its times.
RECEIPT_BYTES: Final = 360
# The receipt of a plan, with what it was made from. Measured: 730 to 1010 of JSON for two channels, and 80 of subject and frame.
PLAN_BYTES: Final = 1100
# How full streams are at the given rate. The rest is for busier weeks; `seamark topology check` warns of a stream above it.
FULL_SHARE: Final = 0.8
# One subject in a server's memory. Measured: 170 to 260; indexes of blocks in use come on top and leave after 2 minutes.
SUBJECT_MEMORY_BYTES: Final = 260
# One message id in the duplicate window. Measured: 195.
MESSAGE_ID_MEMORY_BYTES: Final = 200
# One durable consumer. Measured: some 50 KB.
CONSUMER_MEMORY_BYTES: Final = 50_000
# Event types that one ordering key sees within EVENTS' age: each is a subject of its own there.
TYPES_PER_KEY: Final = 3
# BULK's part of EVENTS' room. It holds a quarter of all records as events of their own, or every record as one of thousands that
# share a page of a campaign: some 30 to 160 B of names a recipient.
BULK_SHARE: Final = 0.25
# Allowed on disk for the log of each replicated stream and consumer, which `max_file_store` does not count.
RAFT_GROUP_BYTES: Final = 64 << 20
COPIES: Final = 3

PARTITIONS_OFFERED: Final = (16, 32, PARTITIONS_MAX)

# More partitions are chosen before a LOG grows beyond this: a read without an index in memory takes longer in a large stream.
LOG_BYTES_COMFORTABLE: Final = 100 << 30
# What a read takes for each GiB between two records of one user, without an index in memory. Measured: 358 ms for 400 MB.
COLD_READ_SECONDS_PER_GIB: Final = 0.95
_GIB: Final = 1 << 30
_DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Demand:
    """What has to be stored; `seamark topology size --help` says what each number is."""

    rate: float
    record_bytes: int = 450
    days: float = 30.0
    event_bytes: int | None = None
    receipts_per_record: float = 1.0
    planned_share: float = 0.0
    users: int = 1_000_000
    servers: int = COPIES
    partitions: int | None = None


@dataclass(frozen=True, slots=True)
class StreamSize:
    """One kind of stream. `stored_bytes` and `max_bytes` are those of one of `count` streams, on one server.

    `max_bytes` 0: it has no bound.
    """

    name: str
    count: int
    stored_bytes: int
    max_bytes: int
    max_age_days: float
    why: str


@dataclass(frozen=True, slots=True)
class Sizing:
    """What a demand needs. `memory_bytes`, `max_file_store` (bytes) and `disk_bytes` are those of each server."""

    demand: Demand
    partitions: int
    streams: tuple[StreamSize, ...]
    consumers: int
    memory_bytes: int
    max_file_store: int
    disk_bytes: int
    reasons: tuple[str, ...]


def size(demand: Demand, *, folder: Path | None = None) -> Sizing:
    """What a demand needs, with the reasons.

    Raises:
        TopologyError: a number is impossible, or logs would not outlive events.
    """
    _check(demand)
    one = render("production", 1, folder=folder)
    files = {file.name: file.config for file in one.streams}
    events_days = files["EVENTS"]["max_age"] / 1e9 / _DAY
    if demand.days <= events_days:
        remedy = f"Keep logs for more than {events_days:g} days, or lower max_age of EVENTS in its file first."
        raise TopologyError(f"logs kept for {demand.days:g} days would not outlive events: marks age with them", remedy)
    offered = (demand.partitions,) if demand.partitions else PARTITIONS_OFFERED
    sized = {p: tuple(_streams(demand, p, files)) for p in offered}
    comfortable = (p for p, streams in sized.items() if streams[0].max_bytes <= LOG_BYTES_COMFORTABLE)
    partitions = next(comfortable, offered[-1])
    streams = sized[partitions]
    consumers = len(one.consumers) * partitions
    reserved = sum(each.count * max(each.stored_bytes, each.max_bytes) for each in streams) * COPIES / demand.servers
    store = math.ceil(reserved / (10 * _GIB)) * 10 * _GIB
    groups = (sum(each.count for each in streams) + consumers) * COPIES / demand.servers
    disk = store + round(groups * RAFT_GROUP_BYTES)
    subjects = demand.users * (2 + TYPES_PER_KEY)
    ids = demand.rate * files["EVENTS"]["duplicate_window"] / 1e9
    memory = subjects * SUBJECT_MEMORY_BYTES + ids * MESSAGE_ID_MEMORY_BYTES + consumers * CONSUMER_MEMORY_BYTES
    memory = round(memory * COPIES / demand.servers)
    reasons = tuple(_reasons(demand, partitions, streams[0], subjects, ids, groups))
    return Sizing(demand, partitions, streams, consumers, memory, store, disk, reasons)


def write(sizing: Sizing, target: Path, *, folder: Path | None = None) -> list[Path]:
    """Write the whole folder `nats/` to `target` with these sizes in it, for SEAMARK_NATS_FILES; returns what was changed.

    Only numbers are replaced, and lists of logs continued, so that what people wrote into the files stays. `target` may be
    the folder itself.

    Raises:
        TopologyError: a file has no such number.
    """
    source = folder or files_folder()
    if target.resolve() != source.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)
    numbers: dict[Path, dict[str, int | str]] = {
        target / "streams" / f"{each.name}.production.json": {
            r'("max_bytes": )\d+': each.max_bytes,
            r'("max_age": )\d+': round(each.max_age_days * _DAY * 1e9),
        }
        for each in sizing.streams
        if each.max_bytes
    }
    # What nats-server reads as GB are 2^30 bytes.
    numbers[target / "server.conf"] = {r"(?m)^(\s*max_file_store: )\S+": f"{sizing.max_file_store // _GIB}GB"}
    changed = []
    for path in (*numbers, target / "accounts.conf"):
        before = text = path.read_text(encoding="utf-8")
        for pattern, number in numbers.get(path, {}).items():
            text, count = re.subn(pattern, rf"\g<1>{number}", text, count=1)
            if not count:
                raise TopologyError(f"{path} has nothing that matches {pattern}", "Restore the file of the project.")
        text = text if path in numbers else with_logs(text, sizing.partitions)
        if text != before:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def _check(demand: Demand) -> None:
    for what, value, least in (
        ("--rate", demand.rate, 0.001),
        ("--record-bytes", demand.record_bytes, 1),
        ("--days", demand.days, 0.001),
        ("--receipts-per-record", demand.receipts_per_record, 0),
        ("--planned-share", demand.planned_share, 0),
        ("--users", demand.users, 1),
        ("--servers", demand.servers, COPIES),
    ):
        if not value >= least or math.isinf(value):
            raise TopologyError(f"{what} is {value:g}", f"It must be a number from {least:g} on.")
    if demand.partitions is not None:
        check_partitions(demand.partitions)


def _streams(demand: Demand, partitions: int, files: Mapping[str, Mapping[str, Any]]) -> Iterator[StreamSize]:
    """The LOGs first."""
    batch = min(max(1.0, demand.rate / partitions * LINGER_SECONDS), BATCH_MESSAGES_MAX)
    record = demand.record_bytes + RECORD_OVERHEAD_BYTES + MARK_BYTES / batch
    body = demand.record_bytes if demand.event_bytes is None else demand.event_bytes
    event, count, planned = body + EVENT_OVERHEAD_BYTES, demand.receipts_per_record, demand.planned_share
    why = {
        "LOG-p": f"{demand.record_bytes} B of JSON + {RECORD_OVERHEAD_BYTES} B of subject and headers"
        f" + a mark of {MARK_BYTES} B for every {batch:.3g} records = {record:.0f} B a record",
        "EVENTS": f"{body} B of JSON + {EVENT_OVERHEAD_BYTES} B of subject and headers = {event} B an event, an event a record",
        "BULK": f"{BULK_SHARE:.0%} of EVENTS: a quarter of the records of low priority, or all of them in pages of campaigns",
        "RECEIPTS": f"{count:g} receipts a record of {RECEIPT_BYTES} B, and {planned:g} plans of {PLAN_BYTES} B",
    }
    ages = {name: config["max_age"] / 1e9 / _DAY for name, config in files.items()}
    for name, number, bytes_each, days in (
        ("LOG-p", partitions, record / partitions, demand.days),
        ("EVENTS", 1, event, ages["EVENTS"]),
        ("BULK", 1, BULK_SHARE * event, ages["BULK"]),
        ("RECEIPTS", 1, RECEIPT_BYTES * count + PLAN_BYTES * planned, demand.days),
    ):
        stored = demand.rate * days * _DAY * bytes_each
        bound = max(1, math.ceil(stored / FULL_SHARE / _GIB)) * _GIB
        yield StreamSize(name, number, round(stored), bound, days, why[name])
    for name, config in files.items():
        if name in {JOBS_STREAM, LATER_STREAM}:
            most = int(config["metadata"][WATERMARK_KEY])
            unbounded = "its watermark, as in its file. It has no bound, for a stream with schedules cannot refuse"
            yield StreamSize(name, 1, most, 0, DUE_SECONDS / _DAY if name == LATER_STREAM else ages[name], unbounded)
        elif name not in why and not is_log(name):
            as_filed = "as in its file: it does not grow with the rate"
            yield StreamSize(name, 1, 0, config["max_bytes"], ages[name], as_filed)


def _reasons(
    demand: Demand, partitions: int, log: StreamSize, subjects: int, ids: float, groups: float
) -> Iterator[str]:
    cold = log.stored_bytes / _GIB * COLD_READ_SECONDS_PER_GIB
    yield (
        f"streams are {FULL_SHARE:.0%} full at this rate; max_bytes is whole GiB, and every one of {COPIES} copies takes it"
    )
    yield (
        f"{partitions} partitions keep a LOG at {log.stored_bytes / _GIB:.0f} GiB. In the worst case, two records of a user at"
        f" its ends and no index in memory, a read takes {cold:.0f} s and holds up writes to that partition; fewer days or"
        " more partitions shorten it"
    )
    if log.max_bytes > LOG_BYTES_COMFORTABLE:
        yield f"there cannot be more than {PARTITIONS_MAX} partitions: keep logs for fewer days if such reads are too slow"
    yield (
        f"memory: {subjects} subjects (a LOG, a receipt and {TYPES_PER_KEY} event subjects a user) of"
        f" {SUBJECT_MEMORY_BYTES} B, {ids:.0f} message ids of {MESSAGE_ID_MEMORY_BYTES} B in EVENTS' duplicate window,"
        f" {CONSUMER_MEMORY_BYTES // 1000} KB a consumer. Give the server twice as much: indexes and blocks in use come on top"
    )
    yield (
        f"disk: max_file_store, and {RAFT_GROUP_BYTES >> 20} MiB for the Raft log of each of {groups:.0f} streams and consumers"
    )
    if demand.servers > COPIES:
        yield f"{demand.servers} servers share {COPIES} copies evenly only if streams are placed so: watch the fullest"
