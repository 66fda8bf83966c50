"""A digest: at the end of its window one message about all notifications that were planned for it and are still unread.

A digest is a question, not a batch: its members are the records of which the plan says so, and of which nothing else is known.
What is read, archived, recalled, expired or superseded by then falls out. Of the others only *whether* each is sent is decided
anew, not what it belongs to: somebody who changes his choice to `instant` in between would else get the morning's once more.

Once members are settled they stay the same, whoever sends the digest again: a claim has their ids, and so has a retry.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from engine.cancels import Cancels
from engine.channels.channel import Job, Members, members_of
from engine.controls.watching import WatchedControls
from engine.jobs.desk import Clock, Hold, Over, Send, Split
from engine.jobs.handling import RECEIPTS_AT_ONCE
from engine.jobs.receipts import ENDED_BY
from engine.jobs.retry import put_back_seconds
from engine.plan.decide import decide, wakes
from engine.plan.decisions import Decision, Inputs, Kill, Notification
from engine.plan.gathering import TenantRules, gathered
from engine.plan.profile import Profile
from engine.plan.rules import CHANNELS, Cap
from engine.traces.contexts import followed
from engine.worker.caughtup import PUT_BACK_SECONDS, CaughtUp, Known, Tables
from engine.worker.noticed import facts_of
from seamark.protocol.receipts import Receipt
from seamark.protocol.subjects import encode_token

ROWS_MAX: Final = 10_000
"""Notifications of one window that are looked at together: a second's work. Those beyond are looked at in the next round."""

MEMBERS_BYTES_MAX: Final = 256 << 10
"""Ids of a digest's members, some 9000 of usual length, and the traces of those that are followed: they are in its claim, and in
the message of each retry."""

LISTED_MAX: Final = 50
"""Members that a message names; it counts the others. Who has more goes to the app."""

TEXT_CHARS_MAX: Final = 200

AT_ONCE: Final = 200
"""Decisions that are made without a pause: some 5 ms."""

WINDOW: Final = timedelta(days=8)
"""The longest window is a week, which is an hour longer where clocks are set back."""

ALL_READ: Final = "all_read"

Aim = Callable[[Job, str | None, Profile], Awaitable[Send | Hold | Over | Split]]
"""`Desk.aim`: finds the target of a job of a category for a user, and renders it."""


class Rules(Protocol):
    """What tenants say of their notifications."""

    async def of(self, tenant: str, /) -> TenantRules: ...


class Profiles(Protocol):
    """What decisions need to know of users."""

    async def of(self, tenant: str, user: str, /) -> Profile: ...


class Caps(Protocol):
    """How many messages users may get."""

    async def take(self, job: Job, pattern: str, cap: Cap, /) -> datetime | None:
        """As `engine.worker.caps.Caps.take`."""


Store = Callable[[Job, Sequence[Receipt]], Awaitable[None]]
"""`Journal.store`."""


class _Verdicts(NamedTuple):
    """What is decided of notifications: those to be sent, the ends of others, and when to decide about the rest.

    `capped`: those to be sent whose rule has a cap, by the rule's pattern, with what was decided from.
    """

    sent: list[Known]
    ended: list[tuple[Known, Decision]]
    later: list[tuple[Inputs, Decision]]
    capped: defaultdict[str, list[tuple[Known, Inputs]]]


class Digests:
    """Makes digests when their windows have ended.

    Args:
        store: stores receipts; stored twice they say the same.
        caps: count a digest as one message for each rule that has a cap; none: there are no caps.
    """

    def __init__(
        self,
        caught_up: CaughtUp,
        tables: Tables,
        rules: Rules,
        profiles: Profiles,
        controls: WatchedControls,
        cancels: Cancels | None,
        store: Store,
        clock: Clock,
        caps: Caps | None = None,
    ) -> None:
        self._caught_up = caught_up
        self._tables = tables
        self._rules = rules
        self._profiles = profiles
        self._controls = controls
        self._cancels = cancels
        self._store = store
        self._clock = clock
        self._caps = caps

    async def decide(self, job: Job, aim: Aim) -> Send | Hold | Over | Split:
        """What is to be done with a digest now.

        Args:
            aim: of the desk that asks.

        Raises:
            BrokerError, StoreUnavailable: what it is decided from cannot be read.
        """
        now = self._clock.now()
        if job.members is None and not await self._caught_up.knows_all_of(job.tenant, job.user):
            pause = put_back_seconds(job.put_backs, PUT_BACK_SECONDS, random.random())
            return Hold(self._clock.now() + timedelta(seconds=pause), "tables_behind")
        profile = await self._profiles.of(job.tenant, job.user)
        if profile.deleted:
            return Over("suppressed", "user_deleted")  # and nothing is stored of him
        found = await self._candidates(job)
        verdicts = await self._verdicts(job, profile, found, now)
        # A part of a split digest needs no place: the whole has taken it.
        if self._caps is not None and not verdicts.later and not job.target:
            await self._take_places(job, verdicts, self._caps)
        if verdicts.later:
            return _held(verdicts.later)
        if job.members is not None:
            return await self._aimed(job, job.members, profile, aim) if verdicts.sent else _over(verdicts.ended)
        if verdicts.ended:
            await self._end(job, verdicts.ended, now)
        if not verdicts.sent:
            return _over(verdicts.ended)
        members = _members(verdicts.sent, now, more=len(found) == ROWS_MAX)
        return await self._aimed(job, members, profile, aim)

    async def _candidates(self, job: Job) -> list[Known]:
        if job.members is not None:
            return await self._tables.known(job.tenant, job.user, job.members.ids)
        since = datetime.fromisoformat(job.digest.rpartition("/")[2]) - WINDOW
        when = f"digest:{job.digest}"
        return await self._tables.planned(job.tenant, job.user, job.channel, when, since, ROWS_MAX)

    async def _verdicts(self, job: Job, profile: Profile, found: Sequence[Known], now: datetime) -> _Verdicts:
        rules, kills = await self._rules.of(job.tenant), self._controls.controls.drops(job.tenant, job.user)
        if self._cancels is not None and any(one.transaction is not None for one in found):
            await self._cancels.heard()
        verdicts = _Verdicts([], [], [], defaultdict(list))
        for number, one in enumerate(found, 1):
            inputs = self._inputs(job, one, rules, profile, kills, now)
            decision = decide(job.channel, inputs)
            if decision.why == "seen_in_app" or (decision.when != "never" and (one.read or one.archived)):
                decision = Decision("never", ALL_READ)  # read is read, whatever has woken it and however critical it is
            if decision.when == "never":
                verdicts.ended.append((one, decision))
            elif decision.when == "now":
                verdicts.sent.append(one)
                if not inputs.critical and inputs.rule is not None and _cap(job, inputs) is not None:
                    verdicts.capped[inputs.rule.pattern].append((one, inputs))
            else:
                verdicts.later.append((inputs, decision))
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
        return verdicts

    async def _take_places(self, job: Job, verdicts: _Verdicts, caps: Caps) -> None:
        """Take a place for the message by each rule with a cap. Where there is none, what is of that rule is not sent now."""
        for pattern, capped in verdicts.capped.items():
            cap = _cap(job, capped[0][1])
            capped_until = None if cap is None else await caps.take(job, pattern, cap)
            if capped_until is None:
                continue
            without = set[str]()
            for number, (one, inputs) in enumerate(capped, 1):
                # They have waited for a place since the end of their window, not since they were stored.
                facts = replace(inputs.facts, stored_at=job.first_at, capped_until=capped_until)
                waiting = replace(inputs, facts=facts)
                decision = decide(job.channel, waiting)
                if decision.when == "never":
                    verdicts.ended.append((one, decision))
                elif decision.when != "now":
                    verdicts.later.append((waiting, decision))
                if decision.when != "now":  # it is now where this worker's clock is ahead of that of Redis
                    without.add(one.id)
                if number % AT_ONCE == 0:
                    await asyncio.sleep(0)
            verdicts.sent[:] = [one for one in verdicts.sent if one.id not in without]

    def _inputs(
        self, job: Job, one: Known, rules: TenantRules, profile: Profile, kills: tuple[Kill, ...], now: datetime
    ) -> Inputs:
        notification = Notification(
            id=one.id,
            tenant=job.tenant,
            user=job.user,
            type=one.type,
            category=one.category,
            priority="low",  # it was not critical when planned: a rule that says so by now must not pass over preferences
            channels=one.channels if job.channel in one.channels else None,
            expires_at=one.expires_at,
        )
        tenant, transaction = encode_token(job.tenant), one.transaction
        cancelled = transaction is not None and self._cancels is not None and self._cancels.holds(tenant, transaction)
        facts = replace(facts_of(job, one), seen=False, cancelled=cancelled)  # what was only shown is still unread
        # The digest has a template of its own.
        return replace(gathered(notification, facts, rules, profile, kills, now), templates=CHANNELS)

    async def _end(self, job: Job, ended: Sequence[tuple[Known, Decision]], now: datetime) -> None:
        """Store how notifications end that are not sent. Whoever does this again finds them no more, or says the same."""
        receipts = [_end_of(job, *one, now) for one in ended]
        for begin in range(0, len(receipts), RECEIPTS_AT_ONCE):
            await self._store(job, receipts[begin : begin + RECEIPTS_AT_ONCE])

    async def _aimed(self, job: Job, members: Members, profile: Profile, aim: Aim) -> Send | Hold | Over | Split:
        listed = members.ids[:LISTED_MAX]
        records = await self._tables.records(job.tenant, job.user, listed)
        items = [_item(id, records[id]) for id in listed if id in records]
        count = len(members.ids)
        data = {"count": count, "items": items, "more": count - len(items), "category": job.category}
        decided = await aim(replace(job, data=data, members=members), job.category or None, profile)
        return decided if isinstance(decided, Hold) else decided._replace(members=members)


def _cap(job: Job, inputs: Inputs) -> Cap | None:
    line = None if inputs.rule is None else inputs.rule.channels.get(job.channel)
    return None if line is None else line.cap


def _members(sent: Sequence[Known], now: datetime, *, more: bool) -> Members:
    """As many as fit, the newest first."""
    size, ids, traces = 0, list[str](), dict[str, str]()
    for one in sent:
        trace = one.trace if followed(one.trace) is not None else ""
        size += (len(msgspec.json.encode(one.id)) + 1) * (2 if trace else 1) + len(trace)
        if size > MEMBERS_BYTES_MAX:
            more = True
            break
        ids.append(one.id)
        if trace:
            traces[one.id] = trace
    # What is queued for a try that nobody knows of any more is tried now: with a lower number its end would be hidden by that.
    tried = max((one.attempts for one in sent[: len(ids)]), default=0) - 1
    return Members(tuple(ids), now, more, traces, max(0, tried))


def _held(later: Sequence[tuple[Inputs, Decision]]) -> Hold:
    """All wait for the last of them, so that they stay together."""
    woken = [(*found, decision.why) for inputs, decision in later if (found := wakes(decision, inputs)) is not None]
    stage, due, why = max(woken, key=lambda one: one[1])
    return Hold(due, why, stage)


def _over(ended: Sequence[tuple[Known, Decision]]) -> Over:
    """Nothing is left. The reason is that of all, if they have the same."""
    whys = {decision.why for _, decision in ended}
    why = whys.pop() if len(whys) == 1 else ALL_READ
    return Over(ENDED_BY.get(why, "suppressed"), why)


def _end_of(job: Job, one: Known, decision: Decision, at: datetime) -> Receipt:
    return Receipt(
        user=job.user,
        channel=job.channel,
        state=ENDED_BY.get(decision.why, "suppressed"),
        at=at,
        id=one.id,
        reason=decision.why,
        attempt=max(job.attempt + 1, one.attempts),
        trace=one.trace or None,
    )


class _Record(msgspec.Struct):
    at: datetime
    type: str = ""
    data: Any = None


_decode: Final = msgspec.json.Decoder(_Record).decode


def _item(id: str, record: bytes) -> dict[str, Any]:
    """What a template shows of a notification: `title`, `text` and `url` as the plain default would show them."""
    try:
        read = _decode(record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {"id": id, "type": "", "at": "", "title": "", "text": "", "url": ""}
    data = members_of(read.data)
    text = _text(data, "text") or _text(data, "body")
    said = {"title": _text(data, "title") or text or read.type, "text": text, "url": _text(data, "url", 2000)}
    at = read.at.astimezone(UTC) if read.at.tzinfo is not None else read.at
    return {"id": id, "type": read.type, "at": at.isoformat(timespec="seconds"), **said}


def _text(data: dict[str, Any], name: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        return ""
    value = " ".join(value[: chars_max * 4].split())  # a list has a line for each
    return value if len(value) <= chars_max else f"{value[: chars_max - 1]}…"
