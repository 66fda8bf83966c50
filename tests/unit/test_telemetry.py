"""Where log lines go, and that losing them is all that can happen to them."""

import os
from pathlib import Path

from engine.telemetry import Output


def test_lines_leave_at_once_and_whole(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        output = Output(file)
        output.write("one\n")
        output.write("zwei: ü, half of a pair: \ud800\n")
        assert (tmp_path / "log").read_text() == "one\nzwei: ü, half of a pair: \\ud800\n"


def test_a_line_that_cannot_be_written_is_lost_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        Output(gone).write("nobody reads this\n")
    Output(None).write("nor this\n")
