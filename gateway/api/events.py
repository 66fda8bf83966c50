"""`POST /v1/events` and `/v1/events/bulk`: 202 is said only once an event is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import structlog
from aiohttp import web

from engine import metrics
from engine.broker.eventstore import EventStore
from engine.broker.jetstream import Broker, PubAck
from engine.errors import ApiError, BrokerError, Unanswered
from gateway.access.api_keys import EVENTS_WRITE, ApiKey, ApiKeys, KeysAway, TooManyGuesses
from gateway.access.auth import bearer
from gateway.access.proxies import Proxies
from gateway.access.shares import NoPlace, Queue, Shares
from gateway.http.bodies import read_body
from gateway.http.problems import Problem, field_of, unavailable
from gateway.limits import (
    BULK_APPENDS,
    BULK_APPENDS_PER_TENANT,
    BULK_BODY_BYTES,
    BULK_EVENTS,
    BULK_IN_FLIGHT,
    BULK_REQUESTS,
    BULK_REQUESTS_PER_TENANT,
    BULK_SECONDS,
    EVENT_BODY_BYTES,
    EVENT_BUDGET_SECONDS,
    EVENTS_IN_FLIGHT,
    EVENTS_IN_FLIGHT_PER_TENANT,
    RETRY_AFTER_SECONDS,
)
from seamark.protocol.appends import RETRIED_ERR_CODES
from seamark.protocol.errors import InvalidEvent, InvalidToken
from seamark.protocol.events import Encoded, encode, is_event_id, new_event_id
from seamark.protocol.limits import EVENT_BYTES_MAX, EVENT_ID_BYTES_MAX
from seamark.protocol.subjects import check_type, encode_token

_log = structlog.get_logger("seamark.events_api")

_STORE_FULL: Final = frozenset({10047, 10077, 10023})
"""The server's words for a store that takes no more: the event was not stored and may be sent again later."""

_TOO_LARGE: Final = 10054
"""The server's word for a message above `max_msg_size`, headers included: sent again, it is as large as before."""

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class Bulk(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a bulk request."""

    events: list[msgspec.Raw]


_decode_bulk = msgspec.json.Decoder(Bulk).decode


class _Bulk:
    """The events of one bulk request, and what became of each."""

    def __init__(self, bodies: list[msgspec.Raw], tenant: str) -> None:
        self.results: list[dict[str, Any]] = [{} for _ in bodies]
        self.lines: dict[str, list[tuple[int, Encoded, str]]] = {}
        """By ordering key, in the order they are to be stored."""
        for index, body in enumerate(bodies):
            try:
                event, id = _event(bytes(body), tenant, None)
            except InvalidEvent as error:
                metrics.gateway_events.labels("invalid").inc()
                self.results[index] = {"error": _said(_problem_of(error))}
            else:
                # events.<tenant>.<key>.<type>: the key decides about order, whatever the type.
                self.lines.setdefault(".".join(event.subject.split(".")[:3]), []).append((index, event, id))
                self.results[index] = {"event_id": id, "error": _LATE}


class EventsApi:
    """The two handlers and what they share.

    Args:
        broker: where events are stored.
        keys: who may publish, and for which tenant.
        proxies: who is believed about the address a request comes from.
    """

    def __init__(self, broker: Broker, keys: ApiKeys, proxies: Proxies) -> None:
        self._proxies = proxies
        self._events = EventStore(broker)
        self._keys = keys
        self._singles = Shares(EVENTS_IN_FLIGHT, EVENTS_IN_FLIGHT_PER_TENANT)
        self._bulks = Shares(BULK_REQUESTS, BULK_REQUESTS_PER_TENANT)
        self._bulk_appends = Queue(BULK_APPENDS, BULK_APPENDS_PER_TENANT)

    def routes(self) -> list[web.RouteDef]:
        """What to add to an application."""
        return [web.post("/v1/events", self.publish), web.post("/v1/events/bulk", self.publish_many)]

    async def publish(self, request: web.Request) -> web.StreamResponse:
        """One event: 202 with `{event_id, seq, duplicate}` once it is stored."""
        key = await self._authorised(request)
        body = await read_body(request, EVENT_BODY_BYTES)
        try:
            event, id = _event(body, key.tenant, request.headers.get("Idempotency-Key"))
        except InvalidEvent as error:
            metrics.gateway_events.labels("invalid").inc()
            raise _problem_of(error) from error
        try:
            with self._singles.place(key.tenant):
                ack = await self._store(event, _trace(request))
        except NoPlace as error:
            metrics.gateway_events.labels("unavailable").inc()
            raise unavailable("too many events are being stored: try again") from error
        except BrokerError as error:
            raise _problem_of_broker(error) from error
        answer = {"event_id": id, "seq": ack.seq, "duplicate": ack.duplicate}
        return web.Response(status=202, body=_encode(answer), content_type="application/json")

    async def publish_many(self, request: web.Request) -> web.StreamResponse:
        """Up to 1000 events: 202 with one result each, in order; an event that failed has `error` in its place.

        Events with one ordering key are stored one after the other, in order, the others side by side. After half a minute
        the request stores no more events.
        """
        key = await self._authorised(request)
        try:
            # The place is taken before the body is read, since the body is what takes memory.
            with self._bulks.place(key.tenant):
                bulk = _Bulk(_bodies(await read_body(request, BULK_BODY_BYTES)), key.tenant)
                await self._store_all(bulk, key.tenant, _trace(request))
        except NoPlace as error:
            raise unavailable("too many bulk requests are being stored: try again") from error
        return web.Response(status=202, body=_encode({"results": bulk.results}), content_type="application/json")

    async def _authorised(self, request: web.Request) -> ApiKey:
        presented = bearer(request.headers.get("Authorization")) or request.headers.get("X-API-Key")
        if not presented:
            raise Problem(401, "unauthenticated", "send an API key as Authorization: Bearer …")
        try:
            key = await self._keys.find(presented, lambda: self._proxies.client(request))
        except TooManyGuesses as error:
            raise Problem(429, "too_many_keys", f"{error}: check the API key", retry_after_seconds=60) from error
        except KeysAway as error:
            raise unavailable(str(error)) from error
        if key is None:
            raise Problem(401, "unauthenticated", "the API key is not known")
        if EVENTS_WRITE not in key.scopes:
            raise Problem(403, "forbidden", f"the API key lacks the scope {EVENTS_WRITE}")
        return key

    async def _store(self, event: Encoded, trace: Mapping[str, str]) -> PubAck:
        try:
            ack = await self._events.append(event, trace, budget_seconds=EVENT_BUDGET_SECONDS)
        except BrokerError as error:
            outcomes = ((Unanswered, "unanswered"), (ApiError, "refused"), (BrokerError, "unavailable"))
            outcome = next(word for kind, word in outcomes if isinstance(error, kind))
            metrics.gateway_events.labels(outcome).inc()
            _log.warning("event_not_stored", error=f"{type(error).__name__}: {error}")
            raise
        metrics.gateway_events.labels("duplicate" if ack.duplicate else "accepted").inc()
        return ack

    async def _store_all(self, bulk: _Bulk, tenant: str, trace: Mapping[str, str]) -> None:
        """Events with one ordering key one after the other, the others side by side.

        After one that was not stored none with its key is: sent again, it would come behind them. Once the store has not
        taken one within its budget it is away, and no other is tried: a thousand budgets would take hours.
        """
        mine = asyncio.Semaphore(BULK_IN_FLIGHT)
        away = False

        async def store(line: list[tuple[int, Encoded, str]]) -> None:
            nonlocal away
            stopped = False
            for index, event, id in line:
                async with mine, self._bulk_appends.place(tenant):
                    if stopped or away:
                        bulk.results[index] = {"event_id": id, "error": _NOT_TRIED}
                        continue
                    bulk.results[index] = {"event_id": id, "error": _UNANSWERED}  # until there is an answer
                    try:
                        ack = await self._store(event, trace)
                        bulk.results[index] = {"event_id": id, "seq": ack.seq, "duplicate": ack.duplicate}
                    except BrokerError as error:
                        stopped = True
                        if not isinstance(error, ApiError) or error.err_code in RETRIED_ERR_CODES:
                            away = True
                        bulk.results[index] = {"event_id": id, "error": _said(_problem_of_broker(error))}

        try:
            async with asyncio.timeout(BULK_SECONDS), asyncio.TaskGroup() as group:
                for number, line in enumerate(bulk.lines.values()):
                    group.create_task(store(line), name=f"bulk-{number}")
        except TimeoutError:
            _log.warning("bulk_late", seconds=BULK_SECONDS, events=len(bulk.results))


def _bodies(body: bytes) -> list[msgspec.Raw]:
    """The events of a bulk request."""
    try:
        bodies = _decode_bulk(body).events
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        said = 'the body must be {"events": […]}, not nested too deeply'
        raise Problem(400, "invalid_bulk", said, field="events") from error
    if not 1 <= len(bodies) <= BULK_EVENTS:
        raise Problem(400, "invalid_bulk", f"1 to {BULK_EVENTS} events, not {len(bodies)}", field="events")
    return bodies


def _event(body: bytes, tenant: str, idempotency_key: str | None) -> tuple[Encoded, str]:
    """The event in a body and its id. The members we do not know are kept as they stand.

    Raises:
        InvalidEvent: with the member at fault.
    """
    try:
        fields = dict(_decode_object(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent("json", "an event is a JSON object, not nested too deeply") from error
    type = _text(fields, "type")
    if type is None:
        raise InvalidEvent("type", "`type` is missing: say what happened, such as order.shipped")
    named = _text(fields, "tenant")
    if named is not None and named != tenant:
        raise InvalidEvent("tenant", "`tenant` is not the tenant of the API key: leave it out")
    id = _id(fields, idempotency_key)
    try:
        to = msgspec.json.decode(bytes(fields.pop("to", b"[]")), type=list[str])
    except msgspec.DecodeError as error:
        raise InvalidEvent("to", "`to` must be a list of users") from error
    key = _text(fields, "ordering_key")
    _check_names(
        ("type", check_type, type), ("ordering_key", encode_token, key), ("to", encode_token, to[0] if to else None)
    )
    data = fields.pop("data", None)
    return encode(to=to, type=type, tenant=tenant, data=data, id=id, key=key, unknown=fields), id


def _id(fields: dict[str, msgspec.Raw], idempotency_key: str | None) -> str:
    """The event's own id, else the request's idempotency key, else a random id.

    An id or key that is not valid is refused and never replaced: an event sent again under another id would be stored twice.
    """
    id, where, said = _text(fields, "id"), "id", "`id`"
    if id is None:
        id, where, said = idempotency_key, "Idempotency-Key", "the header Idempotency-Key"
    if id is None:
        return new_event_id()
    if not is_event_id(id):
        raise InvalidEvent(where, f"{said} must be 1 to {EVENT_ID_BYTES_MAX} printable ASCII characters without blanks")
    return id


def _check_names(*names: tuple[str, Callable[[str], str], str | None]) -> None:
    """Say which member cannot be part of a subject: `encode` can only say that one of them cannot."""
    for field, check, text in names:
        try:
            if text is not None:
                check(text)
        except InvalidToken as error:
            raise InvalidEvent(field, f"`{field}`: {error}") from error


def _text(fields: dict[str, msgspec.Raw], name: str) -> str | None:
    """Take the member `name` out, which must be text or null."""
    raw = fields.pop(name, None)
    try:
        return msgspec.json.decode(bytes(raw), type=str | None) if raw is not None else None
    except msgspec.DecodeError as error:
        raise InvalidEvent(name, f"`{name}` must be text") from error


def _trace(request: web.Request) -> dict[str, str]:
    """The caller's trace context, to travel with the event."""
    given = {name: request.headers.get(name, "") for name in ("traceparent", "tracestate")}
    # Bytes beyond ASCII stand in no valid one, and cannot be written into a header of the event.
    return {name: value for name, value in given.items() if 1 <= len(value) <= 512 and value.isascii()}


def _problem_of(error: InvalidEvent) -> Problem:
    whole = error.reason in ("json", "size", "schema", "subject", "disagreement")
    field = field_of(error) if whole else error.reason
    return Problem(413 if error.reason == "size" else 400, "invalid_event", error.detail, field=field)


def _problem_of_broker(error: BrokerError) -> Problem:
    if isinstance(error, ApiError) and error.err_code in _STORE_FULL:
        return Problem(503, "store_full", "the event store is full; nothing was stored", retry_after_seconds=30)
    if isinstance(error, ApiError) and error.err_code == _TOO_LARGE:
        said = f"the event and its headers have more than {EVENT_BYTES_MAX} bytes: shorten `data` or `tracestate`"
        return Problem(413, "invalid_event", said)
    if isinstance(error, Unanswered):
        return Problem(503, "unanswered", "no answer from the event store: send the same event again, with its id",
                       retry_after_seconds=RETRY_AFTER_SECONDS)  # fmt: skip
    return unavailable("the event was not stored: try again")


def _said(problem: Problem) -> dict[str, Any]:
    said: dict[str, Any] = {"code": problem.code, "status": problem.status, "detail": problem.detail}
    if problem.field is not None:
        said["field"] = problem.field
    return said


_NOT_TRIED: Final = _said(unavailable("not tried, as one before it was not stored: send it again after that one"))
_LATE: Final = _said(unavailable("not tried, as the others took too long: send it again, with fewer in one request"))
_UNANSWERED: Final = _said(_problem_of_broker(Unanswered()))
