"""What a new development stack has to try things on: a few users, a topic they are in, and rules for two kinds of notifications.

Nobody is disturbed by it: `example.com` belongs to nobody (RFC 2606), no phone has the numbers (Ofcom keeps them free for
dramas), and the stack sends to simulated providers only. What the quick start publishes (`demo.hello`) has no rule: it goes by
the channels that its event names, and else to the app only.
"""

from __future__ import annotations

import hashlib
from typing import Final

import asyncpg

from engine.directory.changes import changing_in
from engine.directory.changing import Directory, ProfileChange
from engine.directory.push_tokens import NewToken, WebPushKeys, register_token
from engine.directory.templates import TemplateKey, put_template
from engine.directory.topics import add_members
from engine.directory.types import put_type
from engine.directory.users import UserFields, put_user
from engine.directory.webhooks import NewEndpoint, create_endpoint
from engine.plan.hours import Digest
from engine.plan.rules import ChannelRule, TypeRule
from engine.postgres import asking
from ops.dev.outbox.providers import RECEIVER, Providers
from ops.postgres import CONNECT_SECONDS

TOPIC: Final = "news"

USERS: Final = {
    "alice": UserFields(
        email="alice@example.com",
        phone="+447700900001",
        locale="en",
        timezone="Europe/Vienna",
        attributes={"plan": "pro"},
    ),
    "bob": UserFields(
        email="bob@example.com",
        phone="+447700900002",
        locale="de",
        timezone="America/New_York",
        attributes={"plan": "free"},
    ),
    "carol": UserFields(attributes={"plan": "free"}),
}
"""Of carol nothing is known by which a channel could reach her."""

TYPES: Final = (
    TypeRule(
        pattern="parcel.*",
        category="parcels",
        channels={"email": ChannelRule(unless_seen_seconds=60), "push": ChannelRule()},
    ),
    TypeRule(pattern="news.*", category="news", channels={"email": ChannelRule(digest=Digest())}),
)

TEMPLATES: Final = {
    TemplateKey("parcel.*", "email", "default"): {"subject": "{{ data.text }}", "body": "{{ data.text }}"},
    TemplateKey("parcel.*", "push", "default"): {"body": "{{ data.text }}"},
    TemplateKey("news.*", "email", "default"): {"subject": "{{ data.title }}", "body": "{{ data.body }}"},
}

_ANYTHING: Final = """
SELECT EXISTS (SELECT FROM profiles WHERE tenant = $1) OR EXISTS (SELECT FROM topics WHERE tenant = $1)
    OR EXISTS (SELECT FROM rule_versions WHERE tenant = $1)
"""
"""Whether the tenant has, or ever had, users, topics or rules: what a developer has deleted must not come back."""


APP: Final = "com.example.shop"
DEVICES: Final = {"alice": ("iphone", "pixel", "browser"), "bob": ("pixel",)}
"""Each of another platform: APNs, FCM, Web Push."""


async def fill(postgres_url: str, tenant: str, providers: Providers) -> None:
    """Give a tenant that has nothing the example, whole or not at all. No role may run yet: nobody is told of it.

    Args:
        providers: who the users' devices and the tenant's webhook endpoint are registered with.

    Raises:
        StoreUnavailable: PostgreSQL does not answer in time.
    """
    pool = asyncpg.create_pool(postgres_url, min_size=0, max_size=1, timeout=CONNECT_SECONDS)
    try:
        await pool
        async with asking(pool) as connection:
            begun = await connection.fetchval(_ANYTHING, tenant)
        if not begun:
            async with Directory(pool).changing(tenant, USERS) as change:
                await _fill(change, providers)
    finally:
        pool.terminate()


async def _fill(change: ProfileChange, providers: Providers) -> None:
    for id, fields in USERS.items():
        await put_user(change, id, fields)
    for user, devices in DEVICES.items():
        for device in devices:
            await register_token(change, user, device, _token(user, device, providers))
    await add_members(change.connection, change.tenant, TOPIC, list(USERS))
    async with changing_in(change.connection, change.tenant) as rules:
        for rule in TYPES:
            await put_type(rules, rule)
        for key, parts in TEMPLATES.items():
            await put_template(rules, key, parts)
        await create_endpoint(rules, NewEndpoint(url=f"https://{RECEIVER}/hooks", secret=providers.webhook_secret))


def _token(user: str, device: str, providers: Providers) -> NewToken:
    """As the device of that name would get it from its platform."""
    made = hashlib.sha256(f"{user}/{device}".encode()).hexdigest()
    if device == "iphone":
        return NewToken(platform="apns", token=made, app=APP, device=device)
    if device == "pixel":
        return NewToken(platform="fcm", token=f"{user}:{made}", app=APP, device=device)
    browser = providers.push.subscribe(user)
    keys = WebPushKeys(browser.p256dh, browser.auth)
    return NewToken(platform="webpush", token=browser.endpoint, app="shop.example.com", device=device, keys=keys)
