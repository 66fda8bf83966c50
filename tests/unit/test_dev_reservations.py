"""Processes and stacks that start at the same moment choose different ports."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from ops.dev import child
from ops.dev.child import free_port, is_free
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


def free_port_of_another_process(choice: range) -> int:
    program = f"from ops.dev import child; child.PORTS = {choice!r}; print(child.free_port())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


def test_a_port_that_one_process_was_given_is_given_to_no_other_before_anybody_listens_there() -> None:
    port = free_port()
    assert is_free(port)
    assert free_port_of_another_process(range(port, port + 1)) != port


def test_ports_in_a_row_are_given_together(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_port(row=3)
    for port in range(first, first + 3):
        assert free_port_of_another_process(range(port, port + 1)) != port
        with monkeypatch.context() as patch:
            patch.setattr(child, "PORTS", range(port, port + 1))
            assert free_port() != port


def test_of_the_ports_given_so_far_the_first_are_free_for_others_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "CLAIMS_MAX", 1 + len(child._claims))
    port = free_port()
    for _ in range(child.CLAIMS_MAX):
        free_port()
    monkeypatch.setattr(child, "PORTS", range(port, port + 1))
    assert free_port() == port
