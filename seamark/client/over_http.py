"""Publishing through the gateway's HTTP interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import aiohttp
import msgspec
from yarl import URL

from seamark.backoff import retry_after_seconds
from seamark.client.errors import Again, PublishRefused
from seamark.protocol.events import Encoded

RETRIED_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class OverHttp:
    """One gateway, named by its address, and the key that it knows this service by.

    Args:
        http: an aiohttp session to use; the app closes it.
    """

    attempt_seconds: Final = 15.0
    """Longer than the gateway itself tries to have an event stored."""

    def __init__(self, url: str, api_key: str, http: aiohttp.ClientSession | None) -> None:
        self._url = URL(url)
        self.address = str(self._url.origin())
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        self._http, self._own_http = http, http is None

    async def open(self) -> None:
        """Nothing is sent yet."""
        if self._http is None:
            self._http = aiohttp.ClientSession()

    async def close(self) -> None:
        """Requests under way fail."""
        if self._own_http and self._http is not None:
            http, self._http = self._http, None
            await http.close()

    async def attempt(self, event: Encoded, trace: Mapping[str, str]) -> tuple[int | None, bool]:
        """Publish once; the event's id is in its body, so every attempt is the same event.

        Returns: its sequence in EVENTS, where the gateway says it, and whether it was stored before.

        Raises:
            Again: another attempt may succeed. PublishRefused: none will.
        """
        answer = await self._post("v1/events", event.payload, trace)
        seq = answer.get("seq")
        return seq if isinstance(seq, int) else None, answer.get("duplicate") is True

    async def post(self, path: str, body: Mapping[str, Any]) -> None:
        """Send something that is not stored, once.

        Raises:
            Again: it may not have been taken. PublishRefused: it was not.
        """
        await self._post(path, msgspec.json.encode(body), {})

    async def _post(self, path: str, body: bytes, trace: Mapping[str, str]) -> dict[str, Any]:
        assert self._http is not None
        headers = {**self._headers, **trace}
        try:
            async with self._http.post(self._url / path, data=body, headers=headers, allow_redirects=False) as response:
                answer = _object(await response.read())
        except (aiohttp.ClientError, OSError) as failed:
            raise Again(failed) from failed
        if response.status in RETRIED_STATUS:
            raise Again(f"answered with {response.status}", retry_after_seconds(response.headers) or 0.0)
        if response.status not in (200, 202):
            raise PublishRefused(response.status, answer)
        return answer


def _object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
