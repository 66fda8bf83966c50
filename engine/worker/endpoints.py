"""How webhook endpoints fare, noted after each try; those that take nothing any more are taken out of the rules.

The tenant's other endpoints are told first, by jobs that are the same whoever adds them: a worker that dies in between leaves
something undone that the next report about the endpoint does again, and their claims let each be sent once.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import structlog

from engine.broker.jetstream import Broker
from engine.channels.channel import Job, Outcome
from engine.channels.webhook.endpoints import disable, note_attempt, targets_of
from engine.channels.webhook.health import Health
from engine.channels.webhook.signature import message_id
from engine.directory.bell import ring
from engine.directory.changes import changing, changing_in
from engine.directory.changing import Directory
from engine.errors import BrokerError, StoreUnavailable
from engine.jobs.queue import JobsQueue
from engine.postgres import Pool, asking, transaction

_log = structlog.get_logger("seamark.worker")

DISABLED: Final = "endpoint.disabled"
"""The type of what other endpoints are told."""

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
                await self._disable(job.tenant, job.target, health)
        except (BrokerError, StoreUnavailable) as error:
            _log.warning("endpoint_not_noted", why=str(error)[:200])

    async def _disable(self, tenant: str, id: str, health: Health) -> None:
        """The second step, which whoever finds it undone does again: nothing is sent there in between."""
        async with asking(self._pool) as connection:
            user = await connection.fetchval(_USER, tenant, id)
            others = [one for one in await targets_of(connection, tenant, "", DISABLED) if one != id]
        await JobsQueue(self._broker).add([announcement(tenant, id, user, health, other) for other in others])
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


def announcement(tenant: str, id: str, user: str | None, health: Health, other: str) -> Job:
    """What another endpoint of the tenant is told of one that was disabled.

    Args:
        user: whose endpoint it was; None: the tenant's. It is then about nobody, and named by the endpoint itself.
        health: says why, and since when: disabled anew it is another notification.
    """
    assert health.disabled_at is not None, "it is disabled"
    return Job(
        id=f"{id}.{int(health.disabled_at.timestamp())}",
        tenant=tenant,
        user=user or id,
        type=DISABLED,
        channel="webhook",
        target=other,
        first_at=health.disabled_at,
        stored_at=health.disabled_at,
        requested=True,  # no rule has to say that endpoints are told of this: their own types do
        again=True,
        data={"endpoint": id, "reason": health.disabled, "user": user},
    )
