"""What a tenant may have waiting in JOBS, beside what others have there."""

from hypothesis import given
from hypothesis import strategies as st

from engine.planner.shares import CRITICAL, Above, Held, is_above

MOST = Held(1_000, 1_000)


def above(mine: int, others: int) -> bool:
    return is_above(Held(mine, 0), Held(mine + others, 0), MOST)


def test_one_tenant_alone_may_fill_half_and_two_a_third_each() -> None:
    assert (above(500, 0), above(501, 0)) == (False, True)
    assert (above(333, 333), above(334, 334)) == (False, True)


def test_whoever_holds_next_to_nothing_gets_in_however_full_it_is() -> None:
    """Others may have filled it by what nobody bounds."""
    assert not above(0, 2_000)
    assert not above(10, 2_000)
    assert above(11, 1_000)


def test_what_is_critical_goes_on_longer_and_leaves_others_a_fifth() -> None:
    def critical(mine: int, others: int) -> bool:
        return is_above(Held(mine, 0), Held(mine + others, 0), MOST, CRITICAL)

    assert not critical(500, 300), "its other jobs are above by now"
    assert (critical(800, 0), critical(801, 0)) == (False, True)
    assert not critical(10, 2_000)
    assert Above(frozenset("ab"), frozenset("b")).holds("a", critical=False)
    assert not Above(frozenset("ab"), frozenset("b")).holds("a", critical=True)


def test_schedules_count_as_bytes_do() -> None:
    assert is_above(Held(0, 501), Held(0, 501), MOST)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(1, 8))
def test_however_many_flood_it_the_watermark_is_passed_by_one_turn_of_each_at_most(
    adds: list[int], tenants: int
) -> None:
    held = [0] * tenants
    for number, add in enumerate(adds):
        if not above(held[number % tenants], sum(held) - held[number % tenants]):
            held[number % tenants] += add
        assert sum(held) <= MOST.bytes + 40 * tenants


@given(st.integers(0, 1_000), st.integers(0, 1_000))
def test_where_all_together_are_not_above_nobody_is(mine: int, others: int) -> None:
    """So that nobody has to be asked about as long as half of it is free."""
    all_ = Held(mine + others, 0)
    assert is_above(all_, all_, MOST) or not above(mine, others)
