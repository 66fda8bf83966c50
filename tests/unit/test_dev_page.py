"""The dev page's routes: who gets a session, what is served, and under which policy."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import jwt
import pytest
from aiohttp import web

import gateway
from engine.broker.jetstream import NatsSettings
from gateway.api.dev_page import FILES, dev_routes, is_loopback_host
from gateway.http.problems import as_problems
from gateway.options import GatewayOptions
from tests.support.tokens import SECRET

WEB = Path(gateway.__file__).parent / "web"


@pytest.fixture
async def page():
    app = web.Application(middlewares=[as_problems])
    options = GatewayOptions(
        nats=NatsSettings(""), dev=True, jwt_secret=SECRET, dev_api_key="key", issuer="us", audience="them"
    )
    app.add_routes(dev_routes(options))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
        yield http
    await runner.cleanup()


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True), ("127.0.0.1:8080", True), ("localhost:1", True), ("LOCALHOST", True), ("[::1]:8080", True),
        ("127.8.9.1", True), ("", False), ("evil.example", False), ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8080", False), ("10.0.0.1", False), ("0.0.0.0", False), ("localhost@evil.example", False),
        ("evil.example/@localhost", False), ("[::]", False), ("[", False), ("localhost:x", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_count_as_this_machine(host, local):
    assert is_loopback_host(host) is local


async def test_a_session_names_the_user_and_carries_a_token_the_gateway_accepts(page):
    async with page.get("/dev/session", params={"user": "älice@example.com"}) as response:
        assert response.status == 200
        assert response.headers["Cache-Control"] == "no-store"
        session = await response.json()
    claims = jwt.decode(session["token"], SECRET, algorithms=["HS256"], issuer="us", audience="them")
    assert (claims["sub"], claims["tenant"], session["api_key"]) == ("älice@example.com", "default", "key")
    assert claims["exp"] == session["expires_at"]


async def test_the_suggested_command_names_the_data_folder_as_a_shell_takes_it(page, monkeypatch):
    for folder, words in ((None, ""), ("other", " --folder other"), ("my data", " --folder 'my data'")):
        if folder is not None:
            monkeypatch.setenv("SEAMARK_FOLDER", folder)
        async with page.get("/dev/session") as response:
            assert (await response.json())["command"].endswith(f"seamark publish{words}")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80", "Origin": "http://evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_a_rebound_name_another_site_or_another_port_gets_no_session(page, headers):
    async with page.get("/dev/session", headers=headers) as response:
        assert response.status == 403
        assert response.content_type == "application/problem+json"
        assert "token" not in await response.json()


async def test_an_impossible_user_is_said(page):
    for user in ("", "x" * 129):
        async with page.get("/dev/session", params={"user": user}) as response:
            assert response.status == 400
            assert (await response.json())["field"] == "user"


async def test_every_file_is_served_under_a_policy_without_inline_code_and_nothing_else_is(page):
    for path in FILES:
        async with page.get(path) as response:
            assert response.status == 200
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/web", "/dev_page.py", "/..%2fdev_page.py", "/index.html"):
        async with page.get(path) as response:
            assert response.status == 404
    assert {one.name for one in WEB.iterdir()} == {name for name, _ in FILES.values()}


def test_the_page_asks_nobody_else_for_anything_and_has_no_inline_code():
    html = (WEB / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", html) == []
    assert re.findall(r"\son\w+=|\sstyle=", html) == []
    for file in WEB.iterdir():
        outside = re.findall(
            r"""(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}""", file.read_text().replace("http://www.w3.org", "")
        )
        assert outside == [], file.name
