"""The controls in force as a process knows them: read twice a second, kept when nothing can be read, and said to be old then."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import structlog

from engine.broker.control import ControlBucket
from engine.broker.jetstream import Broker
from engine.controls.document import KEY, PREFIX, Change, Document
from engine.controls.view import Controls
from engine.tasks import Tasks

_log = structlog.get_logger("seamark.controls")

OLD_SECONDS: Final = 5.0
"""Controls last read so long ago are said to be old: ten reads came to nothing. A leader election delays none of them, as
any replica answers."""


class WatchedControls:
    """Follows the document.

    Attributes:
        controls: the newest known; those of an empty document before anything was read.
        on_change: called with the new document and with the changes not heard of before. After the start these are none: what
            was asked for once was asked of processes that ran then.
    """

    def __init__(self, broker: Broker) -> None:
        self._bucket = ControlBucket(broker, msgspec.Raw, PREFIX)
        self._unreadable = ""
        self._known: frozenset[str] | None = None
        self.document = Document()
        self.controls = Controls()
        self.on_change: list[Callable[[Document, list[Change]], None]] = []

    async def run(self) -> None:
        """Follow until cancelled."""
        await self._bucket.watch(self._tell)

    @property
    def age_seconds(self) -> float:
        """How old what is known is; infinite before anything was read."""
        return time.monotonic() - self._bucket.read_at if self._bucket.read_at else math.inf

    def not_ready(self) -> list[str]:
        """Why this process may not obey what operators have set; empty when it does."""
        if not self._bucket.read_at:
            return ["controls are not known yet: the control bucket was not read"]
        age = time.monotonic() - self._bucket.read_at
        if age > OLD_SECONDS:
            return [f"controls are {age:.0f} s old: the control bucket cannot be read"]
        return [self._unreadable] if self._unreadable else []

    def _tell(self, entries: dict[str, msgspec.Raw]) -> None:
        try:
            document = msgspec.json.decode(entries[KEY], type=Document) if KEY in entries else Document()
        except msgspec.DecodeError as error:
            # To go on as before is safer than to go on without any control.
            self._unreadable = (
                "controls were written by a newer version, and cannot be read: the former ones are obeyed"
            )
            _log.error("controls_not_read", why=str(error))
            return
        self._unreadable = ""
        known, self._known = self._known, frozenset(change.id for change in document.changes)
        new = [] if known is None else [change for change in document.changes if change.id not in known]
        self.document, self.controls = document, Controls(document)
        for change in new:
            _log.info("controls_changed", action=change.action, number=change.number)
        for callback in self.on_change:
            callback(document, new)


@asynccontextmanager
async def watched_controls(broker: Broker) -> AsyncIterator[WatchedControls]:
    """The controls, followed until the block ends."""
    watched, tasks = WatchedControls(broker), Tasks()
    tasks.begin(watched.run(), "controls")
    try:
        yield watched
    finally:
        await tasks.end()
