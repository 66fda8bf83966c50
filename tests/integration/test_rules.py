"""Every process holds a tenant's rules as PostgreSQL has them: a second after a change, whatever was lost on the way."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest

from engine.broker.jetstream import Broker
from engine.directory import bell, changes, rules
from engine.directory.bell import ring
from engine.directory.changes import changing
from engine.directory.rules import Rules, read_rules
from engine.directory.templates import TemplateKey, activate_template, delete_template, find_template, put_template
from engine.directory.tenant_defaults import delete_defaults, put_defaults
from engine.directory.types import delete_type, find_type, put_type
from engine.directory.webhooks import EndpointSettings, NewEndpoint, create_endpoint, delete_endpoint, replace_endpoint
from engine.errors import LimitReached, StoreBroken, StoreUnavailable, VersionConflict
from engine.plan.preferences import TenantDefaults
from engine.plan.rules import ChannelRule, TypeRule
from engine.postgres import Pool
from engine.topology import server as topology
from ops.dev.servers import NatsServer
from tests.support.logs import FAST, connected, eventually
from tests.support.network import bad_network

TENANT = "acme"
SOON_SECONDS = 1.0
TRIES = 10
"""A machine that stands still for a moment makes one change late, not each of them."""

SHIPPED = TypeRule(pattern="order.shipped", channels={"push": ChannelRule(unless_seen_seconds=60)})


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", overrides=FAST)
        yield connection


@pytest.fixture
def by_ear(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is known by the bell, which is rung however long that takes: nobody looks by himself."""
    monkeypatch.setattr(rules, "RULES_CHECK_SECONDS", 3600.0)
    monkeypatch.setattr(bell, "BELL_SECONDS", 20.0)


@asynccontextmanager
async def holding(pool: Pool, broker: Broker) -> AsyncIterator[Rules]:
    held = Rules(pool, broker)
    held.start()
    try:
        yield held
    finally:
        await held.close()


async def write(pool: Pool, rule: TypeRule, tenant: str = TENANT) -> TypeRule:
    async with changing(pool, tenant) as change:
        return await put_type(change, rule)


@pytest.mark.usefixtures("by_ear")
async def test_a_change_is_held_by_every_process_a_second_later(pool: Pool, broker: Broker) -> None:
    async with holding(pool, broker) as one, holding(pool, broker) as other:
        assert (await one.of(TENANT)).rule_of("order.shipped") is None
        assert (await other.of(TENANT)).version == 0
        took: list[float] = []
        while len(took) < 3 or (min(took) > SOON_SECONDS and len(took) < TRIES):
            written = await write(pool, TypeRule(pattern="order.*", ttl_seconds=60 + len(took)))
            began = time.monotonic()
            await ring(broker)
            for held in (one, other):

                async def known(held: Rules = held, written: TypeRule = written) -> bool:
                    return (await held.of(TENANT)).rule_of("order.shipped") == written

                await eventually(known)
            took.append(time.monotonic() - began)
        assert min(took) <= SOON_SECONDS


async def test_a_change_whose_writer_died_before_the_bell_is_found_all_the_same(
    pool: Pool, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "RULES_CHECK_SECONDS", 0.05)
    async with holding(pool, broker) as held:
        await held.of(TENANT)
        written = await write(pool, SHIPPED)

        async def known() -> bool:
            return (await held.of(TENANT)).rule_of("order.shipped") == written

        await eventually(known)


@pytest.mark.usefixtures("by_ear")
async def test_a_change_during_the_first_read_is_not_missed(
    pool: Pool, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bell rings after the statement was answered and before the tenant is held: nobody compares what nobody holds."""
    answered, go_on = asyncio.Event(), asyncio.Event()
    read = rules.read_rules

    async def slow(pool: Pool, tenant: str) -> rules.TenantRules:
        found = await read(pool, tenant)
        answered.set()
        await go_on.wait()
        return found

    async with holding(pool, broker) as held:
        await eventually(lambda: held._rings)
        monkeypatch.setattr(rules, "read_rules", slow)
        reading = asyncio.create_task(held.of(TENANT))
        await answered.wait()
        rings = held._rings
        written = await write(pool, SHIPPED)
        await ring(broker)
        await eventually(lambda: held._rings > rings and not held._rung.is_set())
        go_on.set()
        assert (await reading).version == 0

        async def known() -> bool:
            return (await held.of(TENANT)).rule_of("order.shipped") == written

        await eventually(known)


async def test_many_who_ask_at_once_cost_one_read(pool: Pool, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = rules.read_rules

    async def counted(pool: Pool, tenant: str) -> rules.TenantRules:
        reads.append(tenant)
        return await read(pool, tenant)

    monkeypatch.setattr(rules, "read_rules", counted)
    held = Rules(pool, broker)
    await asyncio.gather(*(held.of(TENANT) for _ in range(50)))
    await held.of(TENANT)
    assert reads == [TENANT]


@pytest.mark.usefixtures("by_ear")
async def test_what_is_held_is_used_while_postgresql_is_away_and_doubted_a_minute_after_a_ring(
    postgres: str, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = urlsplit(postgres)
    async with bad_network(address.port or 0) as network:
        far = address._replace(netloc=address.netloc.replace(str(address.port), str(network.port))).geturl()
        pool = await asyncpg.create_pool(far, min_size=0, max_size=2, timeout=20)
        monkeypatch.setattr(rules, "RETRY_SECONDS", 0.05)
        try:
            written = await write(pool, SHIPPED)
            async with holding(pool, broker) as held:
                assert (await held.of(TENANT)).rule_of("order.shipped") == written
                await eventually(lambda: held._doubted_since is None and held._rings)
                network.cut()
                with pytest.raises(StoreUnavailable):
                    await held.of("other")
                await ring(broker)
                await eventually(lambda: held._doubted_since)
                assert (await held.of(TENANT)).rule_of("order.shipped") == written
                monkeypatch.setattr(rules, "RULES_DOUBT_SECONDS", 0.0)
                with pytest.raises(StoreUnavailable):
                    await held.of(TENANT)
                network.restore()
                await eventually(lambda: held._doubted_since is None)
                assert (await held.of(TENANT)).rule_of("order.shipped") == written
        finally:
            pool.terminate()


async def test_a_process_holds_only_so_much_and_reads_the_rest_again(
    pool: Pool, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [await write(pool, SHIPPED, f"t{number}") for number in range(3)]
    size = (await read_rules(pool, "t0")).size
    monkeypatch.setattr(rules, "RULES_HELD_BYTES", 2 * size)
    held = Rules(pool, broker)
    for number in (0, 1, 0, 2):
        assert (await held.of(f"t{number}")).rule_of("order.shipped") == written[number]
    assert (list(held._held), held._bytes) == (["t0", "t2"], 2 * size)
    monkeypatch.setattr(rules, "RULES_HELD_TENANTS", 1)
    assert (await held.of("t1")).rule_of("order.shipped") == written[1]
    assert (list(held._held), held._bytes) == (["t1"], size)
    held._hold("t1", await read_rules(pool, "t1"))
    assert held._bytes == size, "what is read anew takes the place of what was held"


@pytest.mark.usefixtures("by_ear")
async def test_rules_of_a_newer_version_stop_their_own_tenant_only(pool: Pool, broker: Broker) -> None:
    for tenant in ("acme", "other"):
        await write(pool, SHIPPED, tenant)
    async with holding(pool, broker) as held:
        for tenant in ("acme", "other"):
            await held.of(tenant)
        await pool.execute(
            'UPDATE notification_types SET rule = \'{"pattern":"order.shipped","new":1}\' WHERE tenant = \'acme\''
        )
        await pool.execute("UPDATE rule_versions SET version = version + 1 WHERE tenant = 'acme'")
        written = await write(pool, TypeRule(pattern="*"), "other")
        await ring(broker)

        async def known() -> bool:
            return (await held.of("other")).rule_of("x") == written

        await eventually(known)
        with pytest.raises(StoreBroken, match="'acme'"):
            await held.of("acme")


async def test_two_who_change_the_same_version_do_not_overwrite_each_other(pool: Pool) -> None:
    there = await write(pool, SHIPPED)

    async def change(ttl_seconds: int) -> TypeRule:
        async with changing(pool, TENANT) as change:
            return await put_type(change, TypeRule(pattern="order.shipped", ttl_seconds=ttl_seconds), there.version)

    done = await asyncio.gather(*(change(60 + number) for number in range(2)), return_exceptions=True)
    [kept] = [one for one in done if isinstance(one, TypeRule)]
    [refused] = [one for one in done if isinstance(one, VersionConflict)]
    assert refused.version == kept.version
    async with pool.acquire() as connection:
        assert await find_type(connection, TENANT, "order.shipped") == kept


async def test_no_version_comes_again_after_a_deletion(pool: Pool) -> None:
    seen = set()
    for _ in range(3):
        seen.add((await write(pool, SHIPPED)).version)
        async with changing(pool, TENANT) as change:
            assert await delete_type(change, "order.shipped")
            assert not await delete_type(change, "order.shipped")
    assert len(seen) == 3
    async with changing(pool, TENANT) as change:
        with pytest.raises(VersionConflict, match="does not exist"):
            await delete_type(change, "order.shipped", 1)


async def test_what_was_there_already_is_no_change(pool: Pool) -> None:
    key = TemplateKey("order.*", "sms", "de")
    for expected in (True, False):
        async with changing(pool, TENANT) as change:
            await put_type(change, SHIPPED)
            await put_template(change, key, {"body": "hallo"})
            await put_defaults(change, TenantDefaults(channels={"push": "off"}))
        assert change.made is expected
        assert (await read_rules(pool, TENANT)).version == 1


async def test_rules_are_of_one_tenant_and_show_what_is_active(pool: Pool) -> None:
    key = TemplateKey("order.*", "sms", "de")
    async with changing(pool, TENANT) as change:
        await put_type(change, SHIPPED)
        await put_template(change, key, {"body": "hallo"})
        await put_defaults(change, TenantDefaults(channels={"push": "off"}))
        theirs, _ = await create_endpoint(change, NewEndpoint(url="https://hooks.example.com", types=("order.*",)))
        await create_endpoint(change, NewEndpoint(url="https://hooks.example.com", user="alice"))
    await write(pool, TypeRule(pattern="*"), "other")
    found = await read_rules(pool, TENANT)
    assert (found.version, set(found.types)) == (1, {"order.shipped"})
    assert found.templates_of("order.paid") == ("sms",)
    assert found.defaults == TenantDefaults(channels={"push": "off"}, version=1)
    assert (found.webhook_of("order.paid"), found.webhook_of("x")) == (True, False)
    async with changing(pool, TENANT) as change:
        await delete_template(change, key)
        await delete_defaults(change)
        await replace_endpoint(change, theirs.id, EndpointSettings(url="https://hooks.example.com", state="disabled"))
    found = await read_rules(pool, TENANT)
    assert (found.templates, found.defaults, found.webhooks) == ({}, TenantDefaults(), frozenset())
    async with changing(pool, TENANT) as change:
        await delete_endpoint(change, theirs.id)
    assert (await read_rules(pool, TENANT)).version == found.version + 1


async def test_a_template_can_be_put_back_and_keeps_so_many_versions(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.directory.templates.TEMPLATE_VERSIONS_MAX", 3)
    key = TemplateKey("order.shipped", "sms", "default")
    for number in range(5):
        async with changing(pool, TENANT) as change:
            made = await put_template(change, key, {"body": f"text {number}"}, number)
            assert (made.version, made.active) == (number + 1, True)
    async with changing(pool, TENANT) as change:
        assert await activate_template(change, key, 1) is None
        back = await activate_template(change, key, 3, 5)
    assert back is not None
    assert back.parts == {"body": "text 2"}
    async with pool.acquire() as connection:
        assert await find_template(connection, TENANT, key) == back
        kept = await connection.fetch("SELECT version, active FROM templates ORDER BY version")
    assert [tuple(row) for row in kept] == [(3, True), (4, False), (5, False)]


@pytest.mark.parametrize(
    ("limit", "what"), [("TYPES_MAX", "types"), ("TEMPLATES_MAX", "active templates"), ("RULE_BYTES_MAX", "bytes")]
)
async def test_a_tenant_has_only_so_many_rules(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, limit: str, what: str
) -> None:
    monkeypatch.setattr(changes, limit, 100 if what == "bytes" else 1)

    async def one_more(number: int) -> None:
        async with changing(pool, TENANT) as change:
            await put_type(change, TypeRule(pattern=f"order.{number}", category="c" * 40))
            await put_template(change, TemplateKey(f"order.{number}", "sms", "de"), {"body": "x"})

    await one_more(0)
    with pytest.raises(LimitReached, match=what):
        await one_more(1)
    assert len((await read_rules(pool, TENANT)).types) == 1
