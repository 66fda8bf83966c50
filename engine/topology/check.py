"""What the server really does, read back from it: version, fsync, copies, limits, epochs, positions.

A finding is a warning in `dev` and a refusal in `production`, except where no process could work at all: that is refused
everywhere. What cannot be found out is called unknown, not assumed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import aiohttp
import structlog

from engine.broker.answers import PARTITIONS_KEY, WATERMARK_KEY
from engine.broker.jetstream import Broker
from engine.dispatch.source import SOURCES
from engine.errors import BrokerError, PartitionStopped, TopologyError
from engine.limits import DUE_SECONDS, JOBS_SUBJECTS_MAX, MONITOR_SECONDS
from engine.log.incarnations import RESTORED
from engine.log.marks import PlacedMark
from engine.log.writer import read_mark
from engine.planner.position import meant
from engine.topology import server as topology
from engine.topology.files import Profile, is_log, log_partition, render
from engine.topology.plan import Observed, decide, remembered_partitions
from engine.topology.room import Intake, read_intake, room
from engine.topology.size import FULL_SHARE
from seamark.protocol.subjects import EVENTS_STREAM, JOBS_STREAM, LATER_STREAM, log_stream

VERSION_MIN: Final = (2, 14)
"""CONSUMER.RESET, the reading head's way back to a position, is in 2.14 and later."""

MAX_PAYLOAD_MIN: Final = 2 << 20
"""An event has up to 1 MiB, a dead letter is a whole event with more headers."""

COPIES_MIN: Final = 3
"""With three copies a stored record survives the loss of any one disk, and a quorum remains to elect a leader."""

_log = structlog.get_logger("seamark.server")

Level = Literal["ok", "unknown", "warn", "refuse", "wanted"]
"""`wanted`: `judge` makes it `refuse` in production, and `warn` in dev."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `name` is a stable word; `remedy` is empty where nothing needs to be done."""

    level: Level
    name: str
    detail: str
    remedy: str = ""

    def line(self) -> str:
        """The finding for people."""
        return f"{self.level:7} {self.name}: {self.detail}" + (f". {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was looked at, in a stable order. `refused`: no process should start on this server."""

    profile: Profile
    refused: bool
    findings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """The findings for people."""
        return [finding.line() for finding in self.findings]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read from the servers. `monitors` holds `/varz` by address, None where it did not answer."""

    version: str
    max_payload: int
    monitors: Mapping[str, Mapping[str, Any] | None]
    observed: Observed
    marks: Mapping[tuple[str, int], PlacedMark] = field(default_factory=dict)
    intakes: Mapping[str, Intake] = field(default_factory=dict)


# --- looking -------------------------------------------------------------------------------------------------------------


async def check(
    broker: Broker, profile: Profile, partitions: int | None = None, *, monitor_urls: Sequence[str] = ()
) -> Findings:
    """Look at the server and say what is not as `profile` needs it.

    Args:
        broker: a connection that may read every stream's state (provisioner or operator).
        partitions: the number this deployment is meant to have; default: the server's own.
        monitor_urls: monitoring addresses of all servers (`http://host:8222`); without them fsync is unknown.
    """
    before = await topology.observe(broker, profile)
    logs = [p for name in before.streams if (p := log_partition(name)) is not None]
    # Marks before the state of their sources: the other way round, a busy role would seem to be ahead of it.
    marks = {(each.stream, p): await read_mark(broker, each.marked(p, p)) for each in SOURCES for p in sorted(logs)}
    observed = replace(await topology.observe(broker, profile), planned=before.planned)
    seen = await _seen(broker, observed, monitor_urls)
    intakes = {name: await read_intake(broker, stream) for name, stream in seen.observed.streams.items()}
    return judge(replace(seen, marks=marks, intakes=intakes), profile, partitions)


async def report_start(broker: Broker, profile: Profile, monitor_urls: Sequence[str] = ()) -> None:
    """Log what the server does otherwise than `profile` needs, as far as any role may look; a start is never refused.

    Version and largest message always, what is synced to disk where `monitor_urls` tell it, copies in `production`.
    """
    streams = {}
    try:
        events = await broker.stream(EVENTS_STREAM)
        logs = await asyncio.gather(*(broker.stream(log_stream(p)) for p in range(events.partitions or 0)))
        streams = {stream.name: stream for stream in (events, *logs)}
    except BrokerError as error:
        _log.info("copies_not_read", error=str(error))
    for finding in judge_start(await _seen(broker, Observed(streams), monitor_urls), profile):
        _log.warning("server_differs", what=finding.name, detail=finding.detail, remedy=finding.remedy)


async def _seen(broker: Broker, observed: Observed, monitor_urls: Sequence[str]) -> Seen:
    version = broker.nc.connected_server_version
    varz = await asyncio.gather(*map(_varz, monitor_urls))
    monitors = dict(zip(monitor_urls, varz, strict=True))
    return Seen(f"{version.major}.{version.minor}.{version.patch}", broker.nc.max_payload, monitors, observed)


async def _varz(url: str) -> dict[str, Any] | None:
    timeout = aiohttp.ClientTimeout(total=MONITOR_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url.rstrip('/')}/varz") as reply:
            answer = await reply.json()
            # What else listens there, a proxy for one, says nothing of a server.
            return answer if reply.status == 200 and isinstance(answer, dict) and "version" in answer else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


# --- judging -------------------------------------------------------------------------------------------------------------


def judge(seen: Seen, profile: Profile, partitions: int | None = None) -> Findings:
    """The findings on what was read."""
    wanted: Level = "refuse" if profile == "production" else "warn"
    found = [*_version(seen), *_payload(seen), *_sync(seen), *_files(seen, profile, partitions), *_copies(seen)]
    found += [*_ages(seen), *_room(seen), *_waiting(seen), *_positions(seen)]
    findings = tuple(replace(each, level=wanted) if each.level == "wanted" else each for each in found)
    return Findings(profile, any(each.level == "refuse" for each in findings), findings)


def judge_start(seen: Seen, profile: Profile) -> Iterator[Finding]:
    """What is wrong with what any role may read when it starts."""
    found = [*_version(seen), *_payload(seen), *_sync(seen), *(_copies(seen) if profile == "production" else ())]
    return (replace(finding, level="warn") for finding in found if finding.level in ("warn", "wanted"))


def _version(seen: Seen) -> Iterator[Finding]:
    versions = {"connected": seen.version} | {url: str(varz["version"]) for url, varz in seen.monitors.items() if varz}
    numbers = {where: re.match(r"(\d+)\.(\d+)", version) for where, version in versions.items()}
    for where, number in numbers.items():
        if number is None:
            yield Finding("unknown", "version", f"{where} calls its version {versions[where]!r}")
        elif (int(number[1]), int(number[2])) < VERSION_MIN:
            yield Finding("wanted", "version", f"{where} runs {versions[where]}", "Run nats-server 2.14 or later.")
    if all(numbers.values()):
        yield Finding("ok", "version", f"nats-server {', '.join(sorted(set(versions.values())))}")


def _payload(seen: Seen) -> Iterator[Finding]:
    enough = seen.max_payload >= MAX_PAYLOAD_MIN
    detail = f"messages may have {seen.max_payload} bytes"
    yield Finding("ok" if enough else "wanted", "max_payload", detail, "" if enough else "Set max_payload: 2MB.")


def _sync(seen: Seen) -> Iterator[Finding]:
    remedy = "Set SEAMARK_NATS_MONITOR_URLS to the monitoring addresses of all servers."
    if not seen.monitors:
        yield Finding("unknown", "sync_always", "no monitoring address is known, so neither is what is synced", remedy)
    for url, varz in seen.monitors.items():
        config = _dict(_dict((varz or {}).get("jetstream")).get("config"))
        if varz is None:
            yield Finding("unknown", "sync_always", f"{url} does not answer", remedy)
        elif config.get("sync_always"):
            yield Finding("ok", "sync_always", f"{url} syncs to disk before it acknowledges")
        else:
            every = config.get("sync_interval", 0) / 1e9
            detail = f"{url} syncs to disk every {every:.0f} s: a power cut may lose what was accepted"
            yield Finding("wanted", "sync_always", detail, "Set jetstream { sync_interval: always }.")


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _files(seen: Seen, profile: Profile, partitions: int | None) -> Iterator[Finding]:
    """Streams that are missing, without epoch or partitioned otherwise stop every process; the rest is drift."""
    has = remembered_partitions(seen.observed)
    try:
        files = render(profile, has if partitions is None else partitions)
    except TopologyError as error:
        yield Finding("refuse", "files", error.detail, error.remedy)
        return
    # What existed once is missing here like what never was; the plan tells them apart.
    plan = decide(files, seen.observed, lambda: "new", recreate=True)
    for refusal in plan.refusals:
        level: Level = "refuse" if refusal.target == "partitions" else "warn"
        yield Finding(level, "files", f"{refusal.target}: {refusal.detail}", refusal.remedy)
    remedy = "Run seamark topology plan, then apply."
    if missing := [step.target for step in plan.steps if step.action.startswith("create")]:
        yield Finding("refuse", "files", f"missing: {', '.join(missing)}", remedy)
    for step in plan.steps:
        if step.action.startswith("update"):
            fatal = any("no epoch" in why for why in step.why)
            yield Finding("refuse" if fatal else "warn", "files", f"{step.target}: {'; '.join(step.why)}", remedy)
        elif step.action == "begin_planning" and not missing:
            yield Finding("refuse", "files", f"planners wait for a mark at {step.target}", remedy)
        elif step.action == "record_epochs" and not missing:
            yield Finding("refuse", "files", f"epochs are not recorded, {'; '.join(step.why)}", remedy)
    for name, stream in seen.observed.streams.items():
        number = stream.metadata.get(PARTITIONS_KEY, str(has))
        if number != str(has):
            detail = f"{name} was made for {number} partitions, EVENTS for {has}"
            yield Finding("refuse", "files", detail, "Use one number.")
    yield from (Finding("warn", "files", note) for note in plan.notes)
    if plan.empty and not plan.notes:
        yield Finding("ok", "files", f"streams and consumers are as the files say, {files.partitions} partitions")


def _copies(seen: Seen) -> Iterator[Finding]:
    copies = {name: stream.config["num_replicas"] for name, stream in seen.observed.streams.items()}
    few = ", ".join(f"{name} has {number}" for name, number in sorted(copies.items()) if number < COPIES_MIN)
    if few:
        detail = f"a lost disk loses what was accepted: {few}"
        yield Finding("wanted", "replicas", detail, "Run three servers, profile production.")
    behind = {
        f"{stream.name} on {peer['name']}"
        for stream in seen.observed.streams.values()
        for peer in stream.replicas
        if peer.get("offline") or not peer.get("current")
    }
    if behind:
        detail = f"copies that are away or behind: {', '.join(sorted(behind))}"
        yield Finding("warn", "replicas", detail, "Look at that server.")
    if copies and not few and not behind:
        yield Finding("ok", "replicas", f"{COPIES_MIN} copies of every stream, all current")


def _ages(seen: Seen) -> Iterator[Finding]:
    """Marks age with their log: were they gone before the events, a partition would start anew and append twice."""
    ages = {name: stream.config.get("max_age", 0) for name, stream in seen.observed.streams.items()}
    for name, age in ages.items():
        for source in (each.stream for each in SOURCES if each.stream in ages):
            kept = DUE_SECONDS * 1e9 if source == LATER_STREAM else ages[source]
            if is_log(name) and age and (not kept or age <= kept):
                detail = f"{name} keeps records for {age / 86400e9:.3g} days, no longer than {source} keeps events"
                yield Finding("wanted", "max_age", detail, "Let logs outlive events.")


def _room(seen: Seen) -> Iterator[Finding]:
    remedy = "Raise max_bytes in its file (seamark topology size)."
    for name, stream in seen.observed.streams.items():
        bound, watermark = stream.config.get("max_bytes", -1), int(stream.metadata.get(WATERMARK_KEY, 0))
        share = stream.bytes / max(bound, watermark) if max(bound, watermark) > 0 else 0.0
        said = f"{name} is {100 * share:.0f} % full"
        found = room(stream, seen.intakes.get(name, Intake(0, 0.0)))
        rate = "" if found is None else f", {found.detail()}"
        if share > FULL_SHARE and watermark:
            detail = f"{said}: {_BEYOND[name]}"
            yield Finding("warn", "room", detail, f"Raise {WATERMARK_KEY} in its file.")
        elif share > FULL_SHARE:
            yield Finding("warn", "room", f"{said} and will refuse{rate}", remedy)
        elif found is not None:
            yield Finding("warn" if found.soon else "ok", "room", said + rate, remedy if found.soon else "")


def _waiting(seen: Seen) -> Iterator[Finding]:
    """Schedules, and users with jobs, fill the memory of the brokers, whatever their bytes."""
    jobs = seen.observed.streams.get(JOBS_STREAM)
    if jobs is not None and jobs.subjects > FULL_SHARE * JOBS_SUBJECTS_MAX:
        detail = f"{jobs.subjects} schedules and users with jobs wait in JOBS, of {JOBS_SUBJECTS_MAX}: {_BEYOND[JOBS_STREAM]}"
        yield Finding("warn", "room", detail, "Start more workers, or look for the tenant that has made so many.")


_BEYOND: Final = {
    LATER_STREAM: "what is to be sent later will become dead letters",
    JOBS_STREAM: "tenants with much in it get no more jobs than critical ones, and the others become dead letters",
}


def _positions(seen: Seen) -> Iterator[Finding]:
    """A mark beyond the end of its source: it went back, and new events would pass for dispatched ones. The same of planners."""
    for (name, q), (_, mark) in seen.marks.items():
        events = seen.observed.streams.get(name)
        if events and mark and mark.epoch == events.epoch and mark.seq > events.last_seq:
            detail = f"partition {q} has dispatched event {mark.seq}, {name} ends at {events.last_seq}"
            yield Finding("refuse", "positions", detail, f"{RESTORED.format(name)}.")
    jobs = seen.observed.streams.get(JOBS_STREAM)
    for p, placed in seen.observed.planned.items():
        log = seen.observed.streams.get(log_stream(p))
        if log is not None and jobs is not None and placed.mark is not None:
            try:
                meant(placed, log, jobs)
            except PartitionStopped as error:
                yield Finding("refuse", "positions", error.detail, f"{error.remedy}.")
