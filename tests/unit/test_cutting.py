"""Texts are cut between characters as people see them, and the result always fits."""

import msgspec
import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from engine.channels.cutting import ELLIPSIS, cut, json_bytes

FAMILY = "👩‍👩‍👧‍👦"  # seven code points that are one picture
FLAG = "🇦🇹"
ACCENTED = "e\u0301"

PIECES = st.sampled_from(
    [FAMILY, FLAG, ACCENTED, "👍🏽", "क्षि", "가", "a", "ß", "日", '"', "\\", "\n", "\u2028", "\x07", " "]
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=40).map("".join), st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
)


@given(TEXTS, st.integers(-5, 200))
@example(FLAG * 5, 43)
def test_what_is_left_fits_and_is_as_long_as_can_be(text: str, size_max: int) -> None:
    found, size = cut(text, size_max), json_bytes
    assert found == "" or size(found) <= size_max
    if size(text) <= size_max:
        assert found == text
        return
    whole = regex.findall(r"\X", text)
    fitting = ["".join(whole[:count]).rstrip() for count in range(len(whole))]
    fitting = [kept for count, kept in enumerate(fitting) if size("".join(whole[:count])) + size(ELLIPSIS) <= size_max]
    best = fitting[-1] if fitting else ""
    assert found == (best + ELLIPSIS if best else "")


@given(TEXTS, st.integers(0, 200))
def test_no_character_is_cut_in_two(text: str, size_max: int) -> None:
    found = cut(text, size_max).removesuffix(ELLIPSIS)
    ends = {0} | {one.end() for one in regex.finditer(r"\X", text)}
    assert len(found) in ends or len(text[: len(found)].rstrip()) == len(found), "spaces at the end go, too"
    assert text.startswith(found)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_at_the_limit_nothing_is_cut_and_below_it_one_character_is(off: int) -> None:
    text = "ab" + FAMILY
    limit = json_bytes(text)
    assert cut(text, limit + off) == (text if off >= 0 else "ab" + ELLIPSIS)


def test_a_single_character_of_thousands_of_accents_does_not_get_through() -> None:
    assert cut("z" + "\u0351" * 100_000, 4096) == ""


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_the_size_in_json_is_that_which_is_sent(text: str) -> None:
    assert json_bytes(text) == len(msgspec.json.encode({"a": text})) - len(b'{"a":""}')
