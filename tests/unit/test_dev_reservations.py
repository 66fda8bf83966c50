"""Stacks that start at the same moment choose different ports."""

import sys
from collections.abc import Iterator

import pytest

from ops.dev.child import free_port
from ops.dev.reservations import Reservations

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ports are reserved on Linux only")


@pytest.fixture
def one() -> Iterator[Reservations]:
    yield from reservations()


@pytest.fixture
def other() -> Iterator[Reservations]:
    yield from reservations()


def reservations() -> Iterator[Reservations]:
    made = Reservations()
    yield made
    made.close()


def test_a_port_that_one_stack_has_chosen_is_no_other_stacks_before_anybody_listens_there(
    one: Reservations, other: Reservations
) -> None:
    port = free_port()
    assert one.take(port)
    assert one.take(port)
    assert not other.take(port)


def test_a_stack_that_ended_gives_its_ports_back(one: Reservations, other: Reservations) -> None:
    port = one.take_any()
    assert not other.take(port)
    one.close()
    assert other.take(port)
