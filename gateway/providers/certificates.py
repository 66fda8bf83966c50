"""Certificates that Amazon SNS signs with: fetched from Amazon when they are first needed, and remembered."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from types import SimpleNamespace
from typing import Final

import aiohttp
from cryptography import x509

CERTIFICATE_BYTES_MAX: Final = 64 << 10
FETCH_SECONDS: Final = 5.0
KEPT_MAX: Final = 16
"""Amazon changes one about once a year in each region."""


class Unfetched(Exception):
    """Amazon did not give it now; whoever posted may come again."""


class Certificates:
    """Fetches and remembers certificates.

    Args:
        http: of `engine.channels.exchange.open_http`: it follows no redirects. Closed with this.
    """

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._turn = asyncio.Lock()

    async def get(self, url: str) -> bytes:
        """The certificate at an address that `certificate_url` has passed. One is fetched at a time, whoever asks for how many.

        Raises:
            Unfetched: there is none that came whole, or Amazon does not answer in time.
        """
        async with self._turn:
            if url not in self._kept:
                self._kept[url] = _whole(await self._ask(url))
                while len(self._kept) > KEPT_MAX:
                    self._kept.popitem(last=False)
            return self._kept[url]

    async def confirm(self, url: str) -> None:
        """Visit an address at Amazon by which we take what a topic publishes.

        Raises:
            Unfetched: Amazon does not take that.
        """
        await self._ask(url)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def _ask(self, url: str) -> bytes:
        """What Amazon answers, to its end: it may come in pieces."""
        body = bytearray()
        try:
            async with (
                asyncio.timeout(FETCH_SECONDS),
                self._http.get(url, allow_redirects=False, trace_request_ctx=SimpleNamespace()) as answer,
            ):
                while len(body) <= CERTIFICATE_BYTES_MAX and (part := await answer.content.readany()):
                    body += part
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unfetched from error
        if answer.status != 200 or len(body) > CERTIFICATE_BYTES_MAX:
            raise Unfetched
        return bytes(body)


def _whole(body: bytes) -> bytes:
    try:
        x509.load_pem_x509_certificate(body)
    except ValueError as error:
        raise Unfetched from error
    return body
