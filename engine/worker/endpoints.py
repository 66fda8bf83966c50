"""How webhook endpoints fare, noted after each try; those that take nothing any more are taken out of the rules."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import structlog

from engine.broker.jetstream import Broker
from engine.channels.channel import Job, Outcome
from engine.channels.webhook.endpoints import disable, note_attempt
from engine.channels.webhook.signature import message_id
from engine.directory.bell import ring
from engine.directory.changes import changing, changing_in
from engine.directory.changing import Directory
from engine.errors import StoreUnavailable
from engine.postgres import Pool, asking, transaction

_log = structlog.get_logger("seamark.worker")

_USER: Final = "SELECT user_id FROM webhook_endpoints WHERE tenant = $1 AND id = $2"


class Endpoints:
    """Notes tries.

    Args:
        directory: changes users, as an endpoint may be one's own.
        broker: where the bell of rules is rung.
    """

    def __init__(self, pool: Pool, directory: Directory, broker: Broker) -> None:
        self._pool, self._directory, self._broker = pool, directory, broker

    async def note(self, job: Job, outcome: Outcome, began_at: datetime) -> None:
        """Note how a try at an endpoint has ended, which began then. A note that cannot be made is passed over."""
        try:
            async with transaction(self._pool) as connection:
                health = await note_attempt(connection, job.tenant, job.target, outcome, message_id(job.key), began_at)
            if health is not None and health.disabled is not None:
                await self._disable(job.tenant, job.target)
        except StoreUnavailable as error:
            _log.warning("endpoint_not_noted", why=str(error)[:200])

    async def _disable(self, tenant: str, id: str) -> None:
        """The second step, which whoever finds it undone does again: nothing is sent there in between."""
        async with asking(self._pool) as connection:
            user = await connection.fetchval(_USER, tenant, id)
        if user is None:
            async with changing(self._pool, tenant) as change:
                made = await disable(change, id)
        else:
            async with (
                self._directory.changing(tenant, [user]) as of_user,
                changing_in(of_user.connection, tenant) as change,
            ):
                made = await disable(change, id)
                if made:
                    of_user.touch(user)
        if made:
            _log.warning("endpoint_disabled", tenant=tenant, endpoint=id)
            await ring(self._broker)
