"""What the gateway overrides of aiohttp's private parts is still there, and no version that nobody has tried is let in."""

import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from packaging.requirements import Requirement

from gateway.carriers.connection import Connection, Runner, _Server
from gateway.carriers.ws import _Inbox, _Socket

ROOT = Path(__file__).parents[2]
OVERRIDES = {
    Connection: ("pause_writing", "resume_writing", "connection_lost", "handle_error"),
    _Server: ("__call__",),
    Runner: ("_make_server",),
    _Socket: ("_post_start",),
    _Inbox: ("feed_data",),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in OVERRIDES.items() for name in names])
def test_aiohttp_calls_what_is_overridden_with_the_arguments_it_had(kind: type, name: str) -> None:
    theirs = getattr(kind.__mro__[1], name)
    try:
        expected = list(inspect.signature(theirs).parameters)
    except ValueError:
        pytest.fail(f"{theirs} is compiled without a signature: look at its source, and say here what it takes")
    assert list(inspect.signature(getattr(kind, name)).parameters) == expected


async def test_a_websocket_of_ours_stands_on_all_that_one_of_aiohttp_stands_on() -> None:
    """`_post_start` is written anew: a new aiohttp may set more there than ours does."""
    made: dict[str, dict[str, Any]] = {}

    async def handler(request: web.Request) -> web.WebSocketResponse:
        response = {"/theirs": web.WebSocketResponse, "/ours": _Socket}[request.path](compress=False)
        await response.prepare(request)
        made[request.path] = dict(vars(response))
        message = await response.receive()
        assert message.type is aiohttp.WSMsgType.TEXT
        request.transport.close()
        return response

    app = web.Application()
    app.router.add_get("/{which}", handler)
    runner = Runner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{site.port}") as http:
            for path in ("/theirs", "/ours"):
                async with http.ws_connect(path) as ws:
                    await ws.send_str("hello")
                    assert (await ws.receive(timeout=30)).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    finally:
        await runner.cleanup()
    theirs, ours = ({name for name, value in made[path].items() if value is not None} for path in ("/theirs", "/ours"))
    assert ours - {"inbox"} == theirs
    assert not made["/ours"]["inbox"]._buffer  # which `_Inbox.wait` looks at


@pytest.mark.parametrize("name", ["aiohttp", "nats-py"])
def test_only_versions_whose_private_parts_were_tried_are_let_in(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [bound] = [each.specifier for line in project["dependencies"] if (each := Requirement(line)).name == name]
    major, minor = version(name).split(".")[:2]
    assert bound.contains(version(name))
    assert not bound.contains(f"{major}.{int(minor) + 1}.0")
