"""The pages behind the links of a mail, in a real browser that runs no scripts."""

from engine.channels.email.unsubscribe import Tokens, Unsubscription
from engine.directory.changes import changing
from engine.directory.types import put_type
from engine.plan.rules import ChannelRule, TypeRule
from engine.profiles.reader import read_profile
from ops.dev.servers import NatsServer
from tests.support.chromium import Chromium
from tests.support.gateways import gateway_on

SECRETS = ("a" * 40,)
BOX = "document.querySelector('input[type=checkbox][value=\"category:email:news\"]')"


async def test_a_person_unsubscribes_and_chooses_without_scripts_on_a_phone(
    browser: Chromium, nats_server: NatsServer, postgres: str
) -> None:
    async with gateway_on(nats_server, postgres_url=postgres, unsubscribe_secrets=SECRETS) as gateway:
        assert gateway.context.directory is not None
        pool = gateway.context.directory.pool
        async with changing(pool, "acme", 20) as rules:
            await put_type(rules, TypeRule(pattern="news.*", category="news", channels={"email": ChannelRule()}))
        token = Tokens(SECRETS).make(Unsubscription(tenant="acme", user="alice", channel="email", category="news"))
        page = await browser.open("about:blank")
        await page.call("Emulation.setScriptExecutionDisabled", value=True)
        await page.size(360, 740)
        await page.goto(f"{gateway.url}/u/{token}")
        assert await page.evaluate("document.querySelector('h1').textContent") == "Unsubscribe"
        await page.click("button")
        await page.until("document.querySelector('h1')?.textContent === 'Unsubscribed'")
        await page.click("a")
        await page.until("document.querySelector('h1')?.textContent === 'What you get'")
        assert await page.evaluate(f"{BOX}.checked")
        await page.evaluate(f"{BOX}.checked = false")
        await page.click("button")
        await page.until("document.querySelector('[role=status]')?.textContent === 'Saved.'")
        assert not await page.evaluate(f"{BOX}.checked")
        profile = await read_profile(pool, "acme", "alice")
        assert profile.preferences.categories == {"news": {"email": "off"}}
        # The style is the page's own, and its policy lets it be one.
        assert await page.evaluate("getComputedStyle(document.querySelector('main')).borderRadius") == "14px"
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.errors == []
