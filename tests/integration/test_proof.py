"""A proof and a funnel say what is stored, and nothing else."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from engine.partition.reader import Delivered
from projections.funnel.counts import funnel
from projections.inbox.table import InboxStore
from projections.proof import Fact, Proof, Proofs, _gaps
from projections.store import Checkpoint

AT = "2027-01-15T08:00:00Z"
START = 1_800_000_000


async def fold_in(pool: asyncpg.Pool, epoch: str, *bodies: Any, expected: Checkpoint | None = None) -> None:
    batch = [
        Delivered(b"log.0.default.alice", seq, (START + seq) * 1_000_000_000, b"", json.dumps(body).encode())
        for seq, body in enumerate(bodies, 1)
    ]
    assert await InboxStore(pool, 0).apply(batch, expected, Checkpoint(epoch, len(batch)))


def notification(id: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "kind": "notification", "tenant": "default", "user": "alice", "at": AT, **more}


async def proved(pool: asyncpg.Pool, id: str) -> Proof:
    [proof] = await Proofs(pool).of("default", id)
    return proof


async def test_what_a_new_log_says_of_an_old_record_is_not_said_to_stand_in_the_old_log(pool: asyncpg.Pool) -> None:
    await fold_in(pool, "former", notification("a"), notification("b"))
    # As a rebuild leaves it after the log was made anew.
    await pool.execute("UPDATE projection_checkpoints SET epoch = 'present', era = 2, seq = 0")
    read = {"id": "r", "kind": "read", "ids": ["a"], "at": AT, "device": "phone"}
    await fold_in(pool, "present", read, expected=Checkpoint("present", 0))
    facts = {fact.fact: fact.where for fact in (await proved(pool, "a")).facts}
    assert facts["dispatched"] == "LOG former.1"
    assert facts["read"] is None


async def test_a_record_that_only_the_inbox_could_read_is_proved_as_far_as_it_goes(pool: asyncpg.Pool) -> None:
    await fold_in(pool, "present", {"id": "a", "kind": "notification"})
    proof = await proved(pool, "a")
    assert [fact.fact for fact in proof.facts] == ["dispatched"]
    assert "when it was emitted, and its plan: its bytes are no whole record" in proof.not_proven


async def test_a_record_that_names_no_event_counts_as_dispatched_only(pool: asyncpg.Pool) -> None:
    await fold_in(pool, "present", notification("a", plan={"inapp": {}}))
    start = datetime.fromtimestamp(START, UTC)
    [step] = await funnel(pool, start, start + timedelta(hours=1))
    assert (step.emitted, step.stored, step.dispatched) == (0, 0, 1)


def test_that_a_provider_never_reports_what_becomes_of_a_text_is_said_to_be_no_proof_of_its_delivery() -> None:
    row: Any = {"event_seq": 1, "withheld": None, "read_seq": 2, "carried": False}
    by = {
        provider: Fact("sent", datetime.now(UTC), channel="sms", provider=provider, reason=reason)
        for provider, reason in (("amazon", "200/unreported"), ("twilio", "201"))
    }
    *_, gap = _gaps(row, None, list(by.values()))
    assert gap == "delivered by sms: amazon took it, and never reports what became of it"
