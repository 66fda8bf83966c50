"""Pages of lists: a cursor is one that a page gave, or it is refused."""

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.pages import PageQuery, begin_of, cursor_after, cut
from gateway.http.problems import Problem

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(NAMES, min_size=1, max_size=3))
def test_a_cursor_stands_for_its_key_and_is_taken_in_one_form_only(key: list[str]) -> None:
    cursor = cursor_after(key)
    assert begin_of(PageQuery(cursor=cursor), len(key)) == tuple(key)
    for wrong in (f"{cursor}=", f"{cursor}\n", f" {cursor}", cursor[:-1], "", "!", "A"):
        with pytest.raises(Problem, match="begin without it"):
            begin_of(PageQuery(cursor=wrong), len(key))
    with pytest.raises(Problem):
        begin_of(PageQuery(cursor=cursor), len(key) + 1)


@pytest.mark.parametrize("forged", [["a\0b"], ["x" * 2000], [1], {"a": "b"}, None])
def test_a_cursor_that_somebody_has_built_never_reaches_the_database(forged: object) -> None:
    text = base64.urlsafe_b64encode(msgspec.json.encode(forged)).decode().rstrip("=")
    with pytest.raises(Problem) as refused:
        begin_of(PageQuery(cursor=text))
    assert (refused.value.kind.status, refused.value.field) == (400, "cursor")


def test_the_first_page_begins_before_every_key() -> None:
    assert begin_of(PageQuery(), 3) == ("", "", "")


@given(st.lists(NAMES.filter(bool), unique=True, max_size=30), st.integers(1, 10))
def test_all_pages_together_are_the_list(names: list[str], limit: int) -> None:
    there, found, query = sorted(names), list[str](), PageQuery()
    while True:
        [after] = begin_of(query)
        items, next = cut([name for name in there if name > after][: limit + 1], limit, lambda name: (name,))
        found += items
        if next is None:
            break
        query = PageQuery(cursor=next)
    assert found == there
