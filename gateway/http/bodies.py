"""Bodies of requests, read within a bound and a deadline."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway.http.problems import Problem
from gateway.limits import REQUEST_BODY_SECONDS


async def read_body(request: web.Request, most: int) -> bytes:
    """The body, at most `most` bytes.

    Raises:
        Problem: 413, it is larger; 408, it was not complete in time; 415, it is compressed.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "compressed", "send the body as it is, without Content-Encoding", field="Content-Encoding")
    if request.content_length is not None and request.content_length > most:
        raise Problem(413, "too_large", f"the body may have {most} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(REQUEST_BODY_SECONDS):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > most:
                    raise Problem(413, "too_large", f"the body may have {most} bytes")
    except TimeoutError as error:
        raise Problem(408, "request_timeout", f"the body was not complete within {REQUEST_BODY_SECONDS:g} s") from error
    return bytes(body)
