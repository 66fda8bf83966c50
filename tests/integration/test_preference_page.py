"""By the link in a mail a person chooses what he gets: a look changes nothing, and what is saved is what holds."""

import re
from collections.abc import AsyncIterator
from html import unescape
from urllib.parse import urlencode

import pytest

from engine.channels.email.unsubscribe import Tokens, Unsubscription
from engine.directory.changes import changing
from engine.directory.changing import Directory
from engine.directory.suppressing import changing_suppressions
from engine.directory.suppressions import NewSuppression, put_suppressions
from engine.directory.types import put_type
from engine.directory.users import UserFields, delete_user, put_user
from engine.plan.preferences import Preferences
from engine.plan.rules import ChannelRule, TypeRule
from engine.profiles.preferences import find_preferences, patch_preferences
from engine.profiles.reader import read_profile
from ops.dev.servers import NatsServer
from tests.support.gateways import TestGateway, gateway_on

SECRETS = ("a" * 40,)
ALICE = "alice@example.com"
BOX = re.compile(r'<input type="checkbox" name="on" value="([^"]*)"( checked| disabled)?>')
RULES = [
    TypeRule(
        pattern="order.shipped", category="orders", channels={"email": ChannelRule(), "sms": ChannelRule(default="off")}
    ),
    TypeRule(pattern="order.late", category="orders", channels={"email": ChannelRule()}),
    TypeRule(pattern="news.*", category="<news> & more", channels={"email": ChannelRule(), "inapp": ChannelRule()}),
    TypeRule(pattern="login", channels={"sms": ChannelRule(), "webhook": ChannelRule()}),
]
NEWS, ORDERS, TEXTED, LOGIN = (
    "category:email:<news> & more",
    "category:email:orders",
    "category:sms:orders",
    "type:sms:login",
)


@pytest.fixture
async def gateway(nats_server: NatsServer, postgres: str) -> AsyncIterator[TestGateway]:
    async with gateway_on(nats_server, postgres_url=postgres, unsubscribe_secrets=SECRETS) as gateway:
        async with changing(directory(gateway).pool, "acme", 20) as rules:
            for rule in RULES:
                await put_type(rules, rule)
        async with directory(gateway).changing("acme", ["alice"]) as change:
            await put_user(change, "alice", UserFields(email=ALICE))
            await patch_preferences(change, "alice", {"types": {"order.late": {"email": "off", "push": "off"}}})
        yield gateway


def directory(gateway: TestGateway) -> Directory:
    assert gateway.context.directory is not None
    return gateway.context.directory


def link(gateway: TestGateway, category: str = "orders", user: str = "alice") -> str:
    token = Tokens(SECRETS).make(Unsubscription(tenant="acme", user=user, channel="email", category=category))
    return f"{gateway.url}/u/{token}"


async def shown(gateway: TestGateway) -> dict[str, str]:
    """The boxes of alice's page: checked, disabled, or neither."""
    async with gateway.http.get(f"{link(gateway)}/preferences") as response:
        assert response.status == 200
        return {unescape(value): state.strip() for value, state in BOX.findall(await response.text())}


async def saved(gateway: TestGateway, *, was: set[str], on: set[str]) -> int:
    body = urlencode([("was", one) for one in sorted(was)] + [("on", one) for one in sorted(on)])
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    url = f"{link(gateway)}/preferences"
    async with gateway.http.post(url, data=body.encode(), headers=headers, allow_redirects=False) as response:
        return response.status


async def stored(gateway: TestGateway) -> Preferences:
    async with directory(gateway).pool.acquire() as connection:
        return (await find_preferences(connection, "acme", "alice")).document


async def test_a_look_shows_what_holds_and_changes_nothing(gateway: TestGateway) -> None:
    before = await stored(gateway)
    assert await shown(gateway) == {NEWS: "checked", ORDERS: "checked", TEXTED: "", LOGIN: "checked"}
    async with gateway.http.get(f"{link(gateway)}/preferences") as response:
        page, headers = await response.text(), response.headers
    assert "<news>" not in page
    assert "alice" not in page
    assert "<script" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
    assert await stored(gateway) == before
    for wrong in ("/u/nonsense/preferences", f"/u/{'A' * 60}/preferences"):
        async with gateway.http.get(gateway.url + wrong) as response:
            assert response.status == 404


async def test_only_what_was_changed_is_stored_and_a_category_says_it_for_all_of_its_types(
    gateway: TestGateway,
) -> None:
    was = {NEWS, ORDERS, LOGIN}
    assert await saved(gateway, was=was, on={ORDERS, TEXTED, LOGIN}) == 200
    document = await stored(gateway)
    assert document.categories == {"<news> & more": {"email": "off"}, "orders": {"sms": "on"}}
    assert document.types == {"order.late": {"email": "off", "push": "off"}}
    assert await shown(gateway) == {NEWS: "", ORDERS: "checked", TEXTED: "checked", LOGIN: "checked"}
    # A page that was made before the change does not undo it.
    assert await saved(gateway, was=was, on=was - {ORDERS, LOGIN}) == 200
    assert await shown(gateway) == {NEWS: "", ORDERS: "", TEXTED: "checked", LOGIN: ""}
    document = await stored(gateway)
    assert document.types == {"order.late": {"push": "off"}, "login": {"sms": "off"}}
    assert await saved(gateway, was=set(), on={"category:email:of nobody", "type:push:*", "x"}) == 200
    assert await stored(gateway) == document


async def test_who_has_unsubscribed_by_a_link_takes_it_back_here(gateway: TestGateway) -> None:
    async with gateway.http.post(link(gateway, "orders")) as response:
        assert "/preferences" in await response.text()
    assert (await shown(gateway))[ORDERS] == ""
    assert await saved(gateway, was=set(), on={ORDERS}) == 200
    assert (await read_profile(directory(gateway).pool, "acme", "alice")).suppressions == ()
    async with gateway.http.post(link(gateway, "all")):
        pass
    boxes = await shown(gateway)
    assert (boxes[ORDERS], boxes[NEWS], boxes["all:email:all"]) == ("disabled", "disabled", "")
    assert await saved(gateway, was=set(), on={ORDERS}) == 200  # of all mails nothing else is taken back
    assert (await shown(gateway))[ORDERS] == "disabled"
    assert await saved(gateway, was=set(), on={"all:email:all"}) == 200
    assert (await shown(gateway))[ORDERS] == "checked"


async def test_what_somebody_else_has_suppressed_no_link_takes_back(gateway: TestGateway) -> None:
    for reason, source, scope in (("opted_out", "by letter", "orders"), ("complaint", "ses", "all")):
        new = NewSuppression(channel="email", address=ALICE, reason=reason, source=source, scope=scope)
        async with changing_suppressions(directory(gateway), "acme", [("email", ALICE)], 20) as connection:
            await put_suppressions(connection, "acme", [new])
        assert (await shown(gateway))[ORDERS] == "disabled"
        assert await saved(gateway, was=set(), on={ORDERS, "all:email:all"}) == 200
        assert (await shown(gateway))[ORDERS] == "disabled"
    assert len((await read_profile(directory(gateway).pool, "acme", "alice")).suppressions) == 2


async def test_who_was_deleted_has_no_page_and_nothing_is_stored_of_him(gateway: TestGateway) -> None:
    async with directory(gateway).changing("acme", ["alice"]) as change:
        await delete_user(change, "alice")
    for method in ("GET", "POST"):
        async with gateway.http.request(method, f"{link(gateway)}/preferences", data="on=x") as response:
            assert response.status == 404
