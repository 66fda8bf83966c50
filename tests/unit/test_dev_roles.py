"""What keeps a development stack running: it starts again what ends, and a failure to do so is said, not the end."""

import re
from pathlib import Path

import pytest

from ops.dev import roles, stores
from ops.dev.child import Child, ServerFailed
from ops.dev.secretsfile import Kept
from ops.dev.servers import Postgres
from ops.dev.stack import Options, Stack


class Ended(Exception):
    """Ends `keep`, which otherwise goes on for ever."""


async def test_what_cannot_be_started_is_tried_again_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(roles, "BACKOFF_SECONDS_MIN", 0.0)
    said: list[str] = []
    outcomes = [OSError("no process to be had"), ServerFailed("it runs already"), Ended()]

    def spawn() -> None:
        raise outcomes.pop(0)

    with pytest.raises(Ended):
        await roles.keep(Child("server", tmp_path / "log"), spawn, said.append)
    assert [line for line in said if "cannot be started" in line] == [
        "server cannot be started: no process to be had",
        "server cannot be started: it runs already",
    ]


async def test_a_fault_of_one_task_is_raised_as_itself(tmp_path: Path) -> None:
    def say(line: str) -> None:
        raise Ended

    stack = Stack(Options(tmp_path), Kept(), say, 0)
    stack.roles.append(roles.Role("role", [], {}, tmp_path / "log", say))
    with pytest.raises(Ended):
        await stack.keep()


def test_a_database_that_is_not_made_in_time_is_a_failure_with_its_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = Postgres(tmp_path)
    for seconds in (0.2, 2.0, 20.0):
        monkeypatch.setattr(stores, "READY_SECONDS_MAX", seconds)
        with pytest.raises(ServerFailed, match=re.escape(f"initdb did not end within {seconds:g} s")) as failed:
            server._initdb(["sh", "-c", "echo so far; exec sleep 60"])
        if "\nso far" in str(failed.value):
            return  # else a busy machine took longer to begin with it
    pytest.fail(str(failed.value))
