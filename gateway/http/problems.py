"""Errors of the HTTP interface as `application/problem+json` (RFC 9457), and the id by which a request is found in the log."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, NamedTuple

import msgspec
import structlog
from aiohttp import web

from engine.directory.changing import UserDeleted
from engine.errors import LimitReached, StoreBroken, StoreUnavailable, VersionConflict
from gateway import metrics
from gateway.access.shares import NoPlace
from gateway.limits import RETRY_AFTER_SECONDS

_log = structlog.get_logger("seamark.problems")

CONTENT_TYPE: Final = "application/problem+json"

REQUEST_ID: Final = "X-Request-Id"

_KNOWN_ID: Final = web.RequestKey("request_id", str)
_HARMLESS_ID: Final = re.compile("[!-~]{1,128}")
"""Printable ASCII: it goes into a header and into log lines as it is."""

SEE_OPENAPI: Final = "; GET /openapi.json says what is taken"
"""What a problem with the form of a request ends with."""

_FIELD: Final = re.compile(r"^`([^`]+)`|field `([^`]+)`")
_PATH: Final = re.compile(r" - at `\$\.([^`]+)`")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Kind(NamedTuple):
    """A problem as programs know it: the status of the answer, and a stable word, which is the last part of its `type`."""

    status: int
    code: str


MALFORMED: Final = Kind(400, "malformed")
INVALID_QUERY: Final = Kind(400, "invalid_query")
INVALID_BODY: Final = Kind(400, "invalid_body")
UNAUTHENTICATED: Final = Kind(401, "unauthenticated")
FORBIDDEN: Final = Kind(403, "forbidden")
NOT_FOUND: Final = Kind(404, "not_found")
VERSION_CONFLICT: Final = Kind(409, "version_conflict")
LIMIT_REACHED: Final = Kind(409, "limit_reached")
USER_DELETED: Final = Kind(409, "user_deleted")
REQUEST_TIMEOUT: Final = Kind(408, "request_timeout")
TOO_LARGE: Final = Kind(413, "too_large")
COMPRESSED: Final = Kind(415, "compressed")
HEAD_TOO_LARGE: Final = Kind(431, "too_large")
INTERNAL: Final = Kind(500, "internal")
STORE_BROKEN: Final = Kind(500, "store_broken")
"""The database answers what no outage explains: asking again does not help."""

UNAVAILABLE: Final = Kind(503, "unavailable")
"""The request was not carried out, and may be repeated."""


class ProblemDocument(msgspec.Struct, omit_defaults=True):
    """What is wrong with a request.

    Attributes:
        type: `urn:seamark:problem:<code>`.
        detail: a sentence for people; it names the field and the remedy.
        code: a stable word for programs.
        request_id: also in the header `X-Request-Id` and in the gateway's log.
        field: JSON path of the field at fault, if one is.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    field: str | None = None


class Problem(Exception):
    """A request that cannot be answered as asked; the middleware turns it into a response.

    Args:
        kind: which problem it is.
        detail: a sentence for people; names the field and the remedy.
        field: JSON path of the field at fault, if one is.
        retry_after_seconds: when to come back; after 503 always said.
        log: what the log line says beside the code. Nothing of it may name a person.
    """

    def __init__(
        self, kind: Kind, detail: str, *, field: str | None = None, retry_after_seconds: int | None = None, **log: str
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.field, self.log = kind, detail, field, log
        self.retry_after_seconds = retry_after_seconds or (RETRY_AFTER_SECONDS if kind.status == 503 else None)

    def response(self, request: web.BaseRequest, route: str = "unknown") -> web.Response:
        """The problem as the answer to `request`; it is logged with the route's pattern, which holds no id of a user."""
        status, code = self.kind
        id = request_id(request)
        metrics.gateway_problems.labels(code).inc()
        if status != INTERNAL.status:  # logged with its cause
            _log.info("request_refused", route=route, status=status, code=code, request_id=id, **self.log)
        said = ProblemDocument(
            type=f"urn:seamark:problem:{code}",
            title=code.replace("_", " ").capitalize(),
            status=status,
            detail=self.detail,
            code=code,
            request_id=id,
            field=self.field,
        )
        # The headers here, as not every answer passes through the application.
        headers = {"Server": "seamark", REQUEST_ID: id}
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(self.retry_after_seconds)
        if status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = 'Bearer realm="seamark"'
        return web.Response(status=status, body=msgspec.json.encode(said), content_type=CONTENT_TYPE, headers=headers)


def request_id(request: web.BaseRequest) -> str:
    """The id of a request: the client's own, if it sent one that can do no harm, else a random one."""
    known = request.get(_KNOWN_ID)
    if known is None:
        given = request.headers.get(REQUEST_ID, "")
        known = request[_KNOWN_ID] = given if _HARMLESS_ID.fullmatch(given) else secrets.token_hex(8)
    return known


def field_of(error: BaseException) -> str | None:
    """The member that an error names, such as `ids` or `events[3].id`; None if it names none.

    msgspec ends its messages with the path, ours begin with the member.
    """
    text = str(error)
    path, member = _PATH.search(text), _FIELD.search(text)
    named = [path[1]] if path is not None else []
    named += [member[1] or member[2]] if member is not None else []
    return ".".join(named) or None


def problem_of(error: Exception) -> Problem:
    """What a failure of a handler is answered with."""
    match error:
        case Problem():
            return error
        case web.HTTPException():
            code = HTTPStatus(error.status).phrase.lower().replace(" ", "_")
            return Problem(Kind(error.status, code), error.reason)
        case VersionConflict():
            return Problem(VERSION_CONFLICT, str(error), field="version")
        case LimitReached():
            return Problem(LIMIT_REACHED, str(error))
        case UserDeleted():
            return Problem(USER_DELETED, str(error), retry_after_seconds=RETRY_AFTER_SECONDS if error.erasing else None)
        case StoreBroken():
            return Problem(
                STORE_BROKEN, "the database refused what was asked: this was recorded, and does not pass by itself"
            )
        case StoreUnavailable():
            return Problem(UNAVAILABLE, "the database does not answer: try again", error=type(error).__name__)
        case NoPlace():
            return Problem(UNAVAILABLE, "too many of these requests are under way: try again")
    return Problem(INTERNAL, "the request failed; it was logged")


@web.middleware
async def as_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure of a handler as problem+json; an unforeseen one is logged and answered 500 without detail."""
    structlog.contextvars.bind_contextvars(request_id=request_id(request))  # until the next request of this connection
    try:
        return await handler(request)
    except ConnectionError:
        raise
    except Exception as error:
        problem = problem_of(error)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        if problem.kind.status == INTERNAL.status:
            _log.exception("request_failed", method=request.method, route=route, code=problem.kind.code)
        response = problem.response(request, route)
        if isinstance(error, web.HTTPException) and "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
