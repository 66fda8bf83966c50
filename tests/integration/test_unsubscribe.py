"""One click ends mails of a kind, and a look at the link ends nothing."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.channels.email.unsubscribe import Tokens, Unsubscription
from engine.directory.changing import Directory
from engine.directory.users import UserFields, delete_user, put_user
from engine.profiles.reader import read_profile
from ops.dev.servers import NatsServer
from tests.support.gateways import TestGateway, gateway_on

SECRETS = ("a" * 40, "b" * 40)
ALICE = "alice@example.com"


@pytest.fixture
async def gateway(nats_server: NatsServer, postgres: str) -> AsyncIterator[TestGateway]:
    async with gateway_on(nats_server, postgres_url=postgres, unsubscribe_secrets=SECRETS) as gateway:
        async with directory(gateway).changing("acme", ["alice"]) as change:
            await put_user(change, "alice", UserFields(email=ALICE))
        yield gateway


def directory(gateway: TestGateway) -> Directory:
    assert gateway.context.directory is not None
    return gateway.context.directory


def link(
    gateway: TestGateway, category: str = "news", *, user: str = "alice", tenant: str = "acme", channel: str = "email"
) -> str:
    what = Unsubscription(tenant=tenant, user=user, channel=channel, category=category)
    return f"{gateway.url}/u/{Tokens(SECRETS).make(what)}"


async def suppressed(gateway: TestGateway, tenant: str = "acme", user: str = "alice") -> set[tuple[str, str, str]]:
    profile = await read_profile(directory(gateway).pool, tenant, user)
    return {(one.channel, one.reason, one.scope) for one in profile.suppressions}


async def test_a_post_ends_mails_of_its_category_without_a_login_and_twice_is_as_once(gateway: TestGateway) -> None:
    for _ in range(2):
        data = {"List-Unsubscribe": "One-Click"}
        async with gateway.http.post(link(gateway), data=data, allow_redirects=False) as response:
            assert response.status == 200
        assert await suppressed(gateway) == {("email", "opted_out", "news")}


async def test_a_look_changes_nothing(gateway: TestGateway) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "GET"):
        async with gateway.http.request(method, link(gateway)) as response:
            assert response.status < 300
    assert await suppressed(gateway) == set()


async def test_the_page_has_a_button_no_script_and_is_kept_nowhere(gateway: TestGateway) -> None:
    async with gateway.http.get(link(gateway, "<b>&\"'")) as response:
        page = await response.text()
        headers = response.headers
    assert '<form method="post">' in page
    assert "<b>" not in page
    assert "alice" not in page
    assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url[:-1],
        lambda url: url + "A",
        lambda url: url.rpartition("/")[0] + "/" + "A" * 60,
        lambda url: url + "%00",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_link_of_nobodys_is_none(gateway: TestGateway, method: str, change: Any) -> None:
    async with gateway.http.request(method, change(link(gateway))) as response:
        assert response.status == 404
    assert await suppressed(gateway) == set()


async def test_a_link_for_another_channel_is_none(gateway: TestGateway) -> None:
    async with gateway.http.post(link(gateway, channel="sms")) as response:
        assert response.status == 404


async def test_a_link_is_of_one_tenant(gateway: TestGateway) -> None:
    async with directory(gateway).changing("other", ["alice"]) as change:
        await put_user(change, "alice", UserFields(email=ALICE))
    async with gateway.http.post(link(gateway, tenant="other")) as response:
        assert response.status == 200
    assert await suppressed(gateway) == set()
    assert await suppressed(gateway, "other") == {("email", "opted_out", "news")}


async def test_who_is_gone_gets_no_mail_anyway(gateway: TestGateway) -> None:
    async with directory(gateway).changing("acme", ["alice"]) as change:
        await delete_user(change, "alice")
    for user in ("alice", "nobody"):
        async with gateway.http.post(link(gateway, user=user)) as response:
            assert response.status == 200


async def test_a_gateway_without_secrets_knows_no_link(nats_server: NatsServer, postgres: str) -> None:
    async with gateway_on(nats_server, postgres_url=postgres) as gateway, gateway.http.post(link(gateway)) as response:
        assert response.status == 404
