"""No webhook reaches our own network, in whichever form an address is written, and wherever a name leads by then."""

import asyncio
import ipaddress
import socket
import threading
from typing import Any

import pytest

from engine.channels.exchange import Blocked
from engine.channels.webhook import guard
from engine.channels.webhook.guard import Guard, GuardedResolver
from engine.directory.webhook_urls import reachable_by_all

REFUSED = [
    "0.0.0.0", "0.0.0.1", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "192.0.0.1", "192.0.2.1",
    "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250",
    "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:7f00:1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b::808:808",
    "64:ff9b:1::7f00:1", "64:ff9b:1::808:808", "100::1", "2001::1", "2001:0:808:808::1", "2001:db8::1",
    "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2606:4700::5efe:7f00:1",
    "2606:4700::200:5efe:a00:1",
]  # fmt: skip
TAKEN = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1", "2606:4700::5efe:808:808"]
ODD = [
    "0x7f.1",
    "0x7f000001",
    "2130706433",
    "017700000001",
    "127.1",
    "0",
    "localhost",
    "[::1]",
    "",
    "1.2.3",
    "::1%",
    "127.0.0.1 ",
]


def info(address: str) -> tuple:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.SOCK_STREAM, 0, "", (address, 443)


@pytest.mark.parametrize("address", REFUSED)
def test_a_private_address_is_refused_before_it_is_connected_to(address: str) -> None:
    assert not reachable_by_all(ipaddress.ip_address(address))
    with pytest.raises(Blocked) as refused:
        Guard().socket(info(address))
    assert address not in str(refused.value)


@pytest.mark.parametrize("address", ODD)
def test_what_is_no_address_in_its_usual_form_is_refused(address: str) -> None:
    with pytest.raises(Blocked):
        Guard().socket(info(address))


@pytest.mark.parametrize("address", TAKEN)
def test_a_public_address_gets_its_socket(address: str) -> None:
    with Guard().socket(info(address)) as made:
        assert made.type == socket.SOCK_STREAM


def test_an_exempt_network_opens_itself_and_nothing_beside_it() -> None:
    guard = Guard([ipaddress.ip_network("127.0.0.0/30")])
    guard.check("127.0.0.1")
    for address in ("127.0.0.4", "::1", "::ffff:127.0.0.1", "10.0.0.1"):
        with pytest.raises(Blocked):
            guard.check(address)


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["2606:4700::1111", "fe80::1"], ["64:ff9b::7f00:1", "8.8.8.8"]],
)
async def test_a_name_is_refused_as_soon_as_one_of_its_addresses_is_private(addresses: list[str]) -> None:
    async def lookup(host: str, port: int) -> list[str]:
        return addresses

    resolver = GuardedResolver(Guard(), lookup)
    with pytest.raises(Blocked):
        await resolver.resolve("hooks.example.com", 443)
    await resolver.close()


@pytest.mark.parametrize("name", ["localhost", "127.1", "0x7f.1", "2130706433", "017700000001"])
async def test_the_system_is_asked_in_threads_of_their_own_and_its_answer_is_looked_at(name: str) -> None:
    """`inet_aton` takes these for this machine."""
    resolver = GuardedResolver(Guard())
    async with asyncio.timeout(20):
        with pytest.raises(Blocked):
            await resolver.resolve(name, 443)
    await resolver.close()


async def test_a_name_without_an_address_is_no_private_one() -> None:
    async def lookup(host: str, port: int) -> list[str]:
        return []

    resolver = GuardedResolver(Guard(), lookup)
    with pytest.raises(OSError, match="no address") as failed:
        await resolver.resolve("hooks.example.com", 443)
    assert not isinstance(failed.value, Blocked)
    await resolver.close()


async def test_a_name_server_that_does_not_answer_holds_one_thread_for_its_name_and_then_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else whoever names a hundred endpoints of such servers would take all look-ups from others."""
    answered, asked = threading.Event(), list[str]()

    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        assert answered.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 443))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = GuardedResolver(Guard())
    waiting = [asyncio.create_task(resolver.resolve("slow.example.com", 443)) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    monkeypatch.setattr(guard, "SLOW_SECONDS", 0.0)
    answered.set()
    async with asyncio.timeout(20):
        found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(one, list) for one in found] == [False, True, True, True, True]
    assert asked == ["slow.example.com"]
    with pytest.raises(OSError, match="a moment ago"):
        await resolver.resolve("slow.example.com", 443)
    assert asked == ["slow.example.com"], "it is not asked again"
    monkeypatch.setattr(guard, "SLOW_SECONDS", 20.0)
    assert await resolver.resolve("quick.example.com", 443)
    assert await resolver.resolve("quick.example.com", 443)
    await resolver.close()
