"""A webhook's address is public, as far as it can be seen without resolving its name."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.directory.webhook_urls import check_url, reachable_by_all

SPECIAL = [
    # the IPv4 Special-Purpose Address Registry of IANA
    "0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32", "192.0.0.170/32", "192.0.0.171/32",
    "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.88.99.2/32", "192.168.0.0/16",
    "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4", "255.255.255.255/32",
    # multicast, and what clouds answer their own machines at
    "224.0.0.0/4", "168.63.129.16/32", "192.0.0.192/32", "100.100.100.200/32",
    # the IPv6 Special-Purpose Address Registry of IANA
    "::1/128", "::/128", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23",
    "2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48", "2001:3::/32", "2001:4:112::/48",
    "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10",
    # formerly of private networks, multicast, and what nobody has been given
    "fec0::/10", "ff00::/8", "::/8", "100::/8", "200::/7", "400::/6", "800::/5", "1000::/4", "4000::/2", "8000::/1",
]  # fmt: skip
PRIVATE = [network for network in SPECIAL if ":" not in network]


@pytest.mark.parametrize("network", SPECIAL)
def test_no_network_of_a_special_purpose_is_taken_whatever_this_python_says_of_it(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        for said, value in (
            ("is_global", True),
            ("is_private", False),
            ("is_reserved", False),
            ("is_multicast", False),
        ):
            monkeypatch.setattr(kind, said, value)
    inside = ipaddress.ip_network(network)
    for number in {0, 1, inside.num_addresses // 3, inside.num_addresses // 2, inside.num_addresses - 1}:
        address = inside[min(number, inside.num_addresses - 1)]
        assert not reachable_by_all(address)


@pytest.mark.parametrize("network", SPECIAL)
def test_what_lies_beside_a_special_network_is_judged_for_itself(network: str) -> None:
    inside = ipaddress.ip_network(network)
    for number in (int(inside.network_address) - 1, int(inside.broadcast_address) + 1):
        if not 0 <= number < 1 << inside.max_prefixlen:
            continue
        beside = type(inside.network_address)(number)
        special = any(
            beside in other for one in SPECIAL if (other := ipaddress.ip_network(one)).version == beside.version
        )
        assert reachable_by_all(beside) is not special


@pytest.mark.parametrize("url", [
    "https://hooks.example.com", "https://hooks.example.com/", "https://Hooks.Example.COM/in?a=1&b=%20#".rstrip("#"),
    "https://hooks.example.com:8443/a/b", "https://xn--mnchen-3ya.de/x", "https://8.8.8.8/hook", "https://[2606:4700::1111]/x",
    "https://hooks.example.com./x", "https://a.b-c.example.io?x=y",
])  # fmt: skip
def test_a_public_server_is_taken(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize("url", [
    "http://hooks.example.com/", "ftp://hooks.example.com/", "hooks.example.com", "", "https://", "https:///x",
    "//hooks.example.com",
    "HTTPS://user:password@hooks.example.com/", "https://user@hooks.example.com/", "https://hooks.example.com@127.0.0.1/",
    "https://hooks.example.com\\@127.0.0.1/", "https://hooks.example.com/a b", "https://hooks.example.com/\n", "https://hooks.example.com/#a",
    "https://hooks.example.com:0/", "https://hooks.example.com:65536/", "https://hooks.example.com:/", "https://münchen.de/",
    "https://localhost/", "https://a.localhost/", "https://localhost./", "https://intranet/", "https://db.internal/", "https://printer.local/",
    "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/", "https://0x7f.1/", "https://017700000001/",
    "https://127.0.0.1./", "https://0/", "https://10.0.0.1/", "https://169.254.169.254/latest/meta-data", "https://192.168.0.1:8443/",
    "https://256.256.256.256/", "https://08.08.08.08/", "https://[::1]/", "https://[::]/", "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/", "https://[64:ff9b::7f00:1]/", "https://[64:ff9b::a9fe:a9fe]/", "https://[2002:7f00:1::]/", "https://[::7f00:1]/",
    "https://[fe80::1]/", "https://[fc00::1]/", "https://[ff02::1]/", "https://[fe80::1%25eth0]/", "https://[::1", "https://a..example.com/",
    "https://-a.example.com/", "https://" + "a" * 64 + ".com/", "https://hooks.example.com/" + "a" * 2048, "https://1.2.3.4.in-addr.arpa/",
    "https://0177.0.0.1/", "https://1.0x7f/",
])  # fmt: skip
def test_everything_else_is_refused_with_the_field(url: str) -> None:
    with pytest.raises(ValueError, match="`url`"):
        check_url(url)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="without user") as refused:
        check_url("https://user:hunter2@hooks.example.com/")
    assert "hunter2" not in str(refused.value)


@given(network=st.sampled_from(PRIVATE), number=st.integers(0, (1 << 32) - 1))
def test_no_private_address_gets_through_in_whichever_clothes(network: str, number: int) -> None:
    inside = ipaddress.ip_network(network)
    bare = ipaddress.IPv4Address(int(inside.network_address) + number % inside.num_addresses)
    clothes = [
        ipaddress.IPv6Address(f"::ffff:{bare}"),
        ipaddress.IPv6Address(f"64:ff9b::{bare}"),
        ipaddress.IPv6Address((0x2002 << 112) | (int(bare) << 80)),
        ipaddress.IPv6Address(f"::{bare}"),
    ]
    assert not any(reachable_by_all(one) for one in (bare, *clothes))
    for one in (bare, *clothes):
        with pytest.raises(ValueError, match="`url`"):
            check_url(f"https://[{one}]/" if one.version == 6 else f"https://{one}/")
    with pytest.raises(ValueError, match="`url`"):
        check_url(f"https://{int(bare)}/")
