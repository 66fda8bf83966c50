"""A rendering has an end that its values do not move: whatever goes through a value is counted by the value's size."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from jinja2 import filters, nodes
from jinja2 import tests as jinja_tests

from engine.channels import template_steps, templates
from engine.channels.template_filters import FILTERS_ALLOWED
from engine.channels.templates import LOOP_ROUNDS_MAX, TAG_CHARS_MAX, TAGS_MAX, TemplateFailed, check, render

ROUNDS = [1] * LOOP_ROUNDS_MAX
DEEP = [[[7] * 10] * 10] * 10

GOES_THROUGH = [
    ("{% if 0.5 in data.a %}{% endif %}", [7] * 120_000, None),
    ("{% if 0.5 not in data.a %}{% endif %}", [7] * 120_000, None),
    ("{% if data.b in data.a %}{% endif %}", [DEEP[0]] * 1000, [*DEEP[0][:-1], [7] * 9]),
    ("{% if data.b in data.a %}{% endif %}", "a" * 60_000, "a" * 200 + "b" + "a" * 200),
    ("{% if data.b in data.a %}{% endif %}", {"x": 1}, "k" * 60_000),
    ("{% if data.a is in(data.b) %}{% endif %}", 0.5, [7] * 120_000),
    ("{% if data.a == data.b %}{% endif %}", [7.5] * 15_000, [7.5] * 15_000),
    ("{% if data.a != data.b %}{% endif %}", DEEP * 10, [[[7] * 10] * 10] * 100),
    ("{% if data.a <= data.b %}{% endif %}", [7.5] * 15_000, [7.5] * 15_000),
    ("{% if data.a is ge(data.b) %}{% endif %}", [7.5] * 15_000, [7.5] * 15_000),
    ("{% if data.a == data.b %}{% endif %}", {str(n): n for n in range(9000)}, {str(n): n for n in range(9000)}),
    ("{% if data.a == data.b %}{% endif %}", "x" * 240_000, "".join(["x"] * 240_000)),
    ("{% if data.a is lt(data.b) %}{% endif %}", "x" * 240_000, "x" * 240_001),
    ("{% if 1 < data.a[2:] | length < 0 %}{% endif %}", [7] * 120_000, None),
    ("{% if data.a[1:] %}{% endif %}", [7] * 120_000, None),
    ("{% if data.a[::-2] %}{% endif %}", "x" * 240_000, None),
    ("{% if data.b[data.a] %}{% endif %}", "x" * 240_000, {}),
    ("{% if data.a | upper %}{% endif %}", "x" * 240_000, None),
    ("{% if data.a | title %}{% endif %}", "x " * 10_000, None),
    ("{% if data.a | trim %}{% endif %}", " " * 240_000, None),
    ("{% if data.a | join %}{% endif %}", ["x" * 240] * 1000, None),
    ("{% if data.a | join %}{% endif %}", [1] * 1000, None),
    ("{% if data.a | upper %}{% endif %}", 10**4000, None),
    ("{% if data.a | int %}{% endif %}", "9" * 240_000, None),
]


@pytest.mark.parametrize(
    ("statement", "a", "b"), GOES_THROUGH, ids=lambda one: one[:50] if isinstance(one, str) else ""
)
def test_what_goes_through_a_value_is_counted_by_its_size(statement: str, a: object, b: object) -> None:
    text = "{% for x in data.rounds %}" + statement * 25 + "{% endfor %}"
    check(text)
    began_at = time.process_time()
    with pytest.raises(TemplateFailed, match="looks at values"):
        render(text, {"data": {"rounds": ROUNDS, "a": a, "b": b}})
    assert time.process_time() - began_at < 3  # some 0.1 s; uncounted, these take minutes


FLOATS = [
    *(sign * 1.2345678901234567 * 2.0**exponent for exponent in range(-1022, 1024, 31) for sign in (1, -1)),
    1.7976931348623157e308, 1.1e308, 1e200, 1e23, 2.0**53 + 2, 2.0**53, 2.0**53 - 1, 4503599627370495.5, 0.1, 2.5, 2.675, 1e-5,
    2.2250738585072014e-308, 7.2994595786876e-311, 5e-324, 0.0, -0.0, math.inf, -math.inf, math.nan,
]  # fmt: skip
DIGITS_A_STEP_MAX, BITS_A_STEP_MAX = 30, 320


def steps_of(name: str, *given: Any) -> tuple[int, Any]:
    """The steps that a filter takes, and its result."""
    template_steps.begin()
    result = FILTERS_ALLOWED[name](*given)
    return template_steps.STEPS_MAX - template_steps._left.steps, result


@pytest.mark.parametrize("precision", [0, 1, 2, 9, 10, 19, 20])
def test_rounding_any_float_takes_steps_for_each_digit_that_python_writes_for_it(
    precision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python writes a float with all its digits to round it: 330 of them where it is large, for which it takes 20 µs."""
    digits, rounded = 0, filters.do_round

    def counting(value: Any, *given: Any) -> Any:
        nonlocal digits
        digits = len(f"{abs(value):.{precision}f}")
        return rounded(value, *given)

    monkeypatch.setitem(filters.FILTERS, "round", counting)
    for value in FLOATS:
        digits = 0
        steps, result = steps_of("round", value, precision)
        assert repr(result) == repr(rounded(value, precision)), value
        assert 1 <= steps <= 4, "a price is rounded for a few steps"
        assert digits <= DIGITS_A_STEP_MAX * steps, value
    for method in ("ceil", "floor"):
        for value in (one for one in FLOATS if abs(one) < 1e288):
            _, result = steps_of("round", value, precision, method)
            assert repr(result) == repr(rounded(value, precision, method)), value  # type: ignore[arg-type]
    with pytest.raises(filters.FilterArgumentError):
        steps_of("round", 1e308, precision, "up")


@pytest.mark.parametrize("name", ["join", "upper", "lower", "title", "capitalize", "trim"])
def test_writing_any_float_takes_steps_for_the_size_of_the_integers_that_it_is_written_by(name: str) -> None:
    for value in (one for one in FLOATS if math.isfinite(one)):
        steps, _ = steps_of(name, [value] if name == "join" else value)
        bits = max(one.bit_length() for one in value.as_integer_ratio())
        assert bits <= BITS_A_STEP_MAX * steps, value
        assert steps <= 5
    assert steps_of("join", [12.5, 0.1, 99.99, 1e6])[0] == 4, "prices are written for a step each"


def test_characters_that_escaping_drops_are_counted_too() -> None:
    text = "{% for x in data.rounds %}{{ data.a }}{% endfor %}"
    with pytest.raises(TemplateFailed, match="looks at values"):
        render(text, {"data": {"rounds": ROUNDS, "a": "\r" * 60_000}}, escape="markdown")


@pytest.mark.parametrize(
    "statement", ["{% for y in x %}{% endfor %}", "{% if " + "x and " * 40 + "x %}{% endif %}", "{{ '' }}"]
)
def test_a_round_is_counted_by_what_stands_in_it(statement: str) -> None:
    text = "{% for x in data %}" + statement * 390 + "{% endfor %}"
    check(text)
    with pytest.raises(TemplateFailed, match="looks at values"):
        render(text, {"data": [[]] * LOOP_ROUNDS_MAX} if "for y" in statement else {"data": ROUNDS})


@pytest.mark.parametrize(("text", "values"), [
    ("{{ data.x is odd }}", "%09999999d"), ("{{ data.x is even }}", "%09999999d"), ("{{ '%09999999d' is odd }}", None),
    ("{{ data.x | round(7, 'ceil') }}", "x"), ("{{ data.x | round(7, 'floor') }}", [1]), ("{{ data.x | round }}", "x"),
    ("{{ data.x | upper }}", [1]), ("{{ data.x | title }}", {"a": 1}), ("{{ data.x | trim }}", [1]),
    ("{{ data.x | truncate(5) }}", [1] * 20),
])  # fmt: skip
def test_filters_and_tests_of_numbers_take_numbers_and_those_of_texts_no_lists(text: str, values: object) -> None:
    with pytest.raises(TemplateFailed, match=r"is no number|is no text|say which of its members"):
        render(text, {"data": {"x": values}})


@pytest.mark.parametrize(("text", "values"), [("{{ data.x - 1 }}", "x"), ("{{ 'a' - 1 }}", None)])
def test_only_numbers_are_subtracted(text: str, values: object) -> None:
    with pytest.raises(TemplateFailed, match="TypeError"):
        render(text, {"data": {"x": values}})


@pytest.mark.parametrize("given", [
    "round(21)", "round(10000000, 'ceil')", "round(precision=99999)", "round(2.5)", "round('x')", "round(true)", "round(none)",
    "truncate(99999999)", "truncate(5, true, '', 99999999)",
    "truncate(length=99999999)", "truncate(leeway='x')",
    "int(0, 99)", "int(base=99)",
    "int(0, 'x')", "trim('" + "x" * 101 + "')", "trim(7)", "join('12345678901')",
    "truncate(5, true, '" + "x" * 101 + "')", "round(1, 2, 3, 4)", "round(digits=1)", "upper(1)",
    "round(*data.x)", "round(**data.x)", "default(data.x)",
])  # fmt: skip
def test_what_a_filter_is_given_is_bounded_when_the_template_is_put(given: str) -> None:
    for text in ("{{ data.x | %s }}" % given, "{{ 1 | %s }}" % given):  # noqa: UP031
        with pytest.raises(TemplateFailed, match=f"filter `{given.partition('(')[0]}`"):
            check(text)


@pytest.mark.parametrize("text", [
    "{{ 1.5 | round(20, 'ceil') }}", "{{ 'x' | upper }}", "{{ 3 is odd }}", "{{ 'a' in 'b' }}", "{{ 'abc'[1:] }}",
    "{{ 'abc'[1] }}", "{{ 1 - 2 }}",
    "{% if 'x' | title == 'X' %}{% endif %}", "{{ 'x' | truncate(5) }}",
])  # fmt: skip
def test_nothing_of_a_template_runs_while_it_is_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("it ran")

    templates._compiled.cache_clear()
    templates._environment.cache_clear()
    for name in filters.FILTERS:
        monkeypatch.setitem(filters.FILTERS, name, ran)
    for name in jinja_tests.TESTS:
        monkeypatch.setitem(jinja_tests.TESTS, name, ran)
    for kind in (
        nodes.Filter,
        nodes.Test,
        nodes.Compare,
        nodes.Getitem,
        nodes.BinExpr,
    ):
        monkeypatch.setattr(kind, "as_const", ran)
    check(text)


@pytest.mark.parametrize("text", [
    "{{ '}}' if " + "a or " * 10_000 + "a }}", "{{ '}}' ~ a" + " ~ a" * 20_000 + " }}",
    '{% if "%}" ' + "or a " * 10_000 + "%}{% endif %}",
])  # fmt: skip
def test_a_long_expression_is_refused_unparsed_even_if_an_end_seems_to_stand_in_it(text: str) -> None:
    with pytest.raises(TemplateFailed, match=f"more than {TAG_CHARS_MAX} characters"):
        check(text)


def test_compiling_takes_no_longer_for_long_conditions() -> None:
    began_at = time.process_time()
    check(("{% if " + "x and " * 45 + "x %}{% endif %}") * (TAGS_MAX // 3))
    assert time.process_time() - began_at < 5  # some 0.5 s; 15 s with what Jinja calls optimizing


@pytest.mark.parametrize(("text", "shown"), [
    ("{{ 1 < data.n < 9 }}{{ 9 < data.n < 1 }}{{ 1 < data.n > 4 == true }}", "truefalsefalse"),
    ("{{ 9 < data.n < data.none.more }}", "false"),  # what stands behind is not looked at
    ("{{ 'b' in data.l }}{{ 'z' not in data.l }}{{ 'ell' in data.t }}{{ 'n' in data }}", "truetruetruetrue"),
    ("{{ data.l == data.m }}{{ data.l != data.m }}{{ data.l < data.o }}{{ data.d == data.d }}", "truefalsetruetrue"),
    ("{{ data.t[1:3] }}{{ data.t[-2:] }}{{ data.t[::2] }}{{ data.l[:2] | join }}{{ data.l[5:] | length }}", "ellohloab0"),
    ("{{ data.l[data.n - 4] }}{{ data.t[data.n:] == '' }}", "btrue"),
    ("{{ 2.567 | round(2) }} {{ 2.561 | round(2, 'ceil') }} {{ data.n | round }} {{ 'ff' | int(0, 16) }}", "2.57 2.57 5 255"),
    ("{{ data.t | truncate(4, true, '…', 0) }}{{ data.n | upper }}{{ '--x-' | trim('-') }}{{ data.l | last }}", "hel…5xc"),
    ("{{ 3 is odd }}{{ data.n is even }}{{ data.n is gt 4 }}{{ 'a' is in data.l }}", "truefalsetruetrue"),
    ("{{ '12.7' | int }}{{ 'x' | int(3) }}{{ ' 7 ' | int }}{{ '1.5' | float }}{{ data.l | int }}", "12371.50"),
])  # fmt: skip
def test_comparisons_slices_and_filters_that_count_give_jinjas_results(text: str, shown: str) -> None:
    values = {"n": 5, "l": ["a", "b", "c"], "m": ["a", "b", "c"], "o": ["b"], "t": "hello", "d": {"x": [1]}}
    assert render(text, {"data": values}) == shown


def test_an_ordinary_list_of_a_thousand_rows_stays_below_the_bound() -> None:
    text = "{% for x in data.l %}{% if x.id in data.chosen and x.name != '' %}{{ x.name | title | truncate(12) }}{% endif %}"
    text += "{% endfor %}"
    rows = [{"id": f"id-{n}", "name": "ann of green gables"} for n in range(LOOP_ROUNDS_MAX)]
    chosen = [f"id-{n}" for n in range(0, LOOP_ROUNDS_MAX, 10)]
    assert render(text, {"data": {"l": rows, "chosen": chosen}}) == "Ann Of..." * 100
