"""Publishing events, over NATS or over the gateway's HTTP interface, with the same call and the same promise."""

from __future__ import annotations

import asyncio
import time as clock
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, Self, TypeVar

import aiohttp

from seamark.backoff import Backoff
from seamark.client.errors import Again, ConnectionClosed, PublishFailed, PublishRefused
from seamark.client.over_http import OverHttp
from seamark.client.over_nats import OverNats
from seamark.client.traces import publishing
from seamark.protocol import now
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import Event, encode, new_event_id

T = TypeVar("T")

BUDGET_SECONDS: Final = 30.0
"""How long passing failures are retried: an election among brokers takes 4 to 9 s, a restart somewhat longer."""

CONNECT_BUDGET_SECONDS: Final = 10.0

_ARGUMENTS: Final = frozenset({*Event.__struct_fields__, "key"})
"""Fields of an event that have an argument of their own, so `extra` cannot hold them."""


class Published(NamedTuple):
    """The engine's word that an event is stored.

    Attributes:
        event_id: the event's id; publishing it again adds nothing.
        seq: its sequence in its stream of events, None where the way does not tell it.
        duplicate: it was stored before, and this call changed nothing.
    """

    event_id: str
    seq: int | None
    duplicate: bool


class Publisher:
    """Publishes events; returns only once they are stored.

    ```python
    async with Publisher(nats_url="nats://127.0.0.1:4222") as publisher:
        await publisher.publish(to=["alice"], type="order.shipped", data={"order": 17})
    ```

    Where the app has set up OpenTelemetry, publishing is a span of its, and one trace follows the event to the device.

    Args:
        nats_url: the broker; for services inside. Several servers are separated by commas.
        user: of the broker's account, where it has accounts (or in `nats_url`).
        password: of that user.
        credentials_file: a NATS credentials file instead; needs the extra `seamark[credentials]`.
        inbox_prefix: where answers arrive; `_INBOX_<user>` for a named user, as `nats/accounts.conf` has it.
        gateway_url: the gateway instead, with `api_key`; for everyone else.
        api_key: names the tenant too.
        tenant: whose event it is; over HTTP the key decides.
        budget_seconds: how long passing failures (elections, restarts, time-outs) are retried.
        http: an aiohttp session to use for the gateway; the app closes it.

    Raises:
        ValueError: not exactly one of `nats_url` and `gateway_url`, or a gateway without a key.
    """

    def __init__(
        self,
        *,
        nats_url: str | None = None,
        user: str | None = None,
        password: str | None = None,
        credentials_file: str | None = None,
        inbox_prefix: str | None = None,
        gateway_url: str | None = None,
        api_key: str | None = None,
        tenant: str = "default",
        budget_seconds: float = BUDGET_SECONDS,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        self._tenant = tenant
        self._budget_seconds = budget_seconds
        self._is_open = False
        self._way: OverNats | OverHttp
        if nats_url is not None and gateway_url is None:
            self._way = OverNats(nats_url, user, password, credentials_file, inbox_prefix)
        elif gateway_url is not None and nats_url is None and api_key:
            self._way = OverHttp(gateway_url, api_key, http)
        else:
            raise ValueError("give either nats_url, or gateway_url with api_key")

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            PublishFailed: no broker has taken us in within 10 s.
        """
        self._is_open = True
        try:
            await self._persist(self._way.open, CONNECT_BUDGET_SECONDS)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; publishes under way fail."""
        self._is_open = False
        await self._way.close()

    async def publish(
        self,
        *,
        to: str | Sequence[str],
        type: str,
        data: Any = None,
        id: str | None = None,
        key: str | None = None,
        source: str | None = None,
        time: datetime | None = None,
        priority: str | None = None,
        category: str | None = None,
        semantics: str | None = None,
        collapse_key: str | None = None,
        expires_at: datetime | None = None,
        send_at: datetime | None = None,
        channels: Sequence[str] | None = None,
        transaction_id: str | None = None,
        subject: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Published:
        """Publish one event and wait until it is stored.

        A repetition with the same id adds nothing, so a caller that got an error may simply try again with it.

        Args:
            to: one user, or up to 10 000. Over HTTP also `topic:<name>`: the members of a topic.
            type: dot-separated words, such as `order.shipped`.
            data: anything JSON, at most 256 KiB.
            id: names the event for good; random if absent.
            key: the ordering key: events with one key reach logs in the order they were published. The user where
                `to` names one, else the event's id (no order among them).
            source: the service it comes from.
            time: when it happened, with an offset; when it was stored if absent.
            priority: critical, high, normal or low.
            category: what users set preferences for.
            semantics: at_least_once, effectively_once, or at_most_once: shown to who is connected now, and never stored.
                Such a message is handed over once. `PublishFailed` then says that nobody may have got it.
            collapse_key: only the newest record per key counts as unread.
            expires_at: not delivered after it.
            send_at: when it is sent, at most 30 days ahead; at once, if that is past.
            channels: only these channels.
            transaction_id: names what the event belongs to.
            subject: what the event is about, as CloudEvents has it.
            extra: fields that Seamark does not know; they are kept with the event as they are.

        Raises:
            InvalidEvent: the event cannot be accepted; the message names the field and the remedy.
            PublishRefused: it cannot be stored (full store, key not allowed …). PublishFailed: the budget was spent.
            ConnectionClosed: the publisher is not open.
        """
        if known := sorted((extra or {}).keys() & _ARGUMENTS):
            raise InvalidEvent(
                known[0], f"`{known[0]}` is no extra field: give it as an argument, the ordering key as `key`"
            )
        id = id if id is not None else new_event_id()
        if semantics == "at_most_once":
            fields = {
                "source": source, "time": time, "priority": priority, "category": category, "subject": subject,
                "semantics": semantics, "expires_at": expires_at, "ordering_key": key, "collapse_key": collapse_key,
                "send_at": send_at, "channels": channels, "transaction_id": transaction_id, **(extra or {}),
            }  # fmt: skip
            return await self._now(id, [to] if isinstance(to, str) else list(to), type, data, fields)
        # Over HTTP there is no subject to carry the two.
        over_http = isinstance(self._way, OverHttp)
        told = {"type": type, "ordering_key": key} if over_http else {}
        event = encode(
            to=[to] if isinstance(to, str) else list(to),
            type=type,
            tenant=self._tenant,
            data=data,
            id=id,
            key=key,
            source=source,
            time=time,
            priority=priority,
            category=category,
            semantics=semantics,
            collapse_key=collapse_key,
            expires_at=expires_at,
            send_at=send_at,
            channels=list(channels) if channels is not None else None,
            transaction_id=transaction_id,
            subject=subject,
            unknown={**(extra or {}), **told},
            topics=over_http,
        )
        with publishing(event.subject) as trace:
            seq, duplicate = await self._persist(lambda: self._way.attempt(event, trace), self._budget_seconds)
        return Published(id, seq, duplicate)

    async def broadcast(self, *, type: str, data: Any = None, id: str | None = None) -> str:
        """Show a message to all of the tenant's users who are connected now; it is not stored. Returns its id.

        Over HTTP the key needs the scope `broadcasts:write`.

        Raises:
            InvalidEvent, PublishRefused, ConnectionClosed: as `publish`. PublishFailed: nobody may have got it.
        """
        id = id if id is not None else new_event_id()
        message = now.encode_broadcast(type=type, tenant=self._tenant, id=id, data=data)
        way = self._way
        if isinstance(way, OverHttp):
            body = {"id": id, "type": type, **({} if data is None else {"data": data})}
            await self._once(way.post("v1/broadcasts", body))
        else:
            await self._once(way.pass_on([message]))
        return id

    async def _now(self, id: str, to: list[str], type: str, data: Any, fields: dict[str, Any]) -> Published:
        messages = now.encode(to=to, type=type, tenant=self._tenant, id=id, data=data, fields=fields)
        way = self._way
        if isinstance(way, OverHttp):
            given = {name: value for name, value in fields.items() if value is not None}
            body = {**given, "id": id, "to": to, "type": type, **({} if data is None else {"data": data})}
            await self._once(way.post("v1/events", body))
        else:
            await self._once(way.pass_on(messages))
        return Published(id, None, False)

    async def _once(self, attempt: Coroutine[Any, Any, None]) -> None:
        """One attempt: another one could show the message twice."""
        if not self._is_open:
            attempt.close()
            raise ConnectionClosed("the publisher is not open: use `async with`")
        try:
            async with asyncio.timeout(self._way.attempt_seconds):
                await attempt
        except (Again, TimeoutError) as error:
            raise PublishFailed(f"the message may not have been sent ({error})") from error

    async def _persist(self, attempt: Callable[[], Awaitable[T]], budget_seconds: float) -> T:
        """Attempt it until it succeeds, is refused, or the budget is spent. Every attempt means the same event."""
        backoff = Backoff(first_seconds=0.1, max_seconds=2.0)
        deadline = clock.monotonic() + budget_seconds
        failed: Again | None = None
        while self._is_open:
            try:
                async with asyncio.timeout(max(0.1, min(self._way.attempt_seconds, deadline - clock.monotonic()))):
                    return await attempt()
            except PublishRefused as refused:
                if failed is None:
                    raise
                # An earlier attempt may have stored it.
                raise PublishFailed(f"{PublishFailed.__doc__} ({refused})") from refused
            except (Again, TimeoutError) as error:
                failed = error if isinstance(error, Again) else Again(f"no answer in time from {self._way.address}")
            delay = failed.wait_seconds + backoff.next_seconds()
            if deadline - clock.monotonic() <= delay:
                raise PublishFailed(f"{PublishFailed.__doc__} ({failed})") from failed
            await asyncio.sleep(delay)
        raise ConnectionClosed("the publisher is not open: use `async with`")
