"""Endpoints, each declared once: who may call it, what it takes, answers and refuses. Routes and OpenAPI come from that.

A declaration is a decorated handler. Principal, query, body and answer are the types in its signature, what the document says of
it is its docstring:

    @endpoint("POST", "/v1/inbox/read", status=202, problems=(STALE_CURSOR,))
    async def read(call: Call[User, None, ReadBody]) -> Marked:
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web
from opentelemetry import trace
from opentelemetry.propagate import extract

from gateway.access import admission
from gateway.access.principals import Operator, Principal, Scope, Service, User
from gateway.access.shares import Shares
from gateway.context import CONTEXT, Context
from gateway.http import bodies
from gateway.http.problems import (
    INTERNAL,
    INVALID_BODY,
    INVALID_QUERY,
    UNAVAILABLE,
    Kind,
    Problem,
    field_of,
    problem_of,
)

P = TypeVar("P", bound=Principal | None)
Q = TypeVar("Q")
B = TypeVar("B")

_encode: Final = msgspec.json.Encoder().encode
_tracer: Final = trace.get_tracer("seamark.gateway")


@dataclass(frozen=True, slots=True)
class Call(Generic[P, Q, B]):
    """One request, checked.

    Attributes:
        request: for what is not declared.
        principal: who makes it; None: anybody may.
        query: what the path, the query and the headers say, as a struct. Names in the path's braces are taken from the path,
            names that begin with a capital letter are those of headers. None: nothing is looked at.
        body: decoded, or as `bytes` where it is declared as `Annotated[bytes, <form>]`. None: there is none.
    """

    request: web.Request
    context: Context
    principal: P
    query: Q
    body: B


class Endpoint:
    """A declared handler; made by `endpoint`.

    Attributes:
        principals: the kinds of those who may call it; none: anybody may.
        query, body, answer: the forms, None where there is none. An endpoint without an `answer` makes its response itself.
        parameters: the fields of `query`, and where each stands: in the `path`, the `query` or a `header`.
        problems: all that it may be answered with.
    """

    def __init__(self, handler: Callable[[Any], Awaitable[Any]], method: str, path: str) -> None:
        self.method, self.path = method, path
        self.name, self.doc = handler.__name__, handler.__doc__ or ""
        hints = get_type_hints(handler, include_extras=True)
        principal, query, body = get_args(hints["call"])
        self.principals = tuple(kind for kind in _alternatives(principal) if kind is not NoneType)
        self.query, self.body, answer = _form(query), _form(body), _form(hints["return"])
        self.answer = None if isinstance(answer, type) and issubclass(answer, web.StreamResponse) else answer
        self.status = 200
        self.also: tuple[int, ...] = ()
        self.scope: Scope | None = None
        self.opens_session = self.direct = False
        self.body_bytes = 0
        self.places: Shares | None = None
        self.own_problems: tuple[Kind, ...] = ()
        self._handler = handler
        self.parameters = {field.encode_name: self._place(field.encode_name) for field in _fields(self.query)}
        self._decode = None if get_origin(body) is Annotated else msgspec.json.Decoder(self.body or Any).decode
        self._facts = {"http.request.method": method, "http.route": path}

    @property
    def problems(self) -> set[Kind]:
        """What it may be answered with beside its answer."""
        return {
            INTERNAL,
            *self.own_problems,
            *((INVALID_QUERY,) if self.query else ()),
            *(bodies.PROBLEMS if self.body else ()),
            *((INVALID_BODY,) if self.body and self._decode else ()),
            *((UNAVAILABLE,) if self.principals else ()),
            *(admission.OF_TOKENS if User in self.principals else ()),
            *(admission.OF_KEYS if self.takes_keys else ()),
            *(admission.OF_SESSIONS if self.opens_session else ()),
        }

    @property
    def takes_keys(self) -> bool:
        """Whether API keys are accepted."""
        return Service in self.principals or Operator in self.principals

    def _place(self, parameter: str) -> str:
        if f"{{{parameter}}}" in self.path:
            return "path"
        return "header" if parameter[0].isupper() else "query"

    def directly(self, context: Context) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        """The handler for requests that come past the router, middlewares and checks, all of which it does without."""
        return lambda request: self._handler(Call(cast("web.Request", request), context, None, None, None))

    def route(self) -> web.RouteDef:
        """What to add to an application."""
        # Ids may hold braces, which aiohttp's own pattern leaves out.
        return web.route(self.method, self.path.replace("}", ":[^/]+}"), self.handle)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request, within a span; a stream has none, for it may last for hours."""
        if self.answer is None:
            return await self._answered(request)
        with _tracer.start_as_current_span(
            f"{self.method} {self.path}",
            extract(request.headers),
            trace.SpanKind.SERVER,
            self._facts,
            record_exception=False,  # its message may quote the request
            set_status_on_exception=False,
        ) as span:
            try:
                response = await self._answered(request)
                status = response.status
            except Exception as error:
                status = problem_of(error).kind.status
                raise
            finally:
                span.set_attribute("http.response.status_code", status)
            return response

    async def _answered(self, request: web.Request) -> web.StreamResponse:
        context = request.app[CONTEXT]
        principal = await self._principal(request, context)
        query = self._query(request) if self.query is not None else None
        tenant = getattr(principal, "tenant", "")
        # The place is taken before the body is read, since the body is what takes memory.
        with nullcontext() if self.places is None else self.places.place(tenant):
            body = None if self.body is None else await self._body(request)
            answer = await self._handler(Call(request, context, principal, query, body))
        if isinstance(answer, web.StreamResponse):
            return answer
        return web.Response(
            status=self.status,
            body=_encode(answer),
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )

    async def _principal(self, request: web.Request, context: Context) -> Principal | None:
        if self.opens_session:
            admission.admit_session(request, context)
        if not self.principals:
            return None
        principal: Principal
        if self.takes_keys and (User not in self.principals or admission.has_key(request)):
            principal = await admission.key_holder(request, context)
        else:
            if not self.opens_session:
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
            raise Problem(INVALID_QUERY, text, field=field_of(error)) from error

    async def _body(self, request: web.Request) -> Any:
        data = await bodies.read_body(request, self.body_bytes)
        if self._decode is None:
            return data
        try:
            return self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Problem(INVALID_BODY, str(error), field=field_of(error)) from error


def endpoint(
    method: str,
    path: str,
    *,
    scope: Scope | None = None,
    status: int = 200,
    also: tuple[int, ...] = (),
    problems: tuple[Kind, ...] = (),
    body_bytes: int = 65_536,
    places: Shares | None = None,
    opens_session: bool = False,
    direct: bool = False,
) -> Callable[[Callable[[Call[P, Q, B]], Awaitable[Any]]], Endpoint]:
    """Declare the handler of an endpoint.

    Args:
        method, path: as in HTTP; a name in braces is a part of the path.
        scope: what the key of a service must allow.
        status: of the answer.
        also: other statuses of an answer in the same form.
        problems: what the handler itself refuses. What comes of principal, query and body need not be said.
        body_bytes: the largest body.
        places: how many such requests may be under way at a time.
        opens_session: needs room for a session, and counts as a handshake.
        direct: is served by `directly`, as the frames of all that is around a handler would be kept while a WebSocket lives.
    """

    def declared(handler: Callable[[Call[P, Q, B]], Awaitable[Any]]) -> Endpoint:
        made = Endpoint(handler, method, path)
        made.scope, made.status, made.also, made.own_problems = scope, status, also, problems
        made.body_bytes, made.places, made.opens_session, made.direct = body_bytes, places, opens_session, direct
        return made

    return declared


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _form(hint: Any) -> Any:
    """The type itself; of `Annotated[bytes, T]` or `Annotated[Raw, T]`, which is not decoded or encoded here, the form T."""
    if get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    return None if hint is NoneType else hint


def _fields(form: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    return () if form is None else msgspec.structs.fields(form)
