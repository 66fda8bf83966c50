"""Records that wait for a digest: as a dispatcher and a planner have left them."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from engine.broker.jetstream import Broker, Outgoing
from engine.channels.channel import Job
from engine.directory.changes import changing
from engine.directory.types import put_type
from engine.jobs.digests import digest_id
from engine.patience import patiently
from engine.plan.hours import Digest
from engine.plan.rules import ChannelRule, TypeRule
from engine.postgres import Pool
from ops.dev.providers.acceptlog import Accepted
from seamark.protocol.receipts import PLANNED, Planned, Receipt
from tests.support.sending import TENANT

CATEGORY = "news"
TYPE = "news.item"


def key_of(end: datetime | None = None) -> str:
    """The key of a window that has ended, a minute ago."""
    end = end or datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
    return f"{CATEGORY}/{end.isoformat().replace('+00:00', 'Z')}"


async def with_rule(pool: Pool, **line: Any) -> None:
    """The rule of the type: by e-mail, as a digest."""
    rule = ChannelRule(**line) if line else ChannelRule(digest=Digest())
    async with changing(pool, TENANT) as change:
        await put_type(change, TypeRule(pattern=TYPE, category=CATEGORY, channels={"email": rule, "push": rule}))


async def append(broker: Broker, user: str, kind: str, *bodies: dict[str, Any]) -> None:
    """Records of a user's log, or receipts. Stored twice they say the same."""
    subject = f"{kind}.0.{TENANT}.{user}"
    for begin in range(0, len(bodies), 500):
        some = bodies[begin : begin + 500]
        await patiently(
            broker.commit, [Outgoing(subject, json.dumps(body, default=datetime.isoformat).encode()) for body in some]
        )


def records(user: str, ids: Iterable[str], **other: Any) -> list[dict[str, Any]]:
    """Notifications as a dispatcher writes them."""
    plan = {"inapp": {"when": "now", "why": "default"}}
    same = {"kind": "notification", "tenant": TENANT, "user": user, "type": TYPE, "category": CATEGORY, "plan": plan}
    at = "2026-01-31T12:00:00Z"
    return [
        same | {"id": id, "at": at, "data": {"title": f"Title of {id}", "url": f"https://example.com/{id}"}} | other
        for id in ids
    ]


def did(user: str, kind: str, ids: Sequence[str]) -> dict[str, Any]:
    """What a user did with some of them."""
    return {
        "id": f"{kind}-{ids[0]}",
        "kind": kind,
        "tenant": TENANT,
        "user": user,
        "ids": list(ids),
        "at": "2026-01-31T12:00:00Z",
    }


async def planned(
    broker: Broker, user: str, ids: Iterable[str], when: str, channel: str = "email", trace: str | None = None
) -> None:
    """The fact that a planner has decided so."""
    plan = {channel: Planned(when, "digest")}
    at = datetime.now(UTC)
    facts = [Receipt(user=user, channel="", state=PLANNED, at=at, id=id, term=1, plan=plan, trace=trace) for id in ids]
    await append(broker, user, "rcpt", *(msgspec.to_builtins(one) for one in facts))


async def waiting(
    broker: Broker, user: str, ids: Sequence[str], key: str, channel: str = "email", **other: Any
) -> None:
    """Notifications that wait for a digest."""
    await append(broker, user, "log", *records(user, ids, **other))
    await planned(broker, user, ids, f"digest:{key}", channel, other.get("trace"))


def digest_job(user: str, key: str, channel: Any = "email") -> Job:
    """What fires at the end of the window."""
    return Job(
        id=digest_id(key),
        tenant=TENANT,
        user=user,
        type="digest",
        channel=channel,
        stage="digest",
        first_at=datetime.now(UTC),
        category=CATEGORY,
        digest=key,
    )


def listed(mail: Accepted) -> list[str]:
    """The notifications that a mail names, in its order."""
    return [line.split("/")[-1].rstrip(")") for line in mail.shown["text"].splitlines() if line.startswith("- ")]
