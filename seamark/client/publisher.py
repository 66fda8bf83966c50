"""Publishing events, over NATS or over the gateway's HTTP interface, with the same call and the same promise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, Protocol, Self

import aiohttp
import msgspec
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from yarl import URL

from engine.broker.addresses import inbox_prefix_of
from engine.broker.eventstore import EventStore
from engine.broker.jetstream import Broker, NatsSettings
from engine.broker.jetstream import connect as connect_broker
from engine.limits import APPEND_BUDGET_SECONDS
from seamark.backoff import Backoff
from seamark.client.errors import ConnectionClosed, PublishFailed, PublishRefused
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import Encoded, Event, encode
from seamark.protocol.subjects import parse_stored_event

REQUEST_SECONDS: Final = 15.0
"""Deadline of one HTTP attempt: longer than the gateway itself tries to have an event stored."""

RETRIED_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})

_ARGUMENTS: Final = frozenset({*Event.__struct_fields__, "key"})
"""Fields of an event that have an argument of their own, so `extra` cannot hold them."""

_propagator = TraceContextTextMapPropagator()


class Published(NamedTuple):
    """The engine's word that an event is stored.

    Attributes:
        event_id: the event's id; publishing it again adds nothing.
        seq: its sequence in EVENTS, None where the way does not tell it.
        duplicate: it was stored before, and this call changed nothing.
    """

    event_id: str
    seq: int | None
    duplicate: bool


class _Way(Protocol):
    """How an encoded event reaches the engine."""

    async def open(self) -> None: ...

    async def send(self, event: Encoded, event_id: str, trace: Mapping[str, str]) -> Published: ...

    async def close(self) -> None: ...


class Publisher:
    """Publishes events; returns only once they are stored.

    ```python
    async with Publisher(nats_url="nats://127.0.0.1:4222") as publisher:
        await publisher.publish(to=["alice"], type="order.shipped", data={"order": 17})
    ```

    The current OpenTelemetry context goes with the event, so that one trace follows it to the device.

    Args:
        nats_url: the broker; for services inside. Several servers are separated by commas.
        user: of the broker's account, where it has accounts (or in `nats_url`).
        password: of that user.
        credentials_file: a NATS credentials file instead.
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
        budget_seconds: float = APPEND_BUDGET_SECONDS,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        self._tenant = tenant
        self._way: _Way
        if nats_url is not None and gateway_url is None:
            settings = NatsSettings(
                url=nats_url,
                user=user,
                password=password,
                credentials_file=credentials_file,
                name="seamark-publisher",
                # As in `nats/accounts.conf`: a user reads answers under a prefix of its own.
                inbox_prefix=inbox_prefix or inbox_prefix_of(nats_url, user),
            )
            self._way = _OverNats(settings, budget_seconds)
        elif gateway_url is not None and nats_url is None and api_key:
            self._way = _OverHttp(gateway_url, api_key, budget_seconds, http)
        else:
            raise ValueError("give either nats_url, or gateway_url with api_key")

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            Unavailable: no broker answered within 10 s.
        """
        await self._way.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; publishes under way are finished first or fail."""
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
            to: one user, or up to 10 000.
            type: dot-separated words, such as `order.shipped`.
            data: anything JSON, at most 256 KiB.
            id: names the event for good; random if absent.
            key: the ordering key: events with one key reach logs in the order they were published. The user where
                `to` names one, else the event's id (no order among them).
            source: the service it comes from.
            time: when it happened, with an offset; when it was stored if absent.
            priority: critical, high, normal or low.
            category: what users set preferences for.
            semantics: at_least_once or effectively_once.
            collapse_key: only the newest record per key counts as unread.
            expires_at: not delivered after it.
            send_at: when it is due.
            channels: only these channels.
            transaction_id: names what the event belongs to.
            subject: what the event is about, as CloudEvents has it.
            extra: fields that Seamark does not know; they are kept with the event as they are.

        Raises:
            InvalidEvent: the event cannot be accepted; the message names the field and the remedy.
            ApiError, PublishRefused: refused for good (full store, key not allowed …).
            PublishFailed, Unavailable, Unanswered: the budget was spent; only Unavailable says it is not stored.
        """
        if known := sorted((extra or {}).keys() & _ARGUMENTS):
            raise InvalidEvent(
                known[0], f"`{known[0]}` is no extra field: give it as an argument, the ordering key as `key`"
            )
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
            unknown=extra,
        )
        trace: dict[str, str] = {}
        _propagator.inject(trace)
        return await self._way.send(event, event.msg_id.partition(":")[2], trace)


class _OverNats:
    """Straight into the EVENTS stream."""

    def __init__(self, settings: NatsSettings, budget_seconds: float) -> None:
        self._settings = settings
        self._budget_seconds = budget_seconds
        self._broker: Broker | None = None
        self._events: EventStore | None = None

    async def open(self) -> None:
        if self._broker is None:
            self._broker = await connect_broker(self._settings)
            self._events = EventStore(self._broker)

    async def send(self, event: Encoded, event_id: str, trace: Mapping[str, str]) -> Published:
        if self._events is None:
            raise ConnectionClosed("the publisher is not open: use `async with`")
        ack = await self._events.append(event, trace, budget_seconds=self._budget_seconds)
        return Published(event_id, ack.seq, ack.duplicate)

    async def close(self) -> None:
        broker, self._broker, self._events = self._broker, None, None
        if broker is not None:
            await broker.close()


class _Problem(Exception):
    """An attempt that may be repeated; `retry_after_seconds` is what the gateway asked for."""

    def __init__(self, said: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(said)
        self.retry_after_seconds = retry_after_seconds


class _OverHttp:
    """Through `POST /v1/events`. The event's id is the idempotency key, so every attempt is the same event."""

    def __init__(self, url: str, api_key: str, budget_seconds: float, http: aiohttp.ClientSession | None) -> None:
        self._url = URL(url) / "v1/events"
        self._api_key = api_key
        self._budget_seconds = budget_seconds
        self._http, self._own_http = http, http is None

    async def open(self) -> None:
        if self._http is None:
            self._http = aiohttp.ClientSession()

    async def close(self) -> None:
        if self._own_http and self._http is not None:
            http, self._http = self._http, None
            await http.close()

    async def send(self, event: Encoded, event_id: str, trace: Mapping[str, str]) -> Published:
        body = _with_subject(event)
        headers = {
            "Authorization": f"Bearer {self._api_key}",
            "Content-Type": "application/json",
            "Idempotency-Key": event_id,
            **trace,
        }
        backoff = Backoff(first_seconds=0.1, max_seconds=2.0)
        deadline = time.monotonic() + self._budget_seconds
        while True:
            left = deadline - time.monotonic()
            try:
                async with asyncio.timeout(max(0.1, min(REQUEST_SECONDS, left))):
                    return await self._attempt(body, headers, event_id)
            except (aiohttp.ClientError, OSError, TimeoutError, _Problem) as failed:
                asked = failed.retry_after_seconds if isinstance(failed, _Problem) else 0.0
                delay = asked + backoff.next_seconds()
                if deadline - time.monotonic() <= delay:
                    said = str(failed) or type(failed).__name__
                    raise PublishFailed(f"{(PublishFailed.__doc__ or '').strip()} ({said})") from failed
            await asyncio.sleep(delay)

    async def _attempt(self, body: bytes, headers: Mapping[str, str], event_id: str) -> Published:
        if self._http is None:
            raise ConnectionClosed("the publisher is not open: use `async with`")
        async with self._http.post(self._url, data=body, headers=headers, allow_redirects=False) as response:
            answer = _object(await response.read())
            if response.status in RETRIED_STATUS:
                retry = response.headers.get("Retry-After", "")
                wait = float(retry) if retry.isascii() and retry.isdigit() else 0.0
                raise _Problem(f"answered with {response.status}", wait)
            if response.status not in (200, 202):
                raise PublishRefused(response.status, answer)
        seq = answer.get("seq")
        return Published(event_id, seq if isinstance(seq, int) else None, answer.get("duplicate") is True)


def _with_subject(event: Encoded) -> bytes:
    """The event's body with type and ordering key in it: over HTTP there is no subject to carry them."""
    at = parse_stored_event(f"ev.0.{event.subject.removeprefix('events.')}")
    fields = msgspec.json.decode(event.payload, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({**fields, "type": at.type, "ordering_key": at.key})


def _object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
