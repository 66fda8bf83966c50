"""What a tenant says of its types: the pattern that says most of a type wins."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.directory.rules import TenantRules
from engine.directory.templates import SHAPES, check_parts
from engine.plan.rules import TypeRule
from engine.worker.preview import ToPreview, preview

WORDS = st.lists(st.sampled_from(["order", "shipped", "late", "x"]), min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(WORDS, WORDS.map(lambda words: f"{words}.*"), st.just("*"))


def matches(pattern: str, type: str) -> bool:
    """The plain meaning of a pattern."""
    return pattern in ("*", type) or (pattern.endswith(".*") and type.startswith(pattern[:-1]))


@given(patterns=st.sets(PATTERNS), type=WORDS)
def test_of_all_patterns_that_match_the_one_that_says_most_wins(patterns: set[str], type: str) -> None:
    found = TenantRules(types={one: TypeRule(pattern=one) for one in patterns}).rule_of(type)
    matching = [one for one in patterns if matches(one, type)]
    best = max(matching, key=lambda one: (one == type, one != "*", len(one)), default=None)
    assert (None if found is None else found.pattern) == best


@given(templates=st.dictionaries(PATTERNS, st.sets(st.sampled_from(sorted(SHAPES)))), type=WORDS)
def test_a_channel_has_a_template_if_any_pattern_of_the_type_has_one(templates: dict[str, set[str]], type: str) -> None:
    held = {pattern: frozenset(channels) for pattern, channels in templates.items()}
    expected = set().union(*(channels for pattern, channels in templates.items() if matches(pattern, type)))
    assert set(TenantRules(templates=held).templates_of(type)) == expected


@given(patterns=st.sets(PATTERNS), type=WORDS)
def test_a_webhook_of_the_tenant_gets_what_one_of_its_patterns_matches(patterns: set[str], type: str) -> None:
    expected = any(matches(pattern, type) for pattern in patterns)
    assert TenantRules(webhooks=frozenset(patterns)).webhook_of(type) is expected


@pytest.mark.parametrize(("channel", "parts"), [
    ("email", {"subject": "Order {{ data.order }}", "body": "{% if data.a %}*b*{% endif %}{{ unsubscribe_url }}\n{# a note #}"}),
    ("email", {"subject": "s", "body": "b", "html": "<p>{{ '}' }}</p>"}), ("sms", {"body": "x"}),
    ("push", {"body": "x", "title": "t"}),
    ("sms", {"body": "a\tb\nc {{ type }} {{ tenant }} {{ locale }}"}),
    ("sms", {"body": "{% for line in data.lines %}{{ loop.index }} {{ line.name }}{% endfor %}"}),
])  # fmt: skip
def test_a_template_has_the_parts_of_its_channel(channel: str, parts: dict[str, str]) -> None:
    check_parts(channel, parts)


@pytest.mark.parametrize(("channel", "parts", "why"), [
    ("email", {"body": "x"}, "needs subject"), ("sms", {}, "needs body"),
    ("sms", {"body": "x", "subject": "y"}, "has no 'subject'"),
    ("email", {"subject": "a\nBcc: all@example.com", "body": "x"}, "parts.subject"), ("push", {"body": "  "}, "empty"),
    ("sms", {"body": "a\x00b"}, "control"), ("sms", {"body": "a\r\nb"}, "control"),
    ("sms", {"body": "\ud800"}, "surrogate"),
    ("sms", {"body": "{{ name"}, "not closed"),
    ("sms", {"body": "{% if x"}, "not closed"), ("sms", {"body": "a {# b"}, "not closed"),
    ("sms", {"body": "é" * 52_000}, "bytes"),
    ("sms", {"body": "ok\n{{ data.x() }}"}, "parts.body`: line 2: templates have no call"),
    ("sms", {"body": "{% if a %}"}, "parts.body`: line 1"),
    ("push", {"body": "x", "title": "{{ a | nothing }}"}, "parts.title`: .*nothing"),
    ("email", {"subject": "B {{ order }}", "body": "x"}, "parts.subject`: there is no value `order`; there are data, locale, "),
    ("sms", {"body": "{% for line in lines %}{% endfor %}"}, "`lines`"),
    ("sms", {"body": "{{ name | default('you') }}"}, "`name`"),
    ("sms", {"body": "{% for line in data.lines %}{% endfor %}{{ line }}"}, "`line`"),
    ("sms", {"body": "{{ unsubscribe_url }}"}, "`unsubscribe_url`"),
    ("webhook", {"body": "x"}, "no templates for webhook.*push, email, sms$"),
    ("inapp", {"body": "x"}, "`channel`: there are no templates for inapp"),
])  # fmt: skip
def test_what_cannot_be_a_template_is_refused_with_the_part(channel: str, parts: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_parts(channel, parts)


@pytest.mark.parametrize("channel", sorted(SHAPES))
def test_a_template_gets_the_values_that_it_may_name(channel: Literal["email", "push", "sms"]) -> None:
    for name in SHAPES[channel].names:
        parts = dict.fromkeys(SHAPES[channel].must, f"{{% if {name} is defined %}}there{{% endif %}}")
        shown = preview("acme", ToPreview("order.shipped", channel, data={"a": 1}, parts=parts), parts)
        assert "there" in (shown.text or shown.body or ""), name
