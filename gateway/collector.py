"""The garbage collector, led by hand in a process that holds many long-lived sessions.

A session is about a hundred tracked objects, all released by their reference counts when it ends (a test holds them to
that), so the collector finds nothing among them. By its defaults it looks through all of them again and again while a
reconnect storm builds them up: a third of the storm's CPU, and pauses of hundreds of milliseconds for everybody.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Final

LOOK_SECONDS: Final = 1.0
"""Between two looks at how many objects are new."""

YOUNG: Final = 10_000
"""New objects that are worth a look: some milliseconds' work."""

STORM: Final = 50_000
"""More new objects than that within a second are sessions that join. They are set aside unseen: looking would stop the
loop for tens of milliseconds, when it has the least time, to find nothing."""

WHOLE_SECONDS: Final = 600.0
"""Between two collections of all that is not set aside; what they leave is set aside as well."""

_keeper: asyncio.Task[None] | None = None


def tune() -> None:
    """Take the collector over. For a process that serves nothing but a gateway, once, in its loop."""
    global _keeper
    gc.collect()
    gc.freeze()
    gc.disable()
    _keeper = asyncio.create_task(_keep(), name="garbage-collector")


async def _keep() -> None:
    loop = asyncio.get_running_loop()
    whole_at = loop.time() + WHOLE_SECONDS
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if loop.time() >= whole_at:
            gc.collect()
            gc.freeze()
            whole_at = loop.time() + WHOLE_SECONDS
            continue
        # The count is of those made less those released, old ones included: there are at least so many new ones.
        new = gc.get_count()[0]
        if new >= STORM or (new >= YOUNG and len(gc.get_objects(0)) >= STORM):
            gc.freeze()
        elif new >= YOUNG:
            gc.collect(0)
