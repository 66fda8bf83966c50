"""Webhooks as a channel: a notification becomes a signed JSON document, posted to one endpoint."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from engine.channels.channel import Context, Job, Outcome
from engine.channels.exchange import Silence, exchange, open_http
from engine.channels.webhook.guard import Guard, GuardedResolver, Lookup, Network, Server
from engine.channels.webhook.schedule import TABLE
from engine.channels.webhook.signature import message_id, signed_headers
from engine.directory.webhook_urls import check_url
from engine.plan.rules import Channel as ChannelName

PROVIDER: Final = "webhook"

ANSWER_SECONDS_MAX: Final = 20.0
"""How long an endpoint may take: Standard Webhooks recommends 15 to 30 s. Whoever needs longer answers first and works then."""

CONNECTIONS_MAX: Final = 256
"""At once, of one worker."""

CONNECTIONS_PER_HOST_MAX: Final = 32
"""The same to one host: an endpoint that hangs holds each for ANSWER_SECONDS_MAX, and must not hold all."""


class Endpoint(msgspec.Struct, frozen=True):
    """Where a webhook goes.

    Args:
        id: of the endpoint.
        url: https, as it was checked when it was stored.
        secrets: that are good, the newest one first.
    """

    id: str
    url: str
    secrets: Sequence[str]

    def __repr__(self) -> str:
        """Without the address, which may have a password of its own in its path, and without secrets."""
        return f"Endpoint(id={self.id!r})"


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """The document that is posted. `timestamp`: when the notification was first to be sent."""

    type: str
    timestamp: datetime
    id: str
    user: str
    data: Any


class WebhookChannel:
    """See `engine.channels.channel.Channel`. A target is an Endpoint, a rendered notification the bytes of a document.

    It reaches public servers only. It is made within a running loop.

    Args:
        exempt: networks that may be reached, too; see `Guard`.
        hosts: names that lead to servers of the operator's choice, which may be private ones; see `GuardedResolver`.
        lookup: finds the addresses of a name; none: the system does.
        tls: whom to trust; none: the authorities of the system.
        clock: seconds since 1970.
    """

    name: ChannelName = "webhook"

    def __init__(
        self,
        *,
        exempt: Sequence[Network] = (),
        hosts: Mapping[str, Server] | None = None,
        lookup: Lookup | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        guard = Guard(exempt, tuple((hosts or {}).values()))
        self._clock = clock
        self._resolver = GuardedResolver(guard, lookup, hosts)
        self._http = open_http(
            connections_max=CONNECTIONS_MAX,
            connections_per_host_max=CONNECTIONS_PER_HOST_MAX,
            resolver=self._resolver,
            socket_factory=guard.socket,
            tls=tls,
        )

    def render(self, job: Job, context: Context) -> bytes:
        """The document. Templates are for people: programs get the data as it is."""
        notice = Notice(type=job.type, timestamp=job.first_at.astimezone(UTC), id=job.id, user=job.user, data=job.data)
        return msgspec.json.encode(notice)

    async def send(self, rendered: bytes, target: Endpoint, *, key: str, deadline_seconds: float) -> Outcome:
        """Post a document. Attempts have the same `webhook-id`, and each its own time and signatures."""
        try:
            check_url(target.url)
        except ValueError:  # stored before a rule was made stricter
            return TABLE.judged(PROVIDER, 0, "blocked")
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Seamark-Webhooks/1",
            **signed_headers(target.secrets, message_id(key), int(self._clock()), rendered),
        }
        seconds = min(deadline_seconds, ANSWER_SECONDS_MAX)
        reply = await exchange(self._http, target.url, headers=headers, body=rendered, deadline_seconds=seconds)
        if isinstance(reply, Silence):
            return msgspec.structs.replace(TABLE.judged(PROVIDER, 0, reply.why), unanswered=reply.left)
        asked = reply.retry_after_seconds
        outcome = TABLE.judged(PROVIDER, reply.status, retry_after_seconds=asked)
        if asked is not None and outcome.kind == "transient":
            outcome = msgspec.structs.replace(outcome, kind="throttled", scope="target")
        return outcome

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()
        await self._resolver.close()
