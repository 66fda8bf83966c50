"""What a gateway does when operators change controls: devices read their logs again, and `control_log` gets a row.

What is only looked up, such as throttles, needs nothing done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from engine.controls.document import Change, Document, Rehydrate
from engine.controls.log import LogWriter
from engine.tasks import Tasks
from gateway.context import Context
from gateway.limits import REHYDRATED_PER_SECOND
from gateway.session.registry import Member

_log = structlog.get_logger("seamark.obeying")


def obey(context: Context, postgres_url: str | None) -> Tasks:
    """Follow the controls from now on; what is returned has to be ended.

    Args:
        postgres_url: where `control_log` is; None: other processes write it.
    """
    tasks = Tasks()

    def rehydrated(_: Document, new: list[Change]) -> None:
        for change in new:
            if isinstance(change.after, Rehydrate):
                tasks.begin(rehydrate(context, change.after), "rehydrate")

    context.controls.on_change.append(rehydrated)
    if postgres_url is not None:
        writer = LogWriter(postgres_url)
        context.controls.on_change.append(writer.note)
        tasks.begin(writer.run(), "control-log")
    tasks.begin(context.controls.run(), "controls")
    return tasks


async def rehydrate(context: Context, asked: Rehydrate) -> None:
    """Have the sessions of a user read their log again, or little by little those of a tenant."""
    sessions: Sequence[Member]
    if asked.user is not None:
        sessions = context.sessions.of_user(asked.tenant, asked.user)
    else:
        sessions = context.sessions.of_tenant(asked.tenant)
    for number, session in enumerate(sessions, 1):
        session.rehydrate()
        if number % (REHYDRATED_PER_SECOND // 10) == 0:
            await asyncio.sleep(0.1)
    _log.info("sessions_rehydrated", sessions=len(sessions))
