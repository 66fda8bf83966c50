"""The page of the dev profile: static files, and a session for whoever opens it on this machine.

`GET /dev/session` hands out a user's token and the page's API key to anyone who asks, so it exists only in the dev profile and
only for a browser or tool on this machine that asks for this machine: a page elsewhere that makes its own name resolve to
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
from pathlib import Path
from typing import Final

import jwt
import msgspec
from aiohttp import web
from yarl import URL

from gateway.access.principals import Scope
from gateway.http.problems import INVALID_QUERY, Handler, Kind, Problem
from gateway.options import GatewayOptions
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import encode_user

FILES: Final = {
    "/": ("index.html", "text/html"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("inbox", "preferences", "campaigns", "plan", "page")
    },
    "/seamark.js": ("seamark.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
"""What is served, by path. A list, not a folder: nothing else is ever reachable."""

PAGE_SCOPES: Final = (Scope.EVENTS_WRITE, Scope.CAMPAIGNS_READ, Scope.CAMPAIGNS_WRITE, Scope.TOPICS_READ)
"""What the key of the page has to allow, and no more, as a browser holds it. Everything else the page asks as the user."""

TOKEN_SECONDS: Final = 900
"""Life of a token of the page. Short, so that the page's refresh is exercised every day."""

NOT_LOCAL: Final = Kind(403, "not_local")

PAGE_FOLDER: Final = Path(__file__).parents[1] / "web"

PAGE_HEADERS: Final = {
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


def dev_routes(options: GatewayOptions) -> list[web.RouteDef]:
    """The routes of the page: none but in the dev profile, where the gateway can sign tokens."""
    if not options.dev or options.jwt_secret is None:
        return []

    async def session(request: web.Request) -> web.Response:
        check_local(request)
        return _session(options, request.query.get("user", "alice"))

    return [*(web.get(path, _static(*file)) for path, file in FILES.items()), web.get("/dev/session", session)]


def check_local(request: web.Request) -> None:
    """Pass a request that this machine makes to itself, from the page itself or from a tool.

    Raises:
        Problem: 403; the detail says which header gave it away.
    """
    host = request.headers.get("Host", "")
    if not is_loopback_host(host):
        raise Problem(NOT_LOCAL, "Host is not this machine: open the page at http://127.0.0.1 or http://localhost")
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() != f"http://{host.lower()}":
        raise Problem(NOT_LOCAL, "Origin is another site: only the page itself may ask")
    if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        raise Problem(NOT_LOCAL, "the request comes from another site: only the page itself may ask")
    peer = request.remote
    if peer is not None and not _is_loopback(peer):
        raise Problem(NOT_LOCAL, "the request comes from another machine: the dev profile serves this one only")


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


def _session(options: GatewayOptions, user: str) -> web.Response:
    try:
        encode_user(user)
    except InvalidToken as error:
        raise Problem(INVALID_QUERY, str(error), field="user") from error
    now = int(time.time())
    tenant, expires_at = options.dev_tenant, now + TOKEN_SECONDS
    claims = {
        "sub": user,
        "tenant": tenant,
        "iat": now,
        "exp": expires_at,
        "iss": options.issuer,
        "aud": options.audience,
    }
    said = {name: value for name, value in claims.items() if value is not None}
    token = jwt.encode(said, options.jwt_secret or "", algorithm="HS256")
    body = {
        "user": user,
        "tenant": tenant,
        "token": token,
        "api_key": options.dev_api_key,
        "expires_at": expires_at,
        "command": _publish_command(),
        "outbox_url": options.dev_outbox_url,
    }
    headers = {**PAGE_HEADERS, "Cache-Control": "no-store"}
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


def _static(name: str, content_type: str) -> Handler:
    async def serve(_: web.Request) -> web.StreamResponse:
        # Read at each request: whoever changes the page sees it at the next reload.
        body = (PAGE_FOLDER / name).read_bytes()
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=PAGE_HEADERS)

    return serve
