"""What is forgotten of many keys: never that of an owner who has fewer than another."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from engine.worker.remembered import Remembered, owner_of

MOST = 8

_KEYS = st.builds(
    lambda owner, name: f"{owner}/{name}" if owner else str(name),
    st.sampled_from("abc") | st.just(""),
    st.integers(0, 9),
)


@given(st.lists(_KEYS, max_size=80))
def test_there_are_never_too_many_and_one_of_the_owners_with_most_goes_that_was_not_asked_for_longest(
    asked: list[str],
) -> None:
    one, expected = Remembered[str](MOST), list[str]()
    for key in asked:
        found = one.get(key)
        assert (found is not None) == (key in expected)
        if found is None:
            one.put(key, key)
        else:
            assert found == key
            expected.remove(key)
        expected.append(key)
        if len(expected) > MOST:
            many = Counter(owner_of(each) for each in expected)
            largest = [owner for owner, count in many.items() if count == max(many.values())]
            gone = [
                each
                for each in expected
                if owner_of(each) in largest and each not in one._of_owner.get(owner_of(each), {})
            ]
            assert len(gone) == 1
            assert gone[0] == next(each for each in expected if owner_of(each) == owner_of(gone[0]))
            expected.remove(gone[0])
