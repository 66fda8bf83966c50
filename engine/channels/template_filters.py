"""Filters and tests of templates: each counts the work it does on a value, and takes only what it is for.

None makes anything much longer than what it gets.

Those of Jinja take everything. `x | round(9, 'ceil')` repeats a text a billion times; `x is odd` formats one, as wide as it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Final, NamedTuple

from jinja2 import Environment, Undefined, nodes, pass_environment
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from engine.channels.template_steps import LOOP_ROUNDS_MAX, TemplateFailed, compared, take, take_for

GIVEN_CHARS_MAX: Final = 100
"""Of a text that a filter is given; that of `default` may be as long as a template has room for."""

LENGTH_MAX: Final = 1_000_000
"""The bound of `length` and `leeway` of `truncate`, which never makes a text longer than it is."""

DIGITS_MAX: Final = 400
"""The longest text that `int` and `float` read; the largest float has 309 digits."""

_CASE_CHARS_A_STEP: Final = 16
_TITLE_CHARS_A_STEP: Final = 2
_DIGITS_A_STEP: Final = 32

_WHOLE_FROM: Final = 2.0**53
"""Floats from here on have no fraction that could be rounded."""

_PLACES_ROUNDED_A_STEP: Final = 10
"""Of a smaller float, behind its point: before it there are 16 at most."""


def text_of(value: Any) -> str:
    """A value as people write it: what Python makes of lists and objects is for nobody's eyes.

    Raises:
        TemplateFailed: it is a list or an object.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    raise TemplateFailed("a list or an object where a text should stand: say which of its members")


def _rewriting(name: str, chars_a_step: int) -> Callable[..., Any]:
    rewrite = FILTERS[name]

    def rewritten(value: Any, *given: Any, **named: Any) -> Any:
        take_for(value, chars_a_step)
        if isinstance(value, (list, dict)):
            raise TemplateFailed(f"`{name}` of a list or an object: say which of its members")
        return rewrite(value, *given, **named)

    return rewritten


def _looking(name: str) -> Callable[..., Any]:
    look = FILTERS[name]

    @wraps(look)  # keeps the mark by which Jinja knows that it wants the environment, too
    def looked(*given: Any, **named: Any) -> Any:
        take()
        return look(*given, **named)

    return looked


@pass_environment
def _truncate(environment: Environment, value: Any, *given: Any, **named: Any) -> Any:
    take_for(value)
    if not isinstance(value, (str, Undefined)):
        raise TemplateFailed("`truncate` of something that is no text")
    return FILTERS["truncate"](environment, value, *given, **named)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(value, float):
        take_for(value)
    else:
        take(1 + precision // _PLACES_ROUNDED_A_STEP)
        if method == "common" and abs(value) >= _WHOLE_FROM:
            return value  # Python would write out its hundreds of digits, and read the same number from them
    return FILTERS["round"](_number("round", value), precision, method)


def _int(value: Any, default: Any = 0, base: int = 10) -> Any:
    take_for(value, _DIGITS_A_STEP)
    return default if _too_long_for_a_number(value) else FILTERS["int"](value, default, base)


def _float(value: Any, default: Any = 0.0) -> Any:
    take_for(value, _DIGITS_A_STEP)
    return default if _too_long_for_a_number(value) else FILTERS["float"](value, default)


def _too_long_for_a_number(value: Any) -> bool:
    """Whether a text is too long to be read as a number. Python itself has no bound where the base is a power of two."""
    return isinstance(value, str) and len(value) > DIGITS_MAX and len(value.strip()) > DIGITS_MAX


def _join(value: Any, between: str = "") -> str:
    """Jinja's own takes texts, too, and puts itself between their letters: some of them in a row fill any memory."""
    if not isinstance(value, list) or len(value) > LOOP_ROUNDS_MAX:
        raise TemplateFailed(f"`join` takes a list of at most {LOOP_ROUNDS_MAX}")
    for one in value:
        take_for(one)
    return between.join(text_of(one) for one in value)


def _number(name: str, value: Any) -> Any:
    if isinstance(value, (int, float, Undefined)):  # the last says itself what is wrong
        return value
    raise TemplateFailed(f"`{name}` of something that is no number")


def _parity(name: str) -> Callable[[Any], bool]:
    of_number = _kind(name)

    def test(value: Any) -> bool:
        take_for(value)
        return of_number(_number(name, value))

    return test


def _comparison(operator: str) -> Callable[[Any, Any], Any]:
    def test(value: Any, other: Any) -> Any:
        return compared(operator, value, other)

    return test


def _kind(name: str) -> Callable[[Any], bool]:
    """A test of what a value is, taken over from Jinja.

    It looks at no member, so it is counted only as a node of the round that it stands in.
    """
    test: Callable[[Any], bool] = TESTS[name]  # type: ignore[assignment]
    return test


class _Filter(NamedTuple):
    """`given`: what stands in its brackets, in order: numbers of a range, or texts of so many characters; None: any constant."""

    function: Callable[..., Any]
    given: Mapping[str, range | int | None] = {}


_FILTERS: Final[Mapping[str, _Filter]] = {
    "capitalize": _Filter(_rewriting("capitalize", _CASE_CHARS_A_STEP)),
    "default": _Filter(_looking("default"), {"default_value": None, "boolean": None}),
    "first": _Filter(_looking("first")),
    "float": _Filter(_float, {"default": None}),
    "int": _Filter(_int, {"default": None, "base": range(37)}),
    "join": _Filter(_join, {"between": 10}),
    "last": _Filter(_looking("last")),
    "length": _Filter(_looking("length")),
    "lower": _Filter(_rewriting("lower", _CASE_CHARS_A_STEP)),
    "round": _Filter(_round, {"precision": range(21), "method": GIVEN_CHARS_MAX}),
    "title": _Filter(_rewriting("title", _TITLE_CHARS_A_STEP)),
    "trim": _Filter(_rewriting("trim", _CASE_CHARS_A_STEP), {"chars": GIVEN_CHARS_MAX}),
    "truncate": _Filter(_truncate, {
        "length": range(LENGTH_MAX), "killwords": None, "end": GIVEN_CHARS_MAX, "leeway": range(LENGTH_MAX),
    }),
    "upper": _Filter(_rewriting("upper", _CASE_CHARS_A_STEP)),
}  # fmt: skip

FILTERS_ALLOWED: Final[Mapping[str, Callable[..., Any]]] = {name: filter.function for name, filter in _FILTERS.items()}
"""By name, for an environment of Jinja."""

TESTS_ALLOWED: Final[Mapping[str, Callable[..., Any]]] = {
    **{name: _kind(name) for name in ("defined", "undefined", "none", "true", "false")},
    **{name: _kind(name) for name in ("string", "number", "mapping", "sequence")},
    **{name: _parity(name) for name in ("odd", "even")},
    **{name: _comparison(name) for name in ("eq", "ne", "lt", "gt", "in")},
    "le": _comparison("lteq"),
    "ge": _comparison("gteq"),
}  # fmt: skip
"""By name, for an environment of Jinja."""


def check_given(node: nodes.Filter) -> None:
    """Pass a filter that is given constants of its kinds and sizes.

    Raises:
        TemplateFailed: with what it may be given.
    """
    kinds = _FILTERS[node.name].given
    named: list[tuple[str, nodes.Expr]] = [(str(one.key), one.value) for one in node.kwargs]
    given = [*zip(kinds, node.args, strict=False), *named]
    if len(node.args) > len(kinds) or any(name not in kinds for name, _ in given):
        said = f"is given {' and '.join(kinds)}, and nothing else" if kinds else "is given nothing"
        raise TemplateFailed(f"line {node.lineno}: the filter `{node.name}` {said}")
    for name, constant in given:
        if not isinstance(constant, nodes.Const):
            raise TemplateFailed(f"line {node.lineno}: what the filter `{node.name}` is given must be written out")
        kind, value = kinds[name], constant.value
        if isinstance(kind, range) and (type(value) is not int or value not in kind):
            raise TemplateFailed(
                f"line {node.lineno}: `{name}` of the filter `{node.name}` is a whole number up to {kind[-1]}"
            )
        if isinstance(kind, int) and (not isinstance(value, str) or len(value) > kind):
            raise TemplateFailed(
                f"line {node.lineno}: `{name}` of the filter `{node.name}` is a text of at most {kind} characters"
            )
