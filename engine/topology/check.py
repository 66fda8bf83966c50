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

from engine.broker.jetstream import Broker
from engine.dispatch.source import EVENTS
from engine.errors import BrokerError, TopologyError
from engine.limits import MONITOR_SECONDS
from engine.log.incarnations import SOURCE_RESTORED
from engine.log.marks import PlacedMark
from engine.log.writer import read_mark
from engine.topology import server as topology
from engine.topology.files import Profile, log_partition, render
from engine.topology.plan import PARTITIONS_KEY, Observed, ObservedStream, decide, remembered_partitions
from engine.topology.room import Intake, read_intake, room
from engine.topology.size import FULL_SHARE
from seamark.protocol.subjects import EVENTS_STREAM, log_stream

VERSION_MIN: Final = (2, 14)
"""CONSUMER.RESET, the reading head's way back to a position, is in 2.14 and later."""

MAX_PAYLOAD_MIN: Final = 2 << 20
"""An event has up to 1 MiB, a dead letter is a whole event with more headers."""

COPIES_MIN: Final = 3
"""With three copies a stored record survives the loss of any one disk, and a quorum remains to elect a leader."""

_log = structlog.get_logger("seamark.server")

Level = Literal["ok", "unknown", "warn", "refuse"]


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
    """All that was looked at, in a stable order."""

    profile: Profile
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        """Whether a process should not start on this server."""
        return any(finding.level == "refuse" for finding in self.findings)

    def lines(self) -> list[str]:
        """The findings for people."""
        return [finding.line() for finding in self.findings]

    def to_json(self) -> dict[str, Any]:
        """The findings for programs."""
        return {
            "profile": self.profile,
            "refused": self.refused,
            "findings": [
                {"level": found.level, "name": found.name, "detail": found.detail, "remedy": found.remedy}
                for found in self.findings
            ],
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read from the servers. `monitors` holds `/varz` by address, None where it did not answer."""

    version: str
    max_payload: int
    monitors: Mapping[str, Mapping[str, Any] | None]
    observed: Observed
    clusters: Mapping[str, Mapping[str, Any]]
    marks: Mapping[int, PlacedMark]
    intakes: Mapping[str, Intake] = field(default_factory=dict)


async def check(
    broker: Broker, profile: Profile, partitions: int | None = None, *, monitor_urls: Sequence[str] = ()
) -> Findings:
    """Look at the server and say what is not as `profile` needs it.

    Args:
        broker: a connection that may read every stream's state (provisioner or operator).
        profile: `dev` warns, `production` refuses.
        partitions: the number this deployment is meant to have; default: the server's own.
        monitor_urls: monitoring addresses of all servers (`http://host:8222`); without them fsync is unknown.

    Raises:
        Unavailable, Unanswered, ApiError: the server cannot be read.
    """
    return judge(await look(broker, profile, monitor_urls), profile, partitions)


async def look(broker: Broker, profile: Profile, monitor_urls: Sequence[str] = ()) -> Seen:
    """Read what there is to judge."""
    observed = await topology.observe(broker, profile)
    # Marks before the state of EVENTS: the other way round, a busy dispatcher would seem to be ahead of it.
    partitions = sorted(p for name in observed.streams if (p := log_partition(name)) is not None)
    marks = {p: await read_mark(broker, EVENTS.marked(p, p)) for p in partitions}
    infos = {name: await broker.api(f"STREAM.INFO.{name}") for name in observed.streams}
    streams = {name: topology.observed_stream(info) for name, info in infos.items()}
    clusters = {name: info.get("cluster") or {} for name, info in infos.items()}
    monitors = dict(zip(monitor_urls, await asyncio.gather(*map(_varz, monitor_urls)), strict=True))
    intakes = {name: await read_intake(broker, name, stream) for name, stream in streams.items()}
    return Seen(
        _version_of(broker),
        broker.nc.max_payload,
        monitors,
        replace(observed, streams=streams),
        clusters,
        marks,
        intakes,
    )


async def report_start(broker: Broker, profile: Profile, monitor_urls: Sequence[str] = ()) -> None:
    """Log what the server does otherwise than `profile` needs, as far as any role may look; a start is never refused.

    Version and largest message always, what is synced to disk where `monitor_urls` tell it, copies in `production`.
    """
    try:
        streams = await _streams_at_start(broker)
    except BrokerError as error:
        _log.info("copies_not_read", error=str(error))
        streams = {}
    varz = await asyncio.gather(*map(_varz, monitor_urls))
    monitors = dict(zip(monitor_urls, varz, strict=True))
    seen = Seen(_version_of(broker), broker.nc.max_payload, monitors, Observed(streams), {}, {})
    for finding in judge_start(seen, profile):
        _log.warning("server_differs", what=finding.name, detail=finding.detail, remedy=finding.remedy)


async def _streams_at_start(broker: Broker) -> dict[str, ObservedStream]:
    partitions = (await broker.stream(EVENTS_STREAM)).partitions or 0
    names = [EVENTS_STREAM, *(log_stream(p) for p in range(partitions))]
    infos = await asyncio.gather(*(broker.api(f"STREAM.INFO.{name}") for name in names))
    return {info["config"]["name"]: topology.observed_stream(info) for info in infos}


def judge_start(seen: Seen, profile: Profile) -> Iterator[Finding]:
    """What is wrong with what any role may read when it starts."""
    found = [*_version(seen, "warn"), *_payload(seen, "warn"), *(_sync(seen, "warn") if seen.monitors else ())]
    if profile == "production":
        found += _copies(seen, "warn")
    return (finding for finding in found if finding.level == "warn")


def _version_of(broker: Broker) -> str:
    version = broker.nc.connected_server_version
    return f"{version.major}.{version.minor}.{version.patch}"


async def _varz(url: str) -> dict[str, Any] | None:
    timeout = aiohttp.ClientTimeout(total=MONITOR_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{url.rstrip('/')}/varz") as reply:
            answer = await reply.json()
            # What else listens there, a proxy for one, says nothing of a server.
            return answer if reply.status == 200 and isinstance(answer, dict) and "version" in answer else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


def judge(seen: Seen, profile: Profile, partitions: int | None = None) -> Findings:
    """The findings on what was read."""
    bad: Level = "refuse" if profile == "production" else "warn"
    findings = [
        *_version(seen, bad),
        *_payload(seen, bad),
        *_sync(seen, bad),
        *_files(seen, profile, partitions),
        *_copies(seen, bad),
        *_ages(seen, bad),
        *_room(seen),
        *_positions(seen),
    ]
    return Findings(profile, tuple(findings))


def _version(seen: Seen, bad: Level) -> Iterator[Finding]:
    versions = {"connected": seen.version} | {url: str(varz["version"]) for url, varz in seen.monitors.items() if varz}
    for where, version in versions.items():
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None:
            yield Finding("unknown", "version", f"{where} calls its version {version!r}")
        elif (int(numbers[1]), int(numbers[2])) < VERSION_MIN:
            yield Finding(bad, "version", f"{where} runs {version}", "Run nats-server 2.14 or later.")
    if not versions or all(re.match(r"\d+\.\d+", version) for version in versions.values()):
        yield Finding("ok", "version", f"nats-server {', '.join(sorted(set(versions.values())))}")


def _payload(seen: Seen, bad: Level) -> Iterator[Finding]:
    if seen.max_payload < MAX_PAYLOAD_MIN:
        yield Finding(bad, "max_payload", f"messages may have {seen.max_payload} bytes", "Set max_payload: 2MB.")
    else:
        yield Finding("ok", "max_payload", f"messages may have {seen.max_payload} bytes")


def _sync(seen: Seen, bad: Level) -> Iterator[Finding]:
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
            yield Finding(bad, "sync_always", detail, "Set jetstream { sync_interval: always }.")


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
        elif step.action == "record_epochs" and not missing:
            yield Finding("refuse", "files", f"epochs are not recorded, {'; '.join(step.why)}", remedy)
    for name, stream in seen.observed.streams.items():
        number = stream.metadata.get(PARTITIONS_KEY)
        if number is not None and number != str(has):
            yield Finding(
                "refuse", "files", f"{name} was made for {number} partitions, EVENTS for {has}", "Use one number."
            )
    for note in plan.notes:
        yield Finding("warn", "files", note)
    if plan.empty and not plan.notes:
        yield Finding("ok", "files", f"streams and consumers are as the files say, {files.partitions} partitions")


def _copies(seen: Seen, bad: Level) -> Iterator[Finding]:
    few = {
        name: copies for name, s in seen.observed.streams.items() if (copies := s.config["num_replicas"]) < COPIES_MIN
    }
    if few:
        shown = ", ".join(f"{name} has {copies}" for name, copies in sorted(few.items()))
        yield Finding(
            bad, "replicas", f"a lost disk loses what was accepted: {shown}", "Run three servers, profile production."
        )
    behind = {
        f"{name} on {peer['name']}"
        for name, cluster in seen.clusters.items()
        for peer in cluster.get("replicas") or []
        if peer.get("offline") or not peer.get("current")
    }
    if behind:
        yield Finding(
            "warn", "replicas", f"copies that are away or behind: {', '.join(sorted(behind))}", "Look at that server."
        )
    if not few and not behind and seen.observed.streams:
        yield Finding("ok", "replicas", f"{COPIES_MIN} copies of every stream, all current")


def _ages(seen: Seen, bad: Level) -> Iterator[Finding]:
    """Marks age with their log: were they gone before the events, a partition would start anew and append twice."""
    events = seen.observed.streams.get("EVENTS")
    if events is None:
        return
    kept = events.config.get("max_age", 0)
    for name, stream in seen.observed.streams.items():
        age = stream.config.get("max_age", 0)
        if log_partition(name) is not None and age and (not kept or age <= kept):
            days = age / 86400e9
            detail = f"{name} keeps records for {days:.3g} days, no longer than EVENTS keeps events"
            yield Finding(bad, "max_age", detail, "Let logs outlive events.")


def _room(seen: Seen) -> Iterator[Finding]:
    remedy = "Raise max_bytes in its file (seamark topology size)."
    for name, stream in seen.observed.streams.items():
        bound = stream.config.get("max_bytes", -1)
        if bound <= 0:
            continue
        share = stream.bytes / bound
        said = f"{name} is {100 * share:.0f} % full"
        found = room(stream, seen.intakes.get(name, Intake(0, 0.0)))
        rate = "" if found is None else f", {found.detail()}"
        if share > FULL_SHARE:
            yield Finding("warn", "room", f"{said} and will refuse{rate}", remedy)
        elif found is not None:
            soon = stream.asked_at is not None and found.soon(stream.asked_at)
            yield Finding("warn" if soon else "ok", "room", said + rate, remedy if soon else "")


def _positions(seen: Seen) -> Iterator[Finding]:
    """A mark beyond the end of EVENTS: EVENTS went back, and new events would pass for dispatched ones."""
    events = seen.observed.streams.get("EVENTS")
    for q, placed in seen.marks.items():
        if events and placed.mark and placed.mark.epoch == events.epoch and placed.mark.seq > events.last_seq:
            yield Finding(
                "refuse",
                "positions",
                f"partition {q} has dispatched event {placed.mark.seq}, EVENTS ends at {events.last_seq}",
                f"{SOURCE_RESTORED.format(EVENTS_STREAM)}.",
            )
