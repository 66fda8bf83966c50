"""The rules of tenants as every process holds them: whole, in memory, and told of changes.

A process asks for a tenant's rules when it first needs them. When the bell rings, and every half minute, it compares the versions
of all that it holds with PostgreSQL and reads those anew that have changed. So a change holds everywhere within a second, and
within half a minute if whoever made it died before the bell.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final

import msgspec
import structlog

from engine.broker.jetstream import Broker
from engine.directory.bell import listen
from engine.directory.tenant_defaults import defaults_of
from engine.directory.types import rule_of
from engine.errors import StoreBroken, StoreUnavailable
from engine.limits import RULES_CHECK_SECONDS, RULES_DOUBT_SECONDS, RULES_HELD_BYTES, RULES_HELD_TENANTS
from engine.plan.patterns import patterns_of
from engine.plan.preferences import TenantDefaults
from engine.plan.rules import CHANNELS, Channel, TypeRule
from engine.postgres import Pool, asking
from engine.tasks import end, set_or_after

_log = structlog.get_logger("seamark.rules")

RETRY_SECONDS: Final = 1.0
READ_SECONDS: Final = 5.0

_VERSIONS: Final = "SELECT tenant, version FROM rule_versions WHERE tenant = ANY($1)"

# One statement, so one moment: the version is that of all that comes with it.
_READ: Final = """
SELECT 'version' AS what, '' AS key, NULL::text[] AS channels, NULL::text AS text, version FROM rule_versions WHERE tenant = $1
UNION ALL
SELECT 'type', pattern, NULL, rule::text, version FROM notification_types WHERE tenant = $1
UNION ALL
SELECT 'defaults', '', NULL, document::text, version FROM tenant_defaults WHERE tenant = $1
UNION ALL
SELECT 'templates', type, array_agg(DISTINCT channel), NULL, 0 FROM templates WHERE tenant = $1 AND active GROUP BY type
UNION ALL
SELECT 'webhook', '', types, NULL, 0 FROM webhook_endpoints WHERE tenant = $1 AND user_id IS NULL AND state = 'active'
"""


class TenantRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant says of its notifications.

    Attributes:
        version: of all together; 0: the tenant has never said anything.
        types: rules by their patterns.
        templates: the channels for which there is an active template, by type or pattern.
        webhooks: types and patterns that the tenant's own endpoints get.
        size: bytes of it in PostgreSQL.
    """

    version: int = 0
    types: Mapping[str, TypeRule] = {}
    templates: Mapping[str, frozenset[str]] = {}
    defaults: TenantDefaults = TenantDefaults()
    webhooks: frozenset[str] = frozenset()
    size: int = 0

    def rule_of(self, type: str) -> TypeRule | None:
        """The rule of a type: of all patterns that match it, the one that says most of it."""
        for pattern in patterns_of(type):
            if (rule := self.types.get(pattern)) is not None:
                return rule
        return None

    def templates_of(self, type: str) -> tuple[Channel, ...]:
        """The channels for which a type has a template, its own or one of a pattern."""
        if not self.templates:
            return ()
        found = frozenset[str]().union(*(self.templates.get(pattern, ()) for pattern in patterns_of(type)))
        return tuple(channel for channel in CHANNELS if channel in found)

    def webhook_of(self, type: str) -> bool:
        """Whether an endpoint of the tenant gets this type, whoever the user is."""
        return bool(self.webhooks) and not self.webhooks.isdisjoint(patterns_of(type))


async def read_rules(pool: Pool, tenant: str) -> TenantRules:
    """The rules of a tenant as PostgreSQL has them.

    Raises:
        StoreUnavailable: no answer in time. StoreBroken: a newer Seamark has written rules that this one cannot read.
    """
    version, size, defaults = 0, 0, TenantDefaults()
    types: dict[str, TypeRule] = {}
    templates: dict[str, frozenset[str]] = {}
    webhooks: set[str] = set()
    async with asking(pool, READ_SECONDS) as connection:
        rows = await connection.fetch(_READ, tenant)
    try:
        for row in rows:
            size += len(row["key"]) + len(row["text"] or "")
            match row["what"]:
                case "version":
                    version = row["version"]
                case "type":
                    types[row["key"]] = rule_of(row["text"], row["version"])
                case "defaults":
                    defaults = defaults_of(row["text"], row["version"])
                case "templates":
                    templates[row["key"]] = frozenset(row["channels"])
                case "webhook":
                    webhooks.update(row["channels"])
    except msgspec.ValidationError as error:
        said = f"rules of tenant {tenant[:80]!r} cannot be read: {error}"
        raise StoreBroken(said, "Run the version of Seamark that wrote them, or a newer one.") from error
    return TenantRules(
        version=version,
        types=types,
        templates=templates,
        defaults=defaults,
        webhooks=frozenset(webhooks),
        size=size,
    )


class Rules:
    """The rules of tenants, held for a process.

    Args:
        pool: the primary: a replica that lags would show the rules from before a change that was heard of.
        broker: where the bell is heard.
    """

    def __init__(self, pool: Pool, broker: Broker) -> None:
        self._pool, self._broker = pool, broker
        self._held: dict[str, TenantRules] = {}  # in the order in which they were last asked for
        self._bytes = 0
        self._reading: dict[str, asyncio.Task[TenantRules]] = {}
        self._rung = asyncio.Event()
        self._rings = 0
        self._doubted_since: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to listen to the bell."""
        self._tasks = [
            asyncio.create_task(listen(self._broker, self._ring), name="rules-bell"),
            asyncio.create_task(self._check(), name="rules-check"),
        ]

    async def close(self) -> None:
        """End what is under way."""
        await end(*self._tasks, *self._reading.values())

    async def of(self, tenant: str) -> TenantRules:
        """The rules of a tenant: at once where they are held, else as soon as PostgreSQL says them.

        Raises:
            StoreUnavailable: PostgreSQL does not answer, and they are not held, or may have changed more than a minute ago.
        """
        held = self._held.pop(tenant, None)
        if held is not None:
            self._held[tenant] = held  # now the last one
            if not self._doubted():
                return held
        return await asyncio.shield(self._reading.get(tenant) or self._read(tenant))

    def _doubted(self) -> bool:
        since = self._doubted_since
        return since is not None and time.monotonic() - since > RULES_DOUBT_SECONDS

    def _ring(self) -> None:
        self._rings += 1
        self._doubted_since = self._doubted_since or time.monotonic()
        self._rung.set()

    def _read(self, tenant: str) -> asyncio.Task[TenantRules]:
        """One read for all who ask meanwhile."""
        task = self._reading[tenant] = asyncio.create_task(self._read_held(tenant), name="rules-read")

        def done(task: asyncio.Task[TenantRules]) -> None:
            del self._reading[tenant]
            if not task.cancelled():
                task.exception()  # told to those who wait, if any still do

        task.add_done_callback(done)
        return task

    async def _read_held(self, tenant: str) -> TenantRules:
        rings = self._rings
        found = await read_rules(self._pool, tenant)
        self._hold(tenant, found)
        if rings != self._rings:  # it may have been about this tenant, which was not held when versions were compared
            self._rung.set()
        return found

    def _hold(self, tenant: str, rules: TenantRules) -> None:
        self._let_go(tenant)
        self._held[tenant] = rules
        self._bytes += rules.size
        while len(self._held) > 1 and (self._bytes > RULES_HELD_BYTES or len(self._held) > RULES_HELD_TENANTS):
            self._let_go(next(iter(self._held)))

    def _let_go(self, tenant: str) -> None:
        before = self._held.pop(tenant, None)
        self._bytes -= before.size if before is not None else 0

    async def _check(self) -> None:
        """Compare versions at each ring and every half minute, until it is cancelled."""
        while True:
            await set_or_after(self._rung, RULES_CHECK_SECONDS)
            rings, began = self._rings, time.monotonic()
            try:
                await self._compare()
            except StoreUnavailable as error:
                _log.warning("rules_not_compared", why=str(error), tenants=len(self._held))
                await asyncio.sleep(RETRY_SECONDS)
                self._rung.set()
            else:
                self._doubted_since = None if rings == self._rings else began

    async def _compare(self) -> None:
        held = {tenant: rules.version for tenant, rules in self._held.items()}
        if not held:
            return
        async with asking(self._pool, READ_SECONDS) as connection:
            versions = {row["tenant"]: row["version"] for row in await connection.fetch(_VERSIONS, list(held))}
        for tenant, version in held.items():
            # Another one, not a later one: a database that was put back to a backup has earlier versions.
            if versions.get(tenant, 0) == version or tenant not in self._held:
                continue
            try:
                self._hold(tenant, await read_rules(self._pool, tenant))
            except StoreBroken as error:  # this tenant's only: whoever asks for its rules is told so, all others go on
                _log.error("rules_not_read", tenant=tenant, why=str(error), remedy=error.remedy)
                self._let_go(tenant)
