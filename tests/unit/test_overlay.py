"""The configuration of a server of tests: the shipped one, but for what an overlay names."""

import re
from difflib import ndiff
from pathlib import Path

import pytest

from engine.topology.files import files_folder
from ops.dev.binaries import postgres_installation
from ops.dev.overlay import Change, overlaid_file, overlaid_settings, with_includes
from ops.dev.servers import NatsCluster, NatsServer, Postgres, Valkey
from ops.dev.stores import POSTGRES_SETTINGS, VALKEY_SETTINGS

ROOT = Path(__file__).parents[2]
SMALL = """\
listen: "a"  # { not a block
jetstream {
  store_dir: "x{"
  limits {
    max: 1000
  }
}
"""


def change(key: str, value: str) -> Change:
    return Change(key, value, "a test")


def differing(shipped: str, written: str) -> dict[str, list[str]]:
    """Lines that only one of both has, comments left out."""
    lines = [
        line for line in ndiff(shipped.splitlines(), written.splitlines()) if not line[2:].lstrip().startswith("#")
    ]
    return {sign: [line[2:].strip() for line in lines if line[0] == sign and line[2:].strip()] for sign in "-+"}


def test_nothing_but_the_embedded_servers_starts_a_program_of_a_server() -> None:
    """A server that is started elsewhere has a configuration of its own, and what fails as shipped passes there."""
    named = re.compile(r"\b(nats_server_binary|valkey_binary|postgres_bin|postgres_installation)\(")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("ops", "seamark", "tests", "bench", "chaos")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__) and named.search(path.read_text(encoding="utf-8"))
    }
    others = {
        "tests/acceptance/test_chart_runs.py",  # has nats-server judge the files that the chart's pods write
        "tests/acceptance/test_image.py",  # the same of compose.yaml, and starts its Valkey as it is written there
        "tests/integration/test_servers.py",  # only moves PostgreSQL to another folder; the embedded server starts it there
    }
    assert {name for name in found if not name.startswith("ops/dev/")} == others
    assert "ops/dev/natsserver.py" in found


@pytest.mark.parametrize(
    ("key", "value", "gone", "come"),
    [
        ("listen", '"b"', ['listen: "a"  # { not a block'], ['listen: "b"']),
        ("jetstream.limits.max", "7", ["max: 1000"], ["max: 7"]),
        ("jetstream.sync_interval", "always", [], ["sync_interval: always"]),
        ("new", "{ a: 1 }", [], ["new: { a: 1 }"]),
    ],
)
def test_an_overlay_changes_what_it_names_in_its_block_and_nothing_else(
    key: str, value: str, gone: list[str], come: list[str]
) -> None:
    written = overlaid_file(SMALL, [change(key, value)])
    assert differing(SMALL, written) == {"-": gone, "+": come}
    assert "otherwise than shipped: a test" in written


def test_a_block_that_the_shipped_file_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no block 'jetstreem'"):
        overlaid_file(SMALL, [change("jetstreem.sync_interval", "always")])


def test_a_server_of_a_test_runs_the_shipped_file_but_for_its_addresses(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats")
    server.prepare()
    shipped = (files_folder() / "server.conf").read_text()
    found = differing(shipped, (server.data / "nats-server.conf").read_text())
    assert found["-"] == ['listen: "127.0.0.1:4222"', 'http: "127.0.0.1:8222"']
    assert found["+"] == [f'listen: "127.0.0.1:{server.port}"', f'http: "127.0.0.1:{server.monitor_port}"']


def test_a_cluster_of_a_test_runs_the_shipped_files_but_for_its_addresses_and_an_administrator(tmp_path: Path) -> None:
    member = NatsCluster(tmp_path).servers[0]
    member.prepare()
    found = differing(with_includes(files_folder() / "cluster.conf"), (member.data / "nats-server.conf").read_text())
    assert {line.split(":")[0] for line in found["-"]} == {"listen", "http"}
    assert {line.split(":")[0] for line in found["+"]} == {"listen", "http", "{ user"}
    assert next(line for line in found["+"] if "user" in line).startswith("{ user: admin, password: ")


def test_stores_of_a_test_run_with_the_shipped_settings_but_for_what_an_overlay_names(tmp_path: Path) -> None:
    forgetful = Valkey(tmp_path / "v", overlay=(change("appendonly", "no"),)).command()
    for name, value in {**VALKEY_SETTINGS, "appendonly": "no"}.items():
        assert forgetful[forgetful.index(f"--{name}") + 1] == value
    postgres = Postgres(tmp_path / "p")
    postgres._installation = postgres_installation()
    assert {f"{name}={value}" for name, value in POSTGRES_SETTINGS.items()} <= set(postgres.command())
    assert overlaid_settings(POSTGRES_SETTINGS, [change("fsync", "off")])["fsync"] == "off"
