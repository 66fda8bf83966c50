"""Bodies of requests, read within a bound and a deadline."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from gateway.http.problems import COMPRESSED, REQUEST_TIMEOUT, TOO_LARGE, Problem
from gateway.limits import REQUEST_BODY_SECONDS

PROBLEMS: Final = (COMPRESSED, TOO_LARGE, REQUEST_TIMEOUT)


async def read_body(request: web.Request, most: int) -> bytes:
    """The body, at most `most` bytes.

    Raises:
        Problem: it is larger, compressed, or was not complete in time.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(COMPRESSED, "send the body as it is, without Content-Encoding", field="Content-Encoding")
    too_large = Problem(TOO_LARGE, f"the body may have {most} bytes")
    if (request.content_length or 0) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(REQUEST_BODY_SECONDS):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise Problem(REQUEST_TIMEOUT, f"the body was not complete within {REQUEST_BODY_SECONDS:g} s") from error
    return bytes(body)
