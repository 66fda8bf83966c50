"""What `seamark campaign` is held against."""

from __future__ import annotations

import json
from pathlib import Path

from ops.exitcode import MISCONFIGURED
from tests.support.commandchecks.checking import checks, lines, records
from tests.support.manual import Manual
from tests.support.waiting import wait_for


@checks("campaign start")
def _campaign_start(reader: Manual, folder: Path) -> None:
    """Three users of whom one is excluded have it in their logs, and a repetition adds nothing."""
    users = ["erin", "frank", "grace"]
    asked = {"id": "c1", "audience": {"users": users}, "exclude": {"users": ["grace"]}}
    asked["message"] = {"type": "sale.autumn", "data": {"off": 20}}
    words = ["campaign", "start", "--file", "-", "--json"]
    [size] = lines(reader.seamark(*words, "--dry-run", text=json.dumps(asked)))
    decided = {"sample": 2, "decisions": {"inapp": {"now: default": 2}}}
    assert size == {"audience": 3, "recipients": 2, "reasons": {"excluded": 1}, **decided}
    assert lines(reader.seamark(*words, text=json.dumps(asked))) == [{"id": "c1", "created": True}]
    wait_for(lambda: all(records(reader, user) for user in users[:2]))
    assert lines(reader.seamark(*words, text=json.dumps(asked))) == [{"id": "c1", "created": False}]
    over = {"state": "done", "audience": 3, "dispatched": 2, "excluded": 1}.items()  # what is counted comes after it
    wait_for(lambda: lines(reader.seamark("campaign", "progress", "c1", "--follow", "--json"))[-1].items() >= over)
    assert [len(records(reader, user)) for user in users] == [1, 1, 0]
    reader.seamark("campaign", "start", "--id", "no blanks", "--everyone", "--type", "a", code=MISCONFIGURED)


@checks("campaign ls")
def _campaign_ls(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c2")
    assert "c2" in [each["id"] for each in lines(reader.seamark("campaign", "ls", "--json"))]


@checks("campaign show")
def _campaign_show(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c3")
    [asked] = lines(reader.seamark("campaign", "show", "c3"))
    assert asked["message"] == {"type": "sale.winter", "data": {}}
    reader.seamark("campaign", "show", "no-such-campaign", code=1)


@checks("campaign progress")
def _campaign_progress(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c4")
    assert "c4  running" in reader.seamark("campaign", "progress", "c4")


@checks("campaign channels")
def _campaign_channels(reader: Manual, folder: Path) -> None:
    reader.seamark("campaign", "start", "--id", "c8", "--type", "sale.autumn", "--user", "heidi")
    counted = {"channels": {"inapp": {"total": 1, "states": {"stored": 1}, "reasons": {}}}}
    wait_for(lambda: lines(reader.seamark("campaign", "channels", "c8", "--json")) == [counted])
    reader.seamark("campaign", "channels", "no-such-campaign", code=1)


@checks("campaign pause")
def _campaign_pause(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c5")
    assert _state(reader, "pause", "c5") == "paused"
    assert _state(reader, "resume", "c5") == "running"


@checks("campaign resume")
def _campaign_resume(reader: Manual, folder: Path) -> None:
    _campaign_pause(reader, folder)


@checks("campaign cancel")
def _campaign_cancel(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c6")
    assert _state(reader, "cancel", "c6") == "cancelled"


@checks("campaign rate")
def _campaign_rate(reader: Manual, folder: Path) -> None:
    _campaign(reader, "c7")
    [progress] = lines(reader.seamark("campaign", "rate", "c7", "10", "--json"))
    assert progress["rate"] == 10


def _campaign(reader: Manual, id: str) -> None:
    """One that begins in ten years."""
    words = ["--type", "sale.winter", "--user", "erin", "--start-at", "2036-01-31T12:00:00Z"]
    reader.seamark("campaign", "start", "--id", id, *words)


def _state(reader: Manual, change: str, id: str) -> str:
    [progress] = lines(reader.seamark("campaign", change, id, "--json"))
    return str(progress["state"])
