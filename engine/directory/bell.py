"""The bell: one key of the control bucket, whose every change means that rules of some tenant have changed.

It says no more than that. What has changed stands in PostgreSQL, so a ring that is lost or comes twice does no harm, and the
bucket has one small entry however many tenants there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from engine.broker.control import ControlBucket
from engine.broker.jetstream import Broker
from engine.broker.refusals import is_overtaken
from engine.errors import BrokerError
from engine.limits import BELL_SECONDS

PREFIX: Final = "rules."
KEY: Final = "changed"

_log = structlog.get_logger("seamark.rules")


async def ring(broker: Broker) -> None:
    """Have all processes compare the versions of rules; call it once the change is stored.

    A ring that does not get through is only logged: the change is stored, and processes find it by themselves.
    """
    control = ControlBucket(broker, int, PREFIX)
    try:
        async with asyncio.timeout(BELL_SECONDS):
            revision = (await control.get(KEY)).revision
            # Whoever was faster has rung after our change was stored: processes that hear it find ours, too.
            await control.put(KEY, revision, revision)
    except (BrokerError, TimeoutError) as error:
        if not is_overtaken(error):
            _log.warning("rules_bell_not_rung", error=type(error).__name__)


async def listen(broker: Broker, heard: Callable[[], None]) -> None:
    """Call `heard` now and at each ring, until it is cancelled."""
    await ControlBucket(broker, int, PREFIX).watch(lambda _: heard())
