"""Steps of templates: the work of a rendering, counted as it is done, so that it has the same end on every machine.

A step is some 0.5 µs. Whatever goes through a value takes steps by the value's size before it begins: a comparison of two lists
by one instruction of Python's can be the work of a million looks.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from jinja2 import Undefined

STEPS_MAX: Final = 100_000
"""Of one rendering: some 50 to 150 ms. A look at a member, a comparison or a filter is one step, more where the value is large.
So each of 1000 rounds may take a hundred."""

LOOP_ROUNDS_MAX: Final = 1000
"""Rounds of all loops of a rendering together: more than a mail lists."""

NODES_A_STEP: Final = 16
"""Names, constants and operators that are gone through in a round of a loop: they are cheap, but a template may have 20 000."""

WRITTEN_NODES: Final = 4
"""As many nodes count in addition for each value, or text between values, that is written."""

_CHARS_A_STEP: Final = 256
"""Copied, or compared."""

_BITS_A_STEP: Final = 256
"""Of a float's exponent: Python writes it by integers that have so many bits."""

_MEMBERS_A_STEP: Final = 4
"""Members of a list in one step, where their own members are gone through as well; four times as many where each is only compared
with a short value. Of an object each member is a step."""

_PLACES_A_STEP: Final = 1024
"""Comparisons of characters in one step, where a text is sought at each place of another."""

_SHORT_CHARS, _SOUGHT_CHARS = 2500, 100
"""`in` takes Python time by the product of both lengths; only if the text is longer than the first and what is sought longer than
the second, by their sum."""


class TemplateFailed(Exception):
    """A template cannot be rendered. The message is for its author: it holds nothing of the values."""


class _Left(threading.local):
    """What is left to the rendering that goes on in this thread: the environment that looks at values belongs to all."""

    rounds = 0
    steps = 0


_left: Final = _Left()


def begin() -> None:
    """Begin a rendering in this thread."""
    _left.rounds, _left.steps = LOOP_ROUNDS_MAX, STEPS_MAX


def take(steps: int = 1) -> None:
    """Count steps before they are done.

    Raises:
        TemplateFailed: the rendering has taken as many as it may.
    """
    _left.steps -= steps
    if _left.steps < 0:
        raise TemplateFailed(f"more than {STEPS_MAX} looks at values")


def take_rounds(rounds: int, nodes: int) -> None:
    """Count the rounds of a loop before they begin.

    Args:
        nodes: what stands in the loop, without what stands in loops inside it.

    Raises:
        TemplateFailed: as `take`, or for too many rounds.
    """
    _left.rounds -= rounds
    if _left.rounds < 0:
        raise TemplateFailed(f"more than {LOOP_ROUNDS_MAX} rounds of its loops")
    take(2 + rounds * nodes // NODES_A_STEP)


def take_for(value: Any, chars_a_step: int = _CHARS_A_STEP) -> None:
    """Count what goes through a value once, or writes it.

    A text is counted by its length, an integer by its digits, a float by its exponent, all else as one step.
    """
    if isinstance(value, str):
        take(1 + len(value) // chars_a_step)
    elif isinstance(value, int):
        take(1 + (value.bit_length() ** 2 >> 18))  # JSON has numbers of 4300 digits, which are written in 500 µs
    elif isinstance(value, float):
        take(1 + abs(math.frexp(value)[1]) // _BITS_A_STEP)
    else:
        take()


def sliced(value: Any, part: slice) -> Any:
    """A part of a text or a list, copied."""
    if isinstance(value, (str, list)):
        take(1 + len(range(*part.indices(len(value)))) // _CHARS_A_STEP)
    return value[part]


def compared(name: str, left: Any, right: Any) -> Any:
    """What a comparison says.

    Args:
        name: as Jinja's syntax tree calls it.

    Raises:
        TemplateFailed: there are no steps left for it, or `right` is nothing that holds something.
    """
    if name in _MEMBERSHIP:
        _take_looking_for(left, right)
    elif isinstance(left, str) and isinstance(right, str):
        take(1 + min(len(left), len(right)) // _CHARS_A_STEP)
    elif isinstance(left, (list, dict)) and type(left) is type(right):
        take()
        if len(left) == len(right) or name not in _EQUALITY:
            _take_through(left if len(left) <= len(right) else right)
    else:
        take()
    return _COMPARISONS[name](left, right)


_EQUALITY: Final = ("eq", "ne")
_MEMBERSHIP: Final = ("in", "notin")
_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


def _take_looking_for(sought: Any, inside: Any) -> None:
    if isinstance(inside, str) and isinstance(sought, str):
        chars = len(sought) if len(inside) < _SHORT_CHARS else min(len(sought), _SOUGHT_CHARS)
        take(1 + len(inside) * max(4, chars) // _PLACES_A_STEP)
    elif isinstance(inside, list):
        each = _take_through(sought)
        take(1 + len(inside) // (4 * _MEMBERS_A_STEP) + len(inside) * each)
    elif isinstance(inside, (dict, str)):
        take_for(sought)
    elif not isinstance(inside, Undefined):  # that says itself what is wrong
        raise TemplateFailed("`in` something that is no list, no object and no text")


def _take_through(value: Any) -> int:
    """Count the steps of something that goes through all members of a value, and theirs: they are returned, too."""
    waiting, before = [value], _left.steps
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            take(len(one) // _CHARS_A_STEP)
        elif isinstance(one, (list, dict)):
            take(1 + (len(one) if isinstance(one, dict) else len(one) // _MEMBERS_A_STEP))
            waiting.extend(one)
            if isinstance(one, dict):
                waiting.extend(one.values())
    return before - _left.steps
