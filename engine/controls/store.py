"""Reading and changing the document in the control bucket: by compare-and-set, as there may be two operators."""

from __future__ import annotations

import secrets
import time
from typing import Final, NamedTuple

import msgspec

from engine.broker.control import CONTROL_STREAM, ControlBucket
from engine.broker.jetstream import Broker
from engine.broker.refusals import is_missing, is_overtaken
from engine.controls.changing import Asked, change
from engine.controls.document import KEY, PREFIX, Document, InForce, Rehydrate
from engine.errors import ApiError, TopologyError
from seamark.protocol.errors import SeamarkError

TRIES_MAX: Final = 10
"""Attempts at a compare-and-set that changes of other controls keep winning."""


class ChangedMeanwhile(SeamarkError):
    """Somebody else was quicker; nothing was changed. The message says who, and what to do."""


class Read(NamedTuple):
    """The document, and its version: the revision that the bucket has it under: 0 where none was ever written."""

    document: Document
    version: int


class ControlStore:
    """Where controls are changed. Every call raises BrokerError as `Broker` does, and TopologyError without a bucket."""

    def __init__(self, broker: Broker) -> None:
        self._bucket = ControlBucket(broker, Document, PREFIX)

    async def read(self) -> Read:
        """The document as the leader has it.

        Raises:
            TopologyError: there is no bucket, or a newer version has written what this one cannot read.
        """
        try:
            entry = await self._bucket.get(KEY)
        except msgspec.DecodeError as error:
            remedy = "Change controls with the version that has written them."
            raise TopologyError(f"the controls in the bucket cannot be read ({error})", remedy) from error
        except ApiError as error:
            if is_missing(error):
                raise TopologyError(f"there is no stream {CONTROL_STREAM}", "Run `seamark topology apply`.") from error
            raise
        return Read(entry.value or Document(), entry.revision)

    async def change(self, asked: Asked, *, version: int | None = None) -> Read:
        """Make a change; returns what is stored then.

        Args:
            version: what the document must have for it; None: whichever, as long as nobody changes the same control meanwhile.

        Raises:
            ChangedMeanwhile: it has another version, or somebody changes the same control. InvalidControl, TooManyChanges: see
                `change`.
        """
        first: InForce | None = None
        id = secrets.token_hex(8)
        for attempt in range(TRIES_MAX):
            document, seen = await self.read()
            found = None if isinstance(asked.target, Rehydrate) else document.find(asked.target.scope)
            if version is not None and seen != version:
                raise ChangedMeanwhile(f"the controls have version {seen} by now{_by(document)}: look at them again")
            if attempt and found != first:
                raise ChangedMeanwhile(f"this control was changed at the same time{_by(document)}: look at it again")
            first = found
            changed = change(document, asked, id=id, now=time.time())
            try:
                return Read(changed, await self._bucket.put(KEY, changed, seen))
            except ApiError as error:
                if not is_overtaken(error):
                    raise
        raise ChangedMeanwhile("others keep changing controls: try again in a moment")


def _by(document: Document) -> str:
    return f", last changed by {document.changes[-1].who}" if document.changes else ""
