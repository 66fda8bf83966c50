"""A webhook's address is public, as far as it can be seen without resolving its name."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.directory.webhook_urls import check_url, reachable_by_all

PRIVATE = ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
           "192.0.0.0/29", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"]  # fmt: skip


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
