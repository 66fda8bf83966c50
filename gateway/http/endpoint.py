"""Endpoints, each declared once: who may call it, what it takes, answers and refuses. Routes and OpenAPI come from that.

A declaration is a decorated handler. Principal, query, body and answer are the types in its signature, what the document says of
it is its docstring:

    @Endpoint("POST", "/v1/inbox/read", status=202, refuses=(STALE_CURSOR,))
    async def mark_read(call: Call[User, None, ReadBody]) -> Marked:
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web
from opentelemetry import trace

from engine.traces.spans import failed
from gateway.access import admission
from gateway.access.principals import Operator, Principal, Scope, Service, User
from gateway.access.shares import Shares
from gateway.context import CONTEXT, Context
from gateway.http import bodies, idempotency
from gateway.http.problems import (
    INTERNAL,
    INVALID_BODY,
    INVALID_QUERY,
    SEE_OPENAPI,
    STORE_BROKEN,
    UNAVAILABLE,
    Kind,
    Problem,
    field_of,
    problem_of,
)
from gateway.http.tracing import caller_of

P = TypeVar("P", bound=Principal | None)
Q = TypeVar("Q")
B = TypeVar("B")
Handler = Callable[[Any], Awaitable[Any]]

_STATUS: Final = "http.response.status_code"

_encode: Final = msgspec.json.Encoder().encode


def _say(span: trace.Span, status: int) -> None:
    """How a request was answered. What is not the caller's fault is an error of ours: https://opentelemetry.io/docs/specs/semconv/http/."""
    span.set_attribute(_STATUS, status)
    if status >= web.HTTPInternalServerError.status_code:
        failed(span, str(status))


@dataclass(frozen=True, slots=True)
class Call(Generic[P, Q, B]):
    """One request, checked.

    Attributes:
        request: for what is not declared.
        principal: who makes it; None: anybody may.
        query: what the path, the query and the headers say, as a struct. A name in the path's braces is taken from the path,
            one that begins with a capital letter is a header's. None: nothing is looked at.
        body: decoded, or as it came where it is declared as `Annotated[bytes, <form>]`. None: there is none.
        key: what the ids come from of all that is made, where the request has an `Idempotency-Key` and they are taken here: the
            same for the same request, and another one where the key is used again when it was forgotten.
    """

    request: web.Request
    context: Context
    principal: P
    query: Q
    body: B
    key: str | None = None


@dataclass(eq=False)
class Endpoint:
    """Declares a handler.

    Args:
        method, path: as in HTTP; a name in braces is a part of the path.
        scope: what the key of a service must allow.
        status: of the answer; 101: it is served by `directly`.
        also: other statuses of an answer in the same form.
        refuses: the handler's own problems. What comes of principal, query and body need not be said.
        body_bytes: the largest body.
        empty_body: a request without body means `{}`. Not where an empty document replaces something or chooses all there is:
            there a body is more likely to have been lost on its way.
        places: how many such requests may be under way at a time.
        opens_session: needs room for a session, and counts as a handshake.
        keyed: takes `Idempotency-Key`, and says of an answer whether it is final. A request with the same key gets the final
            answer again; else it is carried out again, as it is where Redis was away. So the handler must not do twice what it
            does for one key: the ids of all that it makes come from `Call.key`.
    """

    method: str
    path: str
    _: KW_ONLY
    scope: Scope | None = None
    status: int = 200
    also: tuple[int, ...] = ()
    refuses: tuple[Kind, ...] = ()
    body_bytes: int = 65_536
    empty_body: bool = False
    places: Shares | None = None
    opens_session: bool = False
    keyed: Callable[[Any], bool] | None = None

    def __call__(self, handler: Handler) -> Endpoint:
        """Read the signature of `handler`. A form is None where there is none; without `answer` it makes its response itself."""
        hints = get_type_hints(handler, include_extras=True)
        principal, query, body = get_args(hints["call"])
        kinds = get_args(principal) if isinstance(principal, UnionType) else (principal,)
        self.principals: tuple[type, ...] = tuple(kind for kind in kinds if kind is not NoneType)
        self.query, self.body, answer = _form(query), _form(body), _form(hints["return"])
        self.answer = None if answer is web.StreamResponse else answer
        self.parameters: dict[str, str] = {}
        """Where each field of `query` stands: in the `path`, the `query` or a `header`."""
        for field in msgspec.structs.fields(self.query) if self.query is not None else ():
            name = field.encode_name
            self.parameters[name] = "path" if f"{{{name}}}" in self.path else "header" if name[0].isupper() else "query"
        if self.keyed is not None:
            self.parameters[idempotency.HEADER] = "header"
            assert User not in self.principals, "keys are told apart by tenant"
        self.handler = handler
        self._decode = None if get_origin(body) is Annotated else msgspec.json.Decoder(self.body or Any).decode
        return self

    @property
    def takes_keys(self) -> bool:
        """Whether API keys are accepted."""
        return Service in self.principals or Operator in self.principals

    @property
    def problems(self) -> set[Kind]:
        """All that a request may be answered with beside the answer."""
        return {
            INTERNAL,
            STORE_BROKEN,
            *self.refuses,
            *((INVALID_QUERY,) if self.query else ()),
            *(bodies.PROBLEMS if self.body else ()),
            *((INVALID_BODY,) if self.body and self._decode else ()),
            *((UNAVAILABLE,) if self.principals else ()),
            *(idempotency.PROBLEMS if self.keyed else ()),
            *(admission.OF_TOKENS if User in self.principals else ()),
            *(admission.OF_KEYS if self.takes_keys else ()),
            *(admission.OF_SESSIONS if self.opens_session else ()),
        }

    def route(self) -> web.RouteDef:
        """What to add to an application. Spans are made where traces are collected; a stream has none, for it lasts for hours."""
        off = isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        handle = self.handle if off or (self.opens_session and self.answer is None) else self.traced
        path = self.path.replace("}", ":[^/]+}")  # ids may hold braces, which aiohttp's own pattern leaves out
        if self.method != "GET":
            return web.route(self.method, path, handle)
        # The answer to HEAD has no body, and what opens a session is nothing else.
        return web.get(path, handle, allow_head=not self.opens_session)

    def directly(self, context: Context) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        """The handler without router, middlewares and checks: all their frames would be kept while a WebSocket lives."""
        return lambda request: self.handler(Call(cast("web.Request", request), context, None, None, None))

    async def traced(self, request: web.Request) -> web.StreamResponse:
        """Answer a request within a span."""
        with trace.get_tracer("seamark.gateway").start_as_current_span(
            f"{self.method} {self.path}",
            caller_of(request),
            trace.SpanKind.SERVER,
            {"http.request.method": self.method, "http.route": self.path},
            record_exception=False,  # its message may quote the request
            set_status_on_exception=False,
        ) as span:
            try:
                response = await self.handle(request)
            except Exception as error:
                _say(span, problem_of(error).kind.status)
                raise
            _say(span, response.status)
            return response

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        context = request.app[CONTEXT]
        principal = await self._principal(request, context)
        query = None if self.query is None else self._query(request)
        # The place is taken before the body is read, since the body is what takes memory.
        with nullcontext() if self.places is None else self.places.place(getattr(principal, "tenant", "")):
            data = b"" if self.body is None else await bodies.read_body(request, self.body_bytes)
            body = None if self.body is None else self._body(data)
            if self.keyed is not None and (key := idempotency.key_of(request)) is not None:
                call = Call(request, context, principal, query, body)
                return await self._once(call, getattr(principal, "tenant", ""), key, data)
            return self._response(await self.handler(Call(request, context, principal, query, body)))

    async def _once(self, call: Call[Any, Any, Any], tenant: str, key: str, data: bytes) -> web.StreamResponse:
        async def carry_out(named: str) -> tuple[web.StreamResponse, bool]:
            answer = await self.handler(replace(call, key=named))
            return self._response(answer), self.keyed is not None and self.keyed(answer)

        keys = call.context.idempotency_keys
        if keys is None:
            return (await carry_out(idempotency.named(key, idempotency.today())))[0]
        return await idempotency.once(keys, tenant, key, idempotency.fingerprint(call.request, data), carry_out)

    def _response(self, answer: Any) -> web.StreamResponse:
        if isinstance(answer, web.StreamResponse):
            return answer
        headers = {"Cache-Control": "no-store"}
        return web.Response(status=self.status, body=_encode(answer), content_type="application/json", headers=headers)

    async def _principal(self, request: web.Request, context: Context) -> Principal | None:
        if self.opens_session:
            admission.admit_session(request, context)
        if not self.principals:
            return None
        principal: Principal
        if self.takes_keys and (User not in self.principals or admission.has_key(request)):
            principal = await admission.key_holder(request, context)
        else:
            admission.admit(request, context)
            principal = await admission.user_of(request, context)
        admission.check_may(principal, self.principals, self.scope)
        return principal

    def _query(self, request: web.Request) -> Any:
        given = {"path": request.match_info, "query": request.query, "header": request.headers}
        said = {name: given[place][name] for name, place in self.parameters.items() if name in given[place]}
        try:
            return msgspec.convert(said, self.query, strict=False)
        except msgspec.ValidationError as error:
            text = str(error).replace(", got `str`", "").replace("`bool`", "`true` or `false`")
            raise Problem(INVALID_QUERY, text + SEE_OPENAPI, field=field_of(error)) from error

    def _body(self, data: bytes) -> Any:
        if self._decode is None:
            return data
        if not data.strip():
            if not self.empty_body:
                said = "the body is empty: send a JSON object, at least {}"
                raise Problem(INVALID_BODY, said + SEE_OPENAPI)
            data = b"{}"
        try:
            return self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Problem(INVALID_BODY, str(error) + SEE_OPENAPI, field=field_of(error)) from error


def _form(hint: Any) -> Any:
    """The type itself; of `Annotated[bytes, T]` or `Annotated[Raw, T]`, which is not decoded or encoded here, the form T."""
    if get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    return None if hint is NoneType else hint
