"""Whose address counts behind proxies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.proxies import Proxies

TRUSTED = Proxies(["10.0.0.0/8", "192.168.1.1", "fd00::/8"])


@pytest.mark.parametrize(("peer", "header", "client"), [
    ("203.0.113.7", [], "203.0.113.7"),
    ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),  # nobody we trust says so
    ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
    ("10.0.0.1", ["198.51.100.1, 10.2.3.4"], "198.51.100.1"),
    ("10.0.0.1", ["1.1.1.1, 198.51.100.1", "192.168.1.1 , 10.2.3.4"], "198.51.100.1"),  # the first was sent by the client
    ("10.0.0.1", ["10.9.9.9"], "10.9.9.9"),  # a client inside
    ("10.0.0.1", ["198.51.100.1, unknown"], "10.0.0.1"),
    ("10.0.0.1", ["198.51.100.1,"], "10.0.0.1"),
    ("10.0.0.1", [""], "10.0.0.1"),
    ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
    ("10.0.0.1", ["[2001:db8:1:2:3:4:5:6]:4711"], "2001:db8:1:2::/64"),
    ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
    ("fd00::1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
    ("2001:db8:1:2::9", [], "2001:db8:1:2::/64"),
    ("fe80::1%eth0", [], "fe80::/64"),
    ("", ["198.51.100.1"], ""),
])  # fmt: skip
def test_the_first_address_from_the_right_that_is_no_trusted_proxy_counts(
    peer: str, header: list[str], client: str
) -> None:
    assert TRUSTED.counted(peer, header) == client


@given(st.lists(st.text(st.characters(codec="latin-1"), max_size=40), max_size=5))
def test_nothing_that_a_client_writes_changes_whose_address_counts(written: list[str]) -> None:
    assert Proxies().counted("203.0.113.7", written) == "203.0.113.7"
    assert TRUSTED.counted("203.0.113.7", written) == "203.0.113.7"
    assert TRUSTED.counted("10.0.0.1", [*written, "198.51.100.1"]) == "198.51.100.1"


@pytest.mark.parametrize("entry", ["proxy", "10.0.0.0/33", "*", ""])
def test_an_entry_that_is_no_network_is_refused_at_start(entry: str) -> None:
    with pytest.raises(ValueError, match="does not appear"):
        Proxies([entry])
