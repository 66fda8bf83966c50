"""`POST /v1/events` and `/v1/events/bulk`: 202 is said only once an event is stored."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import structlog
from aiohttp import web
from msgspec import Meta

from engine.broker.eventstore import EventStore
from engine.broker.jetstream import Broker, PubAck
from engine.broker.refusals import TOO_LARGE, is_full
from engine.errors import ApiError, BrokerError, Unanswered
from engine.traces.spans import active
from gateway import metrics
from gateway.access.principals import Scope, Service
from gateway.access.shares import NoPlace, Queue, Shares
from gateway.access.throttles import Throttles
from gateway.api.audiences import expanded
from gateway.api.now import THROTTLED, TOO_MANY_MESSAGES, NowMessages, check_throttles
from gateway.api.recipients import SCHEMA, Inline
from gateway.http.endpoint import Call, Endpoint
from gateway.http.idempotency import always
from gateway.http.problems import UNAVAILABLE, USER_DELETED, Kind, Problem, field_of
from gateway.http.tracing import accepting, trace_of
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
)
from seamark.protocol.appends import RETRIED_ERR_CODES
from seamark.protocol.errors import InvalidEvent, InvalidToken
from seamark.protocol.events import Encoded, Event, encode, is_event_id, new_event_id
from seamark.protocol.limits import EVENT_BYTES_MAX, EVENT_ID_BYTES_MAX
from seamark.protocol.now import is_now
from seamark.protocol.subjects import check_type, encode_token

_log = structlog.get_logger("seamark.events_api")

INVALID_EVENT: Final = Kind(400, "invalid_event")
EVENT_TOO_LARGE: Final = Kind(413, "invalid_event")
STORE_FULL: Final = Kind(503, "store_full")
UNANSWERED: Final = Kind(503, "unanswered")

_PASSING: Final = frozenset({429, 503})
"""Errors of single events in a bulk request that may be gone when it is sent again."""


class NewEvent(Event, kw_only=True):
    """An event as it is published over HTTP. Members that are not known are kept with it."""

    type: str
    id: str | None = None  # type: ignore[assignment]  # one is made where there is none
    tenant: str | None = None
    ordering_key: str | None = None
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    to: Annotated[list[str], Meta(extra_json_schema={"items": SCHEMA})]


_OF_EVENTS: Final = {"items": {"$ref": "#/components/schemas/NewEvent"}}


class Bulk(msgspec.Struct, forbid_unknown_fields=True):
    """Events, each of which is stored or not."""

    events: Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=BULK_EVENTS, extra_json_schema=_OF_EVENTS)]


class Stored(msgspec.Struct):
    """Where an event is in its stream; null: it is `at_most_once`, and in no stream. `duplicate`: it was there before."""

    event_id: str
    seq: int | None
    duplicate: bool


class Failure(msgspec.Struct, omit_defaults=True):
    """Why an event was not stored; the members are those of a problem."""

    code: str
    status: int
    detail: str
    field: str | None = None


class Result(msgspec.Struct, omit_defaults=True):
    """What became of an event: as for a single one, or `error`. `event_id` is left out where it has none that is valid."""

    event_id: str | None = None
    seq: int | None = None
    duplicate: bool | None = None
    error: Failure | None = None


class Results(msgspec.Struct):
    """One result for each event, in the order of the request."""

    results: list[Result]


class Publishing:
    """Storing events within bounds: all that are stored at a time, and how many of one tenant."""

    def __init__(self, broker: Broker, throttles: Throttles) -> None:
        self._throttles = throttles
        self._spans = active()
        self._events = EventStore(broker)
        self.now = NowMessages(broker)
        self._bulk_appends = Queue(BULK_APPENDS, BULK_APPENDS_PER_TENANT)
        self.singles = Shares(EVENTS_IN_FLIGHT, EVENTS_IN_FLIGHT_PER_TENANT)

    async def store(self, event: Encoded, trace: Mapping[str, str]) -> PubAck:
        """Store one event.

        Raises:
            BrokerError: as `EventStore.append`.
        """
        with accepting(self._spans, trace, event) as headers:
            try:
                ack = await self._events.append(event, headers, budget_seconds=EVENT_BUDGET_SECONDS)
            except BrokerError as error:
                refused = "refused" if isinstance(error, ApiError) else "unavailable"
                metrics.gateway_events.labels("unanswered" if isinstance(error, Unanswered) else refused).inc()
                _log.warning("event_not_stored", error=f"{type(error).__name__}: {error}")
                raise
        metrics.gateway_events.labels("duplicate" if ack.duplicate else "accepted").inc()
        return ack

    async def store_all(self, bulk: _Bulk, tenant: str, trace: Mapping[str, str]) -> None:
        """Events with one ordering key one after the other, the others side by side.

        After one that was not stored none with its key is: sent again, it would come behind them. Once the store has not
        taken one within its budget it is away, and no other is tried: a thousand budgets would take hours.
        """
        mine = asyncio.Semaphore(BULK_IN_FLIGHT)
        away = False

        async def store_line(line: list[tuple[int, Encoded, str]]) -> None:
            nonlocal away
            stopped = False
            for index, event, id in line:
                async with mine, self._bulk_appends.place(tenant):
                    if stopped or away:
                        bulk.results[index] = Result(id, error=_NOT_TRIED)
                        continue
                    bulk.results[index] = Result(id, error=_UNANSWERED)  # until there is an answer
                    try:
                        await check_throttles(self._throttles, tenant, _type_of(event))
                        ack = await self.store(event, trace)
                        bulk.results[index] = Result(id, ack.seq, ack.duplicate)
                    except Problem as problem:
                        stopped = True
                        bulk.results[index] = Result(id, error=_failure(problem))
                    except BrokerError as error:
                        stopped = True
                        if not isinstance(error, ApiError) or error.err_code in RETRIED_ERR_CODES:
                            away = True
                        bulk.results[index] = Result(id, error=_failure(_problem_of_broker(error)))

        try:
            async with asyncio.timeout(BULK_SECONDS), asyncio.TaskGroup() as group:
                for number, line in enumerate(bulk.lines.values()):
                    group.create_task(store_line(line), name=f"bulk-{number}")
        except TimeoutError:
            _log.warning("bulk_late", seconds=BULK_SECONDS, events=len(bulk.results))


PUBLISHING: Final = web.AppKey("publishing", Publishing)


@Endpoint(
    "POST",
    "/v1/events",
    scope=Scope.EVENTS_WRITE,
    status=202,
    body_bytes=EVENT_BODY_BYTES,
    refuses=(INVALID_EVENT, EVENT_TOO_LARGE, THROTTLED, STORE_FULL, UNANSWERED, TOO_MANY_MESSAGES, USER_DELETED),
    keyed=always,
)
async def publish_event(call: Call[Service, None, Annotated[bytes, NewEvent]]) -> Stored:
    """Publish one event. Answered once it is stored; sent again with the same id, it adds nothing.

    An event without an id has one made from `Idempotency-Key`, if there is one, else a random one. One that is `at_most_once`
    is never stored. It is handed to the broker for those who are connected, and `seq` is null.

    A recipient may bring what is known of him (`{"id": "alice", "email": "alice@example.com"}`), with the scope `users:write`.
    `topic:<name>` in `to` is for the members of a topic: those who are when the event comes first.
    """
    publishing, tenant, throttles = call.request.app[PUBLISHING], call.principal.tenant, call.context.throttles
    inline = Inline(call.context, call.principal)
    try:
        given = _given(inline.split(call.body), tenant, None if call.key is None else _id_from(call.key))
        if is_now(given.event):
            await check_throttles(throttles, tenant, given.event.type)
            await inline.store()
            publishing.now.publish(tenant, **given.parts)
            return Stored(given.id, None, False)
        given.event.to = await expanded(call.context, tenant, given.event.to)
        event, id = _encoded(given, tenant)
    except InvalidEvent as error:
        raise _refused(error) from error
    await check_throttles(throttles, tenant, given.event.type)
    await inline.store()
    try:
        with publishing.singles.place(tenant):
            ack = await publishing.store(event, trace_of(call.request))
    except NoPlace:
        metrics.gateway_events.labels("unavailable").inc()
        raise
    except BrokerError as error:
        raise _problem_of_broker(error) from error
    return Stored(id, ack.seq, ack.duplicate)


@Endpoint(
    "POST",
    "/v1/events/bulk",
    scope=Scope.EVENTS_WRITE,
    status=202,
    body_bytes=BULK_BODY_BYTES,
    places=Shares(BULK_REQUESTS, BULK_REQUESTS_PER_TENANT),
    refuses=(USER_DELETED,),
    keyed=lambda answer: not any(one.error and one.error.status in _PASSING for one in answer.results),
)
async def publish_events(call: Call[Service, None, Bulk]) -> Results:
    """Publish up to 1000 events. Each gets a result of its own, in order: one that was not stored has `error` in it.

    Events with one ordering key are stored one after the other, in order, the others side by side. After half a minute
    the request stores no more events.

    With an `Idempotency-Key`, events that could not be stored for now are tried again when the request is sent again; those
    that were stored are duplicates then, even without an id.
    """
    inline = Inline(call.context, call.principal)
    bulk = _Bulk(call.body.events, call.principal.tenant, call.key, inline)
    await inline.store()
    await call.request.app[PUBLISHING].store_all(bulk, call.principal.tenant, trace_of(call.request))
    return Results(bulk.results)


class _Bulk:
    """The events of one bulk request, and what became of each."""

    def __init__(self, bodies: list[msgspec.Raw], tenant: str, key: str | None, inline: Inline) -> None:
        self.results = [Result() for _ in bodies]
        self.lines: dict[str, list[tuple[int, Encoded, str]]] = {}
        """By ordering key, in the order they are to be stored."""
        for index, body in enumerate(bodies):
            known = len(inline.found)
            try:
                default_id = None if key is None else _id_from(f"{key}\n{index}")
                event, id = _encoded(_given(inline.split(bytes(body)), tenant, default_id), tenant)
            except InvalidEvent as error:
                del inline.found[known:]  # of an event that is refused nobody is stored
                self.results[index] = Result(error=_failure(_refused(error)))
            else:
                # events.<tenant>.<key>.<type>: the key decides about order, whatever the type.
                self.lines.setdefault(".".join(event.subject.split(".")[:3]), []).append((index, event, id))
                self.results[index] = Result(id, error=_LATE)


_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_event = msgspec.json.Decoder(NewEvent).decode


class _Given(NamedTuple):
    """An event as it came, its id, and its members that are kept as they stand."""

    event: NewEvent
    id: str
    data: msgspec.Raw | None
    unknown: dict[str, msgspec.Raw]

    @property
    def parts(self) -> dict[str, Any]:
        """What a now message is made of."""
        given = {name: value for name, value in self.unknown.items() if bytes(value) != b"null"}
        fields = {**given, "ordering_key": self.event.ordering_key}
        return {"to": self.event.to, "type": self.event.type, "id": self.id, "data": self.data, "fields": fields}


def _given(body: bytes, tenant: str, default_id: str | None) -> _Given:
    """The event in a body. The members we do not know are kept as they stand.

    Args:
        default_id: of an event that has none; None: a random one.

    Raises:
        InvalidEvent: with the member at fault.
    """
    try:
        members, given = _decode_object(body), _decode_event(body)
    except msgspec.ValidationError as error:
        raise InvalidEvent("schema", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent("json", "an event is a JSON object, not nested too deeply") from error
    if given.tenant not in (None, tenant):
        raise InvalidEvent("tenant", "`tenant` is not the tenant of the API key: leave it out")
    id = _id(given.id) or default_id or new_event_id()
    _check_names(
        ("type", check_type, given.type),
        ("ordering_key", encode_token, given.ordering_key),
        ("to", encode_token, given.to[0] if given.to else None),
    )
    unknown = {name: value for name, value in members.items() if name not in _GIVEN}
    return _Given(given, id, members.get("data"), unknown)


def _encoded(given: _Given, tenant: str) -> tuple[Encoded, str]:
    """The event as it is stored, and its id.

    Raises:
        InvalidEvent: with the member at fault.
    """
    event, id = given.event, given.id
    key, unknown = event.ordering_key, given.unknown
    return encode(to=event.to, type=event.type, tenant=tenant, data=given.data, id=id, key=key, unknown=unknown), id


_GIVEN: Final = frozenset({"id", "to", "type", "tenant", "ordering_key", "data"})
"""The members of an event that are not passed on as they stand."""


def _type_of(event: Encoded) -> str:
    return event.subject.split(".", 3)[3]


def _id(given: str | None) -> str | None:
    """The event's own id. One that is not valid is not replaced: sent again, the event would be stored twice."""
    if given is not None and not is_event_id(given):
        raise InvalidEvent("id", f"`id` must be 1 to {EVENT_ID_BYTES_MAX} printable ASCII characters without blanks")
    return given


def _id_from(key: str) -> str:
    """The id of an event that an idempotency key stands for (`Call.key`): as it is, where it can be one."""
    return key if is_event_id(key) else hashlib.sha256(key.encode()).hexdigest()


def _check_names(*names: tuple[str, Callable[[str], str], str | None]) -> None:
    """Say which member cannot be part of a subject: `encode` can only say that one of them cannot."""
    for field, check, text in names:
        try:
            if text is not None:
                check(text)
        except InvalidToken as error:
            raise InvalidEvent(field, f"`{field}`: {error}") from error


def _refused(error: InvalidEvent) -> Problem:
    metrics.gateway_events.labels("invalid").inc()
    whole = error.reason in ("json", "size", "schema", "subject", "disagreement")
    field = field_of(error) if whole else error.reason
    return Problem(EVENT_TOO_LARGE if error.reason == "size" else INVALID_EVENT, error.detail, field=field)


def _problem_of_broker(error: BrokerError) -> Problem:
    if is_full(error):
        return Problem(STORE_FULL, "the event store is full; nothing was stored", retry_after_seconds=30)
    if isinstance(error, ApiError) and error.err_code == TOO_LARGE:
        said = f"the event and its headers have more than {EVENT_BYTES_MAX} bytes: shorten `data` or `tracestate`"
        return Problem(EVENT_TOO_LARGE, said)
    if isinstance(error, Unanswered):
        return Problem(UNANSWERED, "no answer from the event store: send the same event again, with its id")
    return Problem(UNAVAILABLE, "the event was not stored: try again")


def _failure(problem: Problem) -> Failure:
    return Failure(problem.kind.code, problem.kind.status, problem.detail, problem.field)


def _later(detail: str) -> Failure:
    return _failure(Problem(UNAVAILABLE, detail))


_NOT_TRIED: Final = _later("not tried, as one before it was not stored: send it again after that one")
_LATE: Final = _later("not tried, as the others took too long: send it again, with fewer in one request")
_UNANSWERED: Final = _failure(_problem_of_broker(Unanswered()))
