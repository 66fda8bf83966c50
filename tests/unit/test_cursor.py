"""The cursor: one form, both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.protocol.cursor import Cursor, parse_cursor
from seamark.protocol.errors import InvalidCursor


@given(st.from_regex(r"[a-z0-9]{1,32}", fullmatch=True), st.integers(0, 10**19 - 1))
def test_a_cursor_survives_its_text(epoch: str, seq: int) -> None:
    assert parse_cursor(str(Cursor(epoch, seq))) == Cursor(epoch, seq)


@given(st.text(max_size=60) | st.text(st.sampled_from("abc019.-+_ \n٣"), max_size=30))
def test_whatever_parses_is_the_one_text_of_its_cursor(text: str) -> None:
    try:
        cursor = parse_cursor(text)
    except InvalidCursor:
        return
    assert str(cursor) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "start",
        "abcd1234",
        "abcd1234.",
        ".7",
        "abcd1234.-1",
        "abcd1234.+1",
        "abcd1234.007",
        "ABCD1234.7",
        "abcd1234.7 ",
        " abcd1234.7",
        "abcd1234.7\n",
        "abcd1234.٣",
        "abcd1234.1_0",
        "abcd1234.1.2",
        "a" * 33 + ".1",
        "abcd1234." + "9" * 20,
    ],
)
def test_any_other_text_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(InvalidCursor, match="send back exactly what the gateway sent"):
        parse_cursor(text)


def test_a_refusal_quotes_no_more_than_a_line() -> None:
    with pytest.raises(InvalidCursor) as refused:
        parse_cursor("x" * 100_000)
    assert len(str(refused.value)) < 200
