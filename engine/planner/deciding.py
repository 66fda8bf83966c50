"""Deciding about the notifications of a round: read what decisions are made from, decide, and say what is to be stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

from msgspec import Struct
from msgspec.structs import replace

from engine.broker.jetstream import Outgoing
from engine.cancels import Cancels
from engine.channels.channel import Job
from engine.plan.decide import plan
from engine.plan.decisions import Facts, Inputs, Kill
from engine.plan.gathering import TenantRules, gathered
from engine.plan.profile import Profile
from engine.planner.forms import Form, Moment, form_of, moment_of, with_placeholders
from engine.planner.jobs import Following, jobs_of, throttled_of
from engine.planner.plans import Due, Found, User, due_of, goes_further, receipt_of, user_of
from engine.planner.shares import Above, Shares

FORMS_MAX: Final = 2048
"""How many kinds of notifications are remembered for a log; a form has some 2 KiB. Beyond that all are forgotten."""


class Rules(Protocol):
    """The rules of tenants."""

    async def of(self, tenant: str, /) -> TenantRules:
        """Those of one tenant. Raises StoreUnavailable."""


class Profiles(Protocol):
    """Users as decisions see them."""

    async def of_all(self, users: Sequence[User], /) -> Sequence[Profile]:
        """These users, in their order. Raises StoreUnavailable, where neither Redis nor PostgreSQL answers."""


Drops = Callable[[str, str], tuple[Kill, ...]]
"""`drops(tenant, user)`: the kill switches that are set for this user."""


class Planned(NamedTuple):
    """What was decided about a round: receipts, what follows from them in JOBS, and the jobs that a tenant has too many of."""

    receipts: list[Outgoing]
    following: list[Following]
    throttled: list[Job]


class _Asked(Struct, frozen=True, gc=False):
    """A notification, and what is decided about it from."""

    found: Found
    user: str
    rules: TenantRules
    profile: Profile
    kills: tuple[Kill, ...]
    at: Moment
    term: int


class _First(NamedTuple):
    """That there was one of a kind: rules and profile of it, and nothing of its own, which may be large."""

    rules: TenantRules
    profile: Profile


Made = tuple[Outgoing | None, tuple[Outgoing, ...]]
"""The receipt and the jobs of a notification."""


class Decider:
    """Decides about the notifications of one log.

    Args:
        rules, profiles, drops, cancels: what decisions are made from, beside the record. Without `cancels` nothing is cancelled.
        shares: which tenants have too many jobs waiting; none: no tenant has.
    """

    def __init__(
        self, rules: Rules, profiles: Profiles, drops: Drops, cancels: Cancels | None, shares: Shares | None
    ) -> None:
        self._rules, self._profiles, self._drops = rules, profiles, drops
        self._cancels, self._shares = cancels, shares
        # For each kind: that there was a first one, then the form, or what the form would hold where there can be none. Kinds
        # are told apart by the identity of rules and profile, so each of the three keeps these alive.
        self._forms: dict[object, Form | _First | tuple[TenantRules, Profile]] = {}

    async def planned(self, found: Sequence[Found], term: int, doubted: Callable[[Found], bool] | None) -> Planned:
        """What becomes of notifications.

        Args:
            term: the planner's.
            doubted: whether an earlier owner may have written a plan for it; None: for none of them.
        """
        # Before anything is read: whatever a user or tenant has changed by then is in what is read, however long that takes.
        at = moment_of(datetime.now(UTC))
        rules = {tenant: await self._rules.of(tenant) for tenant in {one.tenant for one in found}}
        in_doubt = set[int]() if doubted is None else {one.stored.seq for one in found if doubted(one)}
        wanted = [one for one in found if one.stored.seq in in_doubt or goes_further(one, rules[one.tenant])]
        due = [(one, user) for one, user in zip(wanted, map(user_of, wanted), strict=True) if user is not None]
        planned = Planned([], [], [])
        if not due:
            return planned
        users = list(dict.fromkeys([user for _, user in due]))
        profiles = dict(zip(users, await self._profiles.of_all(users), strict=True))
        if self._cancels is not None and any(one.entry.transaction_id is not None for one, _ in due):
            await self._cancels.heard()
        above = await self._shares.above({tenant for tenant, _ in users}) if self._shares else Above()
        crowded = above.tenants | above.critical
        for one, user in due:
            profile, entry = profiles[user], one.entry
            if profile.deleted:
                continue  # whatever is stored of him now would stay behind when he is erased
            tenant, stored = one.tenant, one.stored
            asked = _Asked(one, user[1], rules[tenant], profile, self._drops(*user), at, term)
            always = stored.seq in in_doubt
            own = always or entry.transaction_id is not None or tenant in crowded
            receipt, jobs = (None if own else self._alike(asked)) or self._own(asked, above, planned, always=always)
            if receipt is not None:
                planned.receipts.append(receipt)
            if jobs:
                planned.following.append(Following(stored.seq, jobs, entry.trace, stored.time_nanoseconds))
        return planned

    def _own(self, asked: _Asked, above: Above, planned: Planned, *, always: bool) -> Made:
        """What becomes of one notification, decided about by itself."""
        due = due_of(asked.found, asked.user)
        inputs = self._inputs(due, asked)
        if above.holds(asked.found.tenant, critical=inputs.critical):
            inputs = replace(inputs, throttled=True)
        decisions = plan(inputs)
        planned.throttled.extend(throttled_of(due, inputs, decisions))
        return receipt_of(due, inputs, decisions, asked.term, always=always), jobs_of(due, inputs, decisions)

    def _alike(self, asked: _Asked) -> Made | None:
        """What becomes of it by the form of its kind; None: there is no form, or it is not like the others now."""
        entry, forms = asked.found.entry, self._forms
        key = (
            asked.found.tenant_token,
            id(asked.rules),
            id(asked.profile),
            asked.kills,
            asked.term,
            asked.found.channels,
            entry.type,
            entry.category,
            entry.priority,
            entry.expires_at is None,
            entry.trace is None,
            entry.collapse_key is None,
        )
        form = forms.get(key)
        if form is None:
            # The form is made for the second of a kind: for a single one it would cost more than it saves.
            if len(forms) >= FORMS_MAX:
                forms.clear()
            forms[key] = _First(asked.rules, asked.profile)
            return None
        if isinstance(form, _First):
            form = forms[key] = self._form_of(asked) or (asked.rules, asked.profile)
        return form.filled(asked.found, asked.user, asked.at) if isinstance(form, Form) else None

    def _form_of(self, asked: _Asked) -> Form | None:
        due = with_placeholders(due_of(asked.found, asked.user), asked.at.now)
        inputs = self._inputs(due, asked)
        decisions = plan(inputs)
        receipt = receipt_of(due, inputs, decisions, asked.term, always=False)
        held = asked.rules, asked.profile
        return form_of(inputs, decisions.values(), receipt, jobs_of(due, inputs, decisions), held)

    def _inputs(self, due: Due, asked: _Asked) -> Inputs:
        cancelled = due.transaction is not None and self._cancels is not None and self._cancels.holds(*due.transaction)
        facts = Facts(stored_at=due.stored_at, cancelled=cancelled)
        return gathered(due.notification, facts, asked.rules, asked.profile, asked.kills, asked.at.now)
