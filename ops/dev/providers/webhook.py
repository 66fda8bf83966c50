"""A receiver of webhooks as a careful customer writes it: it checks signatures and times, and knows what it has had."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any, Final

from aiohttp import web

from ops.dev.providers.acceptlog import AcceptLog
from ops.dev.providers.faults import Answers
from ops.dev.providers.httpsimulator import HttpSimulator

TOLERANCE_SECONDS: Final = 300
"""Standard Webhooks: how old a message may be, or how far ahead."""


class WebhookReceiver(HttpSimulator):
    """Takes POST at any path.

    Args:
        secret: the one that it knows, as `whsec_…`.
    """

    def __init__(self, secret: str, **listening: Any) -> None:
        super().__init__(**listening)
        self.secret = secret
        self.refused: list[str] = []
        """Why requests were refused, at most the last 1000."""
        self.unverified = AcceptLog(kept_max=1000)
        """What came with them; `why` of `raw` is the reason."""

    def routes(self) -> list[web.RouteDef]:
        """All paths."""
        return [web.post("/{path:.*}", self._receive)]

    def refusal(self, fault: Answers) -> web.Response:
        """A status and some text."""
        return web.Response(status=fault.status, text=fault.text, headers=fault.headers)

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        wrong = self._wrong(request, body)
        if wrong:
            self.refused = [*self.refused[-999:], wrong]
            self._note(self.unverified, request, body, why=wrong)
            return web.Response(status=401, text=wrong)
        self._note(self.log, request, body)
        return web.Response(status=200, text="thank you")

    def _note(self, log: AcceptLog, request: web.Request, body: bytes, **more: str) -> None:
        try:
            shown = json.loads(body)
        except ValueError:
            shown = None
        if not isinstance(shown, dict):
            shown = {"text": body.decode("utf-8", "replace")}
        id = request.headers.get("webhook-id", "")
        log.add(id=id, channel="webhook", to=request.path, key=id, shown=shown, raw={**dict(request.headers), **more})

    def _wrong(self, request: web.Request, body: bytes) -> str:
        """What is wrong with a request; "": nothing. Written from the specification, apart from the code that signs."""
        id, stamp, signatures = (
            request.headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature")
        )
        if not id or "." in id:
            return "no webhook-id"
        if not stamp.isdigit() or abs(time.time() - int(stamp)) > TOLERANCE_SECONDS:
            return "too old, or from the future"
        key = base64.b64decode(self.secret.removeprefix("whsec_"))
        right = base64.b64encode(hmac.new(key, f"{id}.{stamp}.".encode() + body, hashlib.sha256).digest()).decode()
        good = any(hmac.compare_digest(given, f"v1,{right}") for given in signatures.split(" "))
        return "" if good else "none of the signatures is by the one secret that this receiver knows"
