"""A template shows values; whatever else its author or a value tries, it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from engine.channels.templates import LOOP_ROUNDS_MAX, OUTPUT_CHARS_MAX, TAGS_MAX, TemplateFailed, check, render

VALUES = {
    "data": {"name": "Ann", "items": [1, 2], "rows": [{"n": "a"}, {"n": "b"}], "none": None, "on": True, "price": 9.5}
}


@pytest.mark.parametrize(("text", "shown"), [
    ("Hi {{ data.name }}!", "Hi Ann!"),
    ("{{ data['name'] | upper }}", "ANN"),
    ("{% for row in data.rows %}{{ loop.index }}{{ row.n }}{% if not loop.last %}, {% endif %}{% endfor %}", "1a, 2b"),
    ("{{ data.items | join(', ') }} of {{ data.items | length }}", "1, 2 of 2"),
    ("{% for one in data.items %}{{ one }}{% endfor %}", "12"),  # `items` is a member of the object, not a method of Python's
    ("{{ data.nick or data.name }}{% if data.nick %}!{% endif %}", "Ann"),
    ("{{ data.nick | default('you') }}", "you"),
    ("{% if data.price > 5 and 'n' in data.name %}x{% elif data.on %}y{% endif %}", "x"),
    ("{{ data.none }}|{{ data.on }}|{{ data.price }}", "|true|9.5"),
    ("and {{ data.items | length - 1 }} more", "and 1 more"),
    ("{# nobody sees it #}{% raw %}{{ x }}{% endraw %}\n", "{{ x }}\n"),
    ("{% for x in data.nothing %}{{ x }}{% else %}none{% endfor %}", "none"),
])  # fmt: skip
def test_it_shows_values(text: str, shown: str) -> None:
    assert render(text, VALUES) == shown


INJECTIONS = [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ data.__init__.__globals__ }}",
    "{{ data['__class__'] }}",
    "{{ self }}", "{{ self.__init__ }}", "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__ }}", "{{ joiner }}", "{{ namespace }}", "{{ range(9) }}", "{{ dict(a=1) }}", "{{ config }}",
    "{{ request }}",
    "{{ get_flashed_messages }}", "{{ data | attr('__class__') }}", "{{ data | map(attribute='__class__') | list }}",
    "{{ data.name.format(1) }}",
    "{{ '%s' % data }}", "{{ '{0.__class__}'.format(data) }}", "{{ data.name | format }}", "{{ ['a'] }}", "{{ {'a': 1} }}",
    "{{ (1, 2) }}",
    "{{ data.items() }}", "{{ data.update({'a': 1}) }}", "{{ data.rows.append(1) }}", "{{ data.rows | sort }}",
    "{{ data.name | safe }}",
    "{{ data | tojson }}", "{{ data | pprint }}", "{{ data | xmlattr }}", "{{ data.rows | groupby('n') }}", "{% set a = 1 %}",
    "{% macro f() %}{% endmacro %}", "{% call f() %}{% endcall %}", "{% include 'x' %}", "{% import 'x' as x %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}", "{% block a %}{% endblock %}", "{% filter upper %}x{% endfilter %}", "{% with a = 1 %}{% endwith %}",
    "{% autoescape false %}x{% endautoescape %}", "{% do 1 %}", "{% debug %}", "{% break %}",
    "{% for a in data.rows recursive %}{% endfor %}",
    "{% for a in data.rows if a.n %}{% endfor %}", "{{ loop.__class__ }}",
    "{% for a in data.rows %}{{ loop.cycle('a') }}{% endfor %}",
    "{% for a in data.rows %}{{ loop.__init__ }}{% endfor %}", "{% for a in data.rows %}{{ loop._iterator }}{% endfor %}",
    "{% for a in data.rows %}{{ loop.changed(1) }}{% endfor %}", "{{ data }}", "{{ data.rows }}", "{{ undefined_thing }}",
    "{{ data.missing }}",
    "{{ data.missing.more }}", "{% for a in data.name %}{% endfor %}", "{% for a in data %}{% endfor %}", "{{ data.name < 1 }}",
    "{{ 'a' ~ data.name }}", "{{ 'a' + data.name }}", "{{ 'a' * 99999999 }}", "{{ 9 ** 99999999 }}", "{{ 1 // 0 }}",
    "{{ 1 / 0 }}",
    "{{ data.rows | join('x' * 9) }}", "{{ data.name | default(data.name) }}", "{{ data.name | truncate(data.price) }}",
    "{% if data.name is callable %}{% endif %}", "{% if data is filter %}{% endif %}", "{{ data.name is sameas(1) }}",
    "{{ data.name | join }}",
    "{{ caller }}", "{{ varargs }}", "{{ data.items | join('12345678901') }}",
]  # fmt: skip


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_known_injection_renders_or_shows_a_value(text: str) -> None:
    with pytest.raises(TemplateFailed) as refused:
        render(text, VALUES)
    assert "Ann" not in str(refused.value)


@pytest.mark.parametrize("text", ["{{ a", "{% if a %}", "{{ }}", "{% nothing %}", "{{ a | }}",
    "{{ " + "(" * 400 + ")" * 400 + " }}",
                                  "{% if a %}" * 60 + "{% endif %}" * 60,
                                  "{% for a in b %}" * 30 + "{% endfor %}" * 30,
                                  "{{ a }}" * (TAGS_MAX + 1), "{{ " + "a or " * 300 + "a }}",
                                      "{{ -" + "-" * 300 + "1 }}"])  # fmt: skip
def test_what_cannot_be_rendered_is_known_before_there_are_values(text: str) -> None:
    with pytest.raises(TemplateFailed):
        check(text)


def test_a_number_of_absurd_length_is_not_computed() -> None:
    assert render("{{ data.n | int }}", {"data": {"n": "9" * 5000}}) == "0"


@pytest.mark.parametrize(("text", "values"), [
    ("{% for a in data %}x{% endfor %}", [1] * (LOOP_ROUNDS_MAX + 1)),
    ("{% for a in data %}{% for b in data %}x{% endfor %}{% endfor %}", [1] * 40),
    ("{{ data }}{{ data }}", "x" * (OUTPUT_CHARS_MAX // 2 + 1)),
    ("{% for a in data %}{{ a }}{% endfor %}", ["x" * 1000] * 400),
    ("{% for a in data %}" + "{% if a.b %}{% endif %}" * 400 + "{% endfor %}", [{"b": 1}] * 1000),
    ("{% for a in data %}" + "{% if a|upper %}{% endif %}" * 400 + "{% endfor %}", ["x" * 60_000] * 4),
    ("{{ data | join }}", ["x"] * (LOOP_ROUNDS_MAX + 1)),
])  # fmt: skip
def test_a_template_that_would_not_end_soon_ends_at_a_bound(text: str, values: object) -> None:
    with pytest.raises(TemplateFailed, match=r"more than|at most"):
        render(text, {"data": values})


def test_bounds_are_of_one_rendering_and_not_of_the_process() -> None:
    for _ in range(3):
        assert render("{% for a in data %}x{% endfor %}", {"data": [1] * LOOP_ROUNDS_MAX}) == "x" * LOOP_ROUNDS_MAX


@given(st.text())
def test_a_value_in_html_is_text(value: str) -> None:
    shown = render("<p>{{ v }}</p>", {"v": value}, escape="html")
    assert not {"<", ">", '"', "'"} & set(shown.removeprefix("<p>").removesuffix("</p>"))


MARKS = st.text(st.sampled_from(list("\\`*_{}[]()<>#+-.!|~&\"':= \n\ta1/")), max_size=40)


@given(before=st.sampled_from(["", "Hi ", "- ", "# ", "> ", "\n\n"]), value=st.one_of(MARKS, st.text(max_size=40)))
def test_a_value_in_markdown_is_text_and_never_a_link_a_picture_or_a_heading(before: str, value: str) -> None:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(render(before + "x{{ v }}x", {"v": value}, escape="markdown"))
    inline = [child.type for token in tokens for child in token.children or []]
    assert set(inline) <= {"text", "softbreak", "hardbreak", "text_special"}
    expected = {"- ": {"bullet_list_open", "list_item_open"}, "# ": {"heading_open"}, "> ": {"blockquote_open"}}.get(
        before, set()
    )
    assert {token.type for token in tokens if token.nesting == 1} <= expected | {"paragraph_open"}


@given(value=st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=40))
def test_a_value_in_markdown_reads_as_it_is(value: str) -> None:
    tokens = MarkdownIt("commonmark").parse("x" + render("{{ v }}", {"v": value}, escape="markdown"))
    assert "".join(child.content for token in tokens for child in token.children or []) == "x" + value
