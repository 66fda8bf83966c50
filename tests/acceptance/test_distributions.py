"""What `pip install seamark` brings to an application, and `pip install seamark-server` to whoever runs the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.distributions import ROOT, Environment, build, unpacked
from tests.support.manual import Manual

pytestmark = pytest.mark.timeout(600)

SERVER = (
    "asyncpg",
    "engine",
    "gateway",
    "ops",
    "projections",
    "prometheus_client",
    "redis",
    "structlog",
    "typer",
    "uvloop",
)
EXAMPLES = ("service.py", "device.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "seamark", "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An application's environment: the SDK, what its wheel says it needs, and the examples."""
    made = Environment(tmp_path_factory.mktemp("app") / "venv")
    made.provide(needed(wheel))
    made.install(wheel)
    for name in EXAMPLES:
        (made.folder / name).write_text((ROOT / "examples" / name).read_text())
    return made


def metadata(wheel: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        headers = Parser().parsestr(archive.read(name).decode())
    return {name: headers.get_all(name) or [] for name in headers}


def needed(wheel: Path) -> list[str]:
    """What the wheel requires without extras."""
    return [line for line in metadata(wheel)["Requires-Dist"] if "extra ==" not in line]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def test_an_application_gets_three_packages_and_what_they_need_and_the_licence(app: Environment, wheel: Path) -> None:
    assert {Requirement(line).name for line in needed(wheel)} == {"aiohttp", "msgspec", "nats-py"}
    assert app.pip("check") == "No broken requirements found.\n"
    listed = {canonicalize_name(one["name"]) for one in json.loads(app.pip("list", "--format", "json"))}
    assert listed == {*app.provided, "seamark"}
    files = contents(wheel)
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "seamark").rglob("*.py")} | {"seamark/py.typed"}
    assert {name for name in files if ".dist-info/" not in name} == ours
    assert (ROOT / "LICENSE").read_bytes() in files.values()


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    for name in ("sdist", "source", "wheel"):
        (tmp_path / name).mkdir()
    source = unpacked(build(ROOT / "seamark", "sdist", tmp_path / "sdist"), tmp_path / "source")
    assert contents(build(source, "wheel", tmp_path / "wheel")) == contents(wheel)


def test_all_of_seamark_is_there_without_the_server_and_without_opentelemetry(app: Environment) -> None:
    program = (
        "import importlib.util, seamark, sys\n"
        "names = [getattr(seamark, name).__name__ for name in seamark.__all__ if name != 'Item']\n"
        f"found = [name for name in ('opentelemetry', *{SERVER}) if importlib.util.find_spec(name)]\n"
        "print(len(names), found, seamark.__file__)"
    )
    number, found, place = app.run("python", "-I", "-c", program).split()
    assert int(number) > 20
    assert found == "[]"
    assert Path(place).is_relative_to(app.packages)


def test_an_application_publishes_over_nats_and_http_and_follows_what_it_published(
    app: Environment, reader: Manual
) -> None:
    stack, cursor = reader.described, str(app.folder / "kitchen.cursor")
    ways = (stack.nats_url, "alice", "1"), (stack.gateway_url, "alice", "2", stack.api_key)
    for address, user, order, *key in ways:
        said = app.run("python", "service.py", address, user, order, *key)
        assert said == f"order-{order}-shipped is stored\n"
    assert app.run("python", "service.py", *ways[0]) == "order-1-shipped is already stored\n"
    argv = [str(app.python), "device.py", stack.gateway_url, stack.token, cursor]
    with subprocess.Popen(argv, cwd=app.folder, env=app.env, stdout=subprocess.PIPE, text=True) as device:
        try:
            assert device.stdout is not None
            due = ["caught up\n", *(f": order.shipped {{'order': {order}}}\n" for order in (1, 2))]
            while due:
                line = device.stdout.readline()
                assert line, f"the device has ended without {due}"
                due = [end for end in due if not line.endswith(end)]
        finally:
            device.kill()
    assert app.run("python", "device.py", stack.gateway_url, "no token", cursor) == "sign in again\n"


def test_the_examples_pass_mypy_strict_against_the_installed_package(app: Environment, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--cache-dir", str(tmp_path)]
    argv += ["--python-executable", str(app.python), *EXAMPLES]
    done = subprocess.run(argv, cwd=app.folder, env=app.env, capture_output=True, text=True, timeout=400)
    assert done.stdout == "Success: no issues found in 2 source files\n", done.stdout + done.stderr


def test_the_server_is_a_distribution_of_its_own_that_stands_on_this_very_sdk(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("server")
    server = build(ROOT, "wheel", folder)
    version = tomllib.loads((ROOT / "seamark/pyproject.toml").read_text())["project"]["version"]
    assert metadata(server)["Version"] == [version]
    assert f"seamark=={version}" in needed(server)
    environment = Environment(folder / "venv")
    environment.provide([line for line in needed(server) if Requirement(line).name != "seamark"])
    environment.install(wheel, server)
    assert environment.pip("check") == "No broken requirements found.\n"
    assert "Usage: seamark" in environment.run("seamark", "--help")
    written = json.loads(environment.run("seamark", "topology", "render", "files", "--json"))
    assert any(name.endswith("EVENTS.dev.json") for name in written)  # from the files that the wheel brings
