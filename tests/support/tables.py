"""Tables of the projections as plain values, to hold against the pure folds, and logs drawn at random."""

import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
from hypothesis import strategies as st

from engine.partition.reader import Delivered
from projections.folds import deliveries as delivery_state
from projections.folds import inbox as inbox_fold
from projections.folds.deliveries import STATES
from projections.projector import Projector, projections
from tests.support.logs import PIN_TIMEOUT_SECONDS, at_work, connected, redis_at

EPOCH = "abcdefgh"
START = 1_800_000_000
USERS = ["default.alice", "default.bob", "other.alice=40example=2Ecom"]

ids = st.sampled_from([f"e{n}" for n in range(10)])
notifications = st.fixed_dictionaries(
    {"id": ids, "kind": st.just("notification")},
    optional={
        "type": st.sampled_from(["order.shipped", None, "a\0b"]),
        "category": st.sampled_from([None, "", "mail", "ünïcode", "nul\0"]),
        "collapse_key": st.sampled_from([None, "", "k1", "k2"]),
        "expires_at": st.sampled_from(
            [None, "2026-01-31T12:00:00Z", "2126-01-31T12:00:00+02:00", "2026-01-31T12:00:00"]
        ),
        "plan": st.sampled_from(
            [
                {},
                {"inapp": {"when": "now", "why": "default"}},
                {"email": {}, "inapp": {}},
                {"inapp": {"when": "never", "why": "cancelled"}},
                {"a": {"when": "never", "why": 7}},
            ]
        ),
        "transaction_id": st.sampled_from([None, "t1", "nul\0", 7]),
        "event": st.sampled_from([None, {"epoch": "e", "seq": 7}]),
        "skip": st.booleans(),
    },
)
marks = st.fixed_dictionaries(
    {"id": ids, "kind": st.sampled_from(["read", "read", "archive", "recall"])},
    optional={
        "ids": st.lists(st.one_of(ids, st.just("nul\0")), max_size=4),
        "up_to": st.one_of(st.none(), st.integers(-1, 80), st.just(1 << 70)),
        "device": st.sampled_from(["phone", "nul\0"]),
        "at": st.sampled_from(["2026-01-31T12:00:00Z", "2026-02-01T12:00:00Z"]),
    },
)
others = st.sampled_from([{"id": "x", "kind": "other"}, {"kind": "notification"}, {"id": 7, "kind": "notification"}, 3])
records = st.lists(
    st.tuples(st.sampled_from(USERS), st.integers(1, 3), st.one_of(notifications, notifications, marks, others)),
    max_size=30,
)

moments = st.integers(0, 20).map(lambda after: datetime.fromtimestamp(START + after, UTC).isoformat())
facts = st.fixed_dictionaries(
    {"id": ids, "channel": st.sampled_from(["email", "push"]), "state": st.sampled_from(STATES), "at": moments},
    optional={
        "device": st.sampled_from(["", "d1", "nul\0"]),
        "attempt": st.integers(-1, 3),
        "reason": st.sampled_from(["bounced", "quiet"]),
        "provider": st.sampled_from(["ses", "fcm"]),
        "provider_id": st.sampled_from(["", "a\tb", "\n", "nul\0", "ü", *"cdefghijkl"]),
        "segments": st.integers(-1, 5),
    },
)
ranges = st.builds(
    lambda device, epoch, state, after, size, at, sent: {
        "channel": "inapp",
        "device": device,
        "epoch": epoch,
        "state": state,
        "after": after,
        "up_to": after + size,
        "at": at,
        **({"sent_at": sent} if sent else {}),
    },
    st.sampled_from(["phone", "tv"]),
    st.sampled_from([EPOCH, EPOCH, "formerly"]),
    st.sampled_from(["sent", "acknowledged"]),
    st.integers(-1, 40),
    st.integers(0, 9),
    moments,
    st.one_of(st.none(), moments),
)
plans = st.fixed_dictionaries(
    {
        "id": ids,
        "channel": st.just(""),
        "state": st.just("planned"),
        "at": moments,
        "term": st.integers(0, 3),
        "plan": st.dictionaries(
            st.sampled_from(["email", "push", "inapp"]),
            st.sampled_from(
                [
                    {"when": "now", "why": "default"},
                    {"when": "never", "why": "expired"},
                    {"when": "never", "why": "nul\0"},
                ]
            ),
            max_size=3,
        ),
    }
)
nonsense = st.sampled_from(
    [{"channel": "inapp"}, {"channel": "email", "state": "lost", "at": "2026-01-01T00:00:00Z", "id": "e1"}, 3]
)
receipts = st.lists(
    st.tuples(st.sampled_from(USERS), st.integers(1, 3), st.one_of(facts, ranges, plans, nonsense)), max_size=30
)


def as_stream(drawn: Iterable[tuple[str, int, Any]], prefix: str = "log.0.") -> list[Delivered]:
    """Drawn bodies as a stream would hand them out."""
    found, seq = [], 0
    for number, (user, step, body) in enumerate(drawn):
        seq += step
        content = {"user": "u", **body} if isinstance(body, dict) else body
        skip = isinstance(content, dict) and content.pop("skip", False)
        lines = b"NATS/1.0\r\ntraceparent: 00-00-00-00\r\n%b\r\n" % (b"Seamark-Skip: 1\r\n" if skip else b"")
        at = (START + number) * 1_000_000_000 + 1234
        found.append(Delivered((prefix + user).encode(), seq, at, lines, json.dumps(content).encode()))
    return found


def expected_inbox(log: Sequence[Delivered], epoch: str = EPOCH) -> list[dict[str, Any]]:
    users = inbox_fold.fold(inbox_fold.decoded(log), epoch)
    rows = [msgspec.structs.asdict(row) for changes in users.values() for row in changes.rows.values()]
    return sorted(rows, key=lambda row: (row["tenant"], row["user_id"], row["seq"]))


async def stored_inbox(connection: asyncpg.Connection) -> list[dict[str, Any]]:
    names = ", ".join(inbox_fold.Row.__struct_fields__)
    rows = await connection.fetch(
        f"SELECT {names} FROM inbox WHERE version = (SELECT version FROM projection_versions WHERE projection = 'inbox')"
        ' ORDER BY tenant COLLATE "C", user_id COLLATE "C", era, seq'
    )
    return [dict(row) for row in rows]


def expected_deliveries(stream: Sequence[Delivered]) -> dict[str, Any]:
    folded = delivery_state.fold(stream)
    return {
        "deliveries": {key: asdict(one) for key, one in folded.rows().items()},
        "ranges": set(folded.ranges.values()),
        "cursors": {key: (one.epoch, one.seq, one.at) for key, one in folded.cursors.items()},
    }


async def stored_deliveries(connection: asyncpg.Connection) -> dict[str, Any]:
    live = "version = (SELECT version FROM projection_versions WHERE projection = 'deliveries')"
    deliveries = await connection.fetch(f"SELECT * FROM deliveries WHERE {live}")
    ranges = await connection.fetch(
        "SELECT tenant, user_id, epoch, up_to, after_seq, device, channel, state, at, sent_at"
        f" FROM delivery_ranges WHERE {live}"
    )
    cursors = await connection.fetch(f"SELECT * FROM device_cursors WHERE {live}")
    names = tuple(delivery_state.Delivery.__dataclass_fields__)
    key = ("tenant", "user_id", "id", "channel", "device")
    return {
        "deliveries": {tuple(row[n] for n in key): {n: row[n] for n in names} for row in deliveries},
        "ranges": {tuple(row) for row in ranges},
        "cursors": {(r["tenant"], r["user_id"], r["device"]): (r["epoch"], r["seq"], r["at"]) for r in cursors},
    }


TABLES = "inbox, deliveries, delivery_ranges, device_cursors, projection_checkpoints"


@contextlib.asynccontextmanager
async def projecting_tables(
    nats_url: str, redis_url: str, postgres_url: str, partitions: int = 4
) -> AsyncIterator[Projector]:
    """A projector of everything at work on connections of its own; a fault of it fails the test."""
    pool = asyncpg.create_pool(postgres_url, min_size=0, max_size=4, timeout=2, command_timeout=5)
    await pool
    try:
        async with connected(nats_url) as broker, redis_at(redis_url) as redis:
            work = Projector(broker, projections(redis, pool), partitions, pin_timeout_seconds=PIN_TIMEOUT_SECONDS)
            async with at_work(work.run(), "projector"):
                yield work
    finally:
        pool.terminate()


def stored(seq: int, days_ago: float, body: dict[str, Any], prefix: bytes = b"log") -> Delivered:
    """A message about `default.alice` as it was stored so many days ago, in the log or (`rcpt`) among the receipts."""
    at = (datetime.now(UTC) - timedelta(days=days_ago)).timestamp()
    return Delivered(
        prefix + b".0.default.alice", seq, int(at * 1e9), b"", json.dumps({"user": "alice", **body}).encode()
    )
