"""The inbox page of the dev profile: static files, and a session for whoever opens it on this machine.

`GET /dev/session` hands out a user's token to anyone who asks, so it exists only in the dev profile and only for a
browser or tool on this machine that asks for this machine: a page elsewhere that makes its own name resolve to
127.0.0.1 (DNS rebinding) still sends its own name as Host, and a page of another site or another local port says so
in Origin and Sec-Fetch-Site.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jwt
import msgspec
from aiohttp import web
from yarl import URL

from gateway.http.problems import Problem
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import encode_user

FILES: Final = {
    "/": ("index.html", "text/html"),
    "/inbox.js": ("inbox.js", "text/javascript"),
    "/seamark.js": ("seamark.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
"""What is served, by path. A list, not a folder: nothing else is ever reachable."""

TOKEN_SECONDS: Final = 900
"""Life of a token of the page. Short, so that the page's refresh is exercised every day."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_WEB: Final = Path(__file__).parents[1] / "web"

_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class DevPage:
    """What the page needs to sign in and publish.

    Args:
        jwt_secret: signs the tokens handed out; the secret the gateway verifies with.
        api_key: the key the page's form publishes with; None hides the form.
        tenant: whose users these are.
        issuer: `iss` of the tokens, if the gateway wants one.
        audience: `aud` of the tokens, if the gateway wants one.
    """

    jwt_secret: str
    api_key: str | None = None
    tenant: str = "default"
    issuer: str | None = None
    audience: str | None = None


def dev_routes(page: DevPage) -> list[web.RouteDef]:
    """The routes of the page. Add them only in the dev profile."""

    async def session(request: web.Request) -> web.Response:
        check_local(request)
        return _session(page, request.query.get("user", "alice"))

    return [*(web.get(path, _static(*file)) for path, file in FILES.items()), web.get("/dev/session", session)]


def check_local(request: web.Request) -> None:
    """Pass a request that this machine makes to itself, from the page itself or from a tool.

    Raises:
        Problem: 403; the detail says which header gave it away.
    """
    host = request.headers.get("Host", "")
    if not is_loopback_host(host):
        raise Problem(
            403, "not_local", "Host is not this machine: open the page at http://127.0.0.1 or http://localhost"
        )
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() != f"http://{host.lower()}":
        raise Problem(403, "not_local", "Origin is another site: only the page itself may ask")
    if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        raise Problem(403, "not_local", "the request comes from another site: only the page itself may ask")
    peer = request.remote
    if peer is not None and not _is_loopback(peer):
        raise Problem(403, "not_local", "the request comes from another machine: the dev profile serves this one only")


def is_loopback_host(host: str) -> bool:
    """Whether a Host header names this machine: `localhost` or a loopback address, with or without a port."""
    try:
        name = URL(f"http://{host}").host
    except ValueError:
        return False
    if not name or "@" in host or "/" in host:
        return False
    return name.rstrip(".").lower() == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _session(page: DevPage, user: str) -> web.Response:
    try:
        encode_user(user)
    except InvalidToken as error:
        raise Problem(400, "invalid_user", str(error), field="user") from error
    now = int(time.time())
    claims: dict[str, object] = {"sub": user, "tenant": page.tenant, "iat": now, "exp": now + TOKEN_SECONDS}
    if page.issuer is not None:
        claims["iss"] = page.issuer
    if page.audience is not None:
        claims["aud"] = page.audience
    token = jwt.encode(claims, page.jwt_secret, algorithm="HS256")
    body = {
        "user": user,
        "tenant": page.tenant,
        "token": token,
        "api_key": page.api_key,
        "expires_at": claims["exp"],
        "command": _publish_command(),
    }
    headers = {**_HEADERS, "Cache-Control": "no-store"}
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", headers=headers)


def _publish_command() -> str:
    """What to type to publish, in the folder this process runs in and with its stack's data folder, up to the options."""
    folder = os.environ.get("SEAMARK_FOLDER")  # as `seamark dev` was told, unless commands look there anyway
    return shlex.join([_seamark(), "publish", *(["--folder", folder] if folder else [])])


def _seamark() -> str:
    """What to type for `seamark`: an environment need not be active there."""
    script = Path(sys.executable).with_name("seamark")
    if not script.exists() or shutil.which("seamark") == str(script):
        return "seamark"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def _static(name: str, content_type: str) -> _Handler:
    async def serve(_: web.Request) -> web.StreamResponse:
        # Read at each request: whoever changes the page sees it at the next reload.
        body = (_WEB / name).read_bytes()
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_HEADERS)

    return serve
