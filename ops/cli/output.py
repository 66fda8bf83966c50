"""How commands print: JSON lines for machines, a few coloured words for people."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import TaskID


class _Remarks(Console):
    """A console on standard error: what it says is for people, and nothing ends because nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


out = Console(highlight=False, soft_wrap=True)
err = _Remarks(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on one line, unbuffered: it may be read by a pipe that waits for it."""
    typer.echo(msgspec.json.encode(value))


@contextlib.contextmanager
def stages(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show how far a command has come, with one bar for each stage of its work. Only a terminal on standard error gets them.

    Args:
        quiet: show nothing.

    Yields:
        `progress(stage, done, total)`, to be called as work goes on.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = quiet or not err.is_terminal
    # What the command prints stays on standard output: it may be on its way into a file.
    with Progress(*columns, console=err, disable=hidden, redirect_stdout=False, redirect_stderr=False) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def keep_logs_apart() -> None:
    """Errors only, and on standard error: what a command prints may be read by a program. Roles set up logs of their own."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    logging.basicConfig(level=logging.ERROR)


def readable(stored: bytes) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A stored record: what to print of it as JSON, and the record itself, None where it is no object of JSON.

    Anybody with the broker's credentials can write into a log, and one message that is none must not hide the others.
    """
    try:
        record = msgspec.json.decode(stored, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {"record": None, "raw": stored.decode(errors="replace")}, None
    return {"record": record}, record
