"""What a job is rendered with: its template in the user's language, and what stands beside it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final, Protocol

import structlog

from engine.channels.channel import Context, Job
from engine.channels.email.unsubscribe import Tokens, Unsubscription
from engine.channels.locales import EVERYBODY
from engine.channels.references import References
from engine.directory.rules import TenantRules
from engine.errors import StoreUnavailable
from engine.plan.profile import SCOPE_ALL, Profile
from engine.worker.digest_templates import DIGEST_TEMPLATES
from engine.worker.templates import ActiveTemplates

_log = structlog.get_logger("seamark.worker")

Unread = Callable[[str, str], Awaitable[int | None]]
"""`unread(tenant, user)`: how many notifications are unread; None: that is not known. Raises StoreUnavailable."""


REPORTED: Final = frozenset({"email", "sms"})
"""Channels whose providers report later what became of a message."""


class Rules(Protocol):
    """The rules of tenants."""

    async def of(self, tenant: str, /) -> TenantRules:
        """Those of one tenant. Raises StoreUnavailable."""


class Links:
    """The links in mails by which people unsubscribe.

    Args:
        public_url: where people reach the gateway, without a slash at the end.
        tokens: makes what is in them.
    """

    def __init__(self, public_url: str, tokens: Tokens) -> None:
        self._url, self._tokens = public_url.rstrip("/"), tokens

    def unsubscribe_url(self, job: Job) -> str:
        """The link for a job; "": none. Nobody can unsubscribe from what is critical, and a mail has no room for long names."""
        if job.lane == "critical":
            return ""
        what = Unsubscription(tenant=job.tenant, user=job.user, channel=job.channel, category=job.category or SCOPE_ALL)
        try:
            return f"{self._url}/u/{self._tokens.make(what)}"
        except ValueError:
            _log.warning("no_unsubscribe_link", channel=job.channel)
            return ""


class Contexts:
    """Makes contexts.

    Args:
        unread: for the badge of pushes.
        links: of mails; none: they have no link.
        references: what providers give back with their reports; none: reports find no notification.
    """

    def __init__(
        self,
        rules: Rules,
        templates: ActiveTemplates,
        *,
        unread: Unread | None = None,
        links: Links | None = None,
        references: References | None = None,
    ) -> None:
        self._rules, self._templates = rules, templates
        self._unread, self._links, self._references = unread, links, references

    async def of(self, job: Job, profile: Profile) -> Context:
        """What `job` is rendered with for a user.

        Raises:
            StoreUnavailable: PostgreSQL does not say the template.
        """
        rules = await self._rules.of(job.tenant)
        locale = profile.preferences.locale or profile.locale or rules.defaults.locale or EVERYBODY
        template = None
        if job.channel in rules.templates_of(job.type):
            template = await self._templates.find(job.tenant, rules.version, job.channel, job.type, locale)
        if template is None and job.digest:
            template = DIGEST_TEMPLATES.get(job.channel)
        return Context(
            template=template,
            locale=locale,
            unread=await self._badge(job),
            unsubscribe_url=self._links.unsubscribe_url(job) if self._links and job.channel == "email" else "",
            reference=self._reference(job),
            now=datetime.now(UTC),
        )

    def _reference(self, job: Job) -> str:
        if self._references is None or job.channel not in REPORTED:
            return ""
        try:
            return self._references.of(job)
        except ValueError:
            _log.warning("no_reference", channel=job.channel)  # its names are too long
            return ""

    async def _badge(self, job: Job) -> int | None:
        if self._unread is None or job.channel != "push":
            return None
        try:
            return await self._unread(job.tenant, job.user)
        except StoreUnavailable:
            return None  # the number at the app's icon stays as it is
