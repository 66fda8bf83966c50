"""The funnel as an operator sees it."""

from ops.cli.funnel import drawn
from projections.funnel.cohorts import Step


def test_a_funnel_shows_every_stage_and_the_smallest_number_above_none() -> None:
    step = Step("default", "demo.hello", "inapp", 500, 500, 1000, 500, 1, 0)
    assert drawn(step, width=10) == [
        "default · demo.hello · inapp",
        "  emitted        500  █████",
        "  stored         500  █████",
        "  dispatched    1000  ██████████",
        "  sent           500  █████",
        "  acknowledged     1  █",
        "  read             0  ",
    ]
