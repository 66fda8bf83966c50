"""Every command of `seamark --help` does what its help says, on a stack that runs as `make run` starts it, under traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from engine.limits import PULL_MESSAGES_MAX
from ops.cli import app
from tests.support.commandchecks import campaigns, operators, stack, tenants  # noqa: F401 - they fill CHECKS
from tests.support.commandchecks.checking import CHECKS, answered, lines, records
from tests.support.manual import Manual
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(300)


def commands(group: Any = None, before: str = "") -> Iterator[str]:
    """The names of all commands, as they are typed."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_command_does_what_its_help_says(reader: Manual, tmp_path: Path, name: str) -> None:
    CHECKS[name](reader, tmp_path)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_command_says_what_it_does_when_asked_for_help(name: str) -> None:
    said = CliRunner().invoke(app, [*name.split(), "--help"])
    assert (said.exit_code, len(said.stdout.split()) > 5) == (0, True), said.output


def test_no_command_is_without_a_test_here() -> None:
    assert set(commands()) == CHECKS.keys(), "write down here what a new command must do"


def test_a_log_of_more_than_one_pull_is_verified_and_rebuilt(reader: Manual) -> None:
    for _ in range(2):
        events = [{"to": ["oscar"], "type": "demo.many"}] * 1000  # nobody else publishes to oscar
        url = f"{reader.described.gateway_url}/v1/events/bulk"
        status, answer = answered(url, reader.described.api_key, {"events": events})
        assert (status, len(answer["results"])) == (202, 1000)
    wait_for(lambda: len(records(reader, "oscar", "--limit", "0")) == PULL_MESSAGES_MAX * 2, seconds=60)
    for projection in ("unread", "inbox"):
        reader.seamark("rebuild", projection)
        [result] = lines(reader.seamark("verify", projection, "--json"))
        assert result["differences"] == 0
