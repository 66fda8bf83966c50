"""Errors of the HTTP interface as `application/problem+json` (RFC 9457)."""

import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import msgspec
import structlog
from aiohttp import web

from gateway.limits import RETRY_AFTER_SECONDS

_log = structlog.get_logger("seamark.problems")

_MEMBER: Final = re.compile(r"at `\$\.([^`]+)`|field `([^`]+)`")

CONTENT_TYPE: Final = "application/problem+json"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Problem(Exception):
    """A request that cannot be answered as asked; the middleware turns it into a response.

    Args:
        status: HTTP status.
        code: a stable word for programs, the last part of the problem's `type`.
        detail: a sentence for people; names the field and the remedy.
        field: JSON path of the field at fault, if one is.
        retry_after_seconds: when to come back (503, 429).
    """

    def __init__(
        self, status: int, code: str, detail: str, *, field: str | None = None, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.field = field
        self.retry_after_seconds = retry_after_seconds

    def response(self) -> web.Response:
        """The problem as a response."""
        body: dict[str, Any] = {
            "type": f"urn:seamark:problem:{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.field is not None:
            body["field"] = self.field
        response = web.Response(status=self.status, body=msgspec.json.encode(body), content_type=CONTENT_TYPE)
        response.headers["Server"] = "seamark"  # here, as not every answer passes through the application
        if self.retry_after_seconds is not None:
            response.headers["Retry-After"] = str(self.retry_after_seconds)
        if self.status == HTTPStatus.UNAUTHORIZED:
            response.headers["WWW-Authenticate"] = 'Bearer realm="seamark"'
        return response


def field_of(error: BaseException) -> str | None:
    """The member that an error of msgspec names, such as `ids` or `events[3].id`; None if it names none."""
    found = _MEMBER.search(str(error))
    return (found[1] or found[2]) if found is not None else None


def unavailable(detail: str) -> Problem:
    """503: the request was not carried out and may be repeated."""
    return Problem(503, "unavailable", detail, retry_after_seconds=RETRY_AFTER_SECONDS)


@web.middleware
async def as_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure of a handler as problem+json; an unforeseen one is logged and answered 500 without detail."""
    try:
        return await handler(request)
    except Problem as problem:
        return problem.response()
    except web.HTTPException as error:
        if error.status < 400:
            raise
        code = HTTPStatus(error.status).phrase.lower().replace(" ", "_")
        response = Problem(error.status, code, error.reason).response()
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise
    except Exception:
        _log.exception("request_failed", method=request.method, route=_route(request))
        return Problem(500, "internal", "the request failed; it was logged").response()


def _route(request: web.Request) -> str:
    """The route's pattern, which holds no id of a user."""
    resource = request.match_info.route.resource
    return str(resource.canonical) if resource is not None else "unknown"
