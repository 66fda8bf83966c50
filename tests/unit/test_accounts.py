"""The broker's users of tenants, as text."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import TopologyError
from engine.topology.accounts import (
    PUBLISHERS_MARK,
    publisher_block,
    publisher_user,
    publisher_variable,
    with_publisher,
)
from engine.topology.files import files_folder
from seamark.protocol.errors import InvalidToken

tenants = st.text(min_size=1, max_size=30)


def named(make, tenant: str) -> str:
    try:
        return str(make(tenant))
    except InvalidToken:
        assume(False)
        raise


@given(tenants, tenants)
def test_two_tenants_never_share_a_user_or_a_password(one: str, other: str) -> None:
    assume(one != other)
    for make in (publisher_user, publisher_variable):
        assert named(make, one) != named(make, other)


@given(tenants)
def test_a_password_variable_is_a_name_that_every_shell_takes(tenant: str) -> None:
    variable = named(publisher_variable, tenant)
    assert variable.isascii()
    assert variable.isidentifier()


def test_a_block_is_put_into_the_shipped_file_once() -> None:
    shipped = (files_folder() / "accounts.conf").read_text()
    once = with_publisher(shipped, "acme")
    assert once.count(publisher_block("acme")) == 1
    assert once.replace(publisher_block("acme") + "\n", "") == shipped
    assert with_publisher(once, "acme") == once
    assert with_publisher(once, "acm").count("user: ") == once.count("user: ") + 1


def test_a_file_without_the_place_for_it_is_refused() -> None:
    with pytest.raises(TopologyError, match=PUBLISHERS_MARK.strip()):
        with_publisher("accounts {}", "acme")
