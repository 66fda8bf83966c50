"""The table of spans in docs/operations.md names what is made."""

import re
from pathlib import Path

from engine.traces import names

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

NO_HOPS = {"publish events.{tenant}.{key}.{type}", "process log.", "POST /v1/events"}
"""Spans of applications, and of requests."""


def test_the_table_of_spans_has_each_kind_of_hop_and_no_other() -> None:
    table = OPERATIONS.read_text().partition("| span | of | belongs to |\n")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[1:]]
    shown = {name.removesuffix("…") for cell in cells for name in re.findall("`([^`]+)`", cell)}
    assert shown > NO_HOPS
    # What is said of one of EVENTS is said below the table of those of BULK and LATER.
    titles = {hop.title.replace(names.BULK, names.EVENT) for hop in vars(names).values() if isinstance(hop, names.Hop)}
    assert {name for name in shown - NO_HOPS if not any(title.startswith(name) for title in titles)} == set()
    assert {title for title in titles if not any(title.startswith(name) for name in shown)} == set()
