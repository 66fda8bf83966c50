"""What a planner makes of records: which it decides about, and what it writes down."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from engine.partition.worker import Delivered
from engine.plan.decide import plan
from engine.plan.decisions import Inputs
from engine.plan.profile import Suppression
from engine.planner.plans import Due, due_of, goes_further, notifications_in, receipt_of, user_of
from seamark.protocol.receipts import Receipt, decode_receipt
from tests.support.planning import FixedRules
from tests.support.plans import plain, with_facts, with_profile

STORED_AT = datetime(2026, 3, 4, 12, tzinfo=UTC)


def delivered(body: Any, subject: bytes = b"log.0.acme.alice") -> Delivered:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Delivered(subject, 7, int(STORED_AT.timestamp() * 1e9), b"", payload)


def body(**other: Any) -> dict[str, Any]:
    default = {"inapp": {"when": "now", "why": "default"}}
    return {"id": "e1", "kind": "notification", "type": "order.shipped", "plan": default, **other}


def due(**other: Any) -> Due:
    [found] = notifications_in([delivered(body(**other))])
    user = user_of(found)
    assert user is not None
    return due_of(found, user[1])


def receipt(of: Inputs, *, always: bool = False) -> Receipt | None:
    written = receipt_of(due(), of, plan(of), 5, always=always)
    return None if written is None else decode_receipt(written.payload)


def test_what_goes_to_the_app_alone_says_so_itself_and_gets_a_receipt_only_where_another_may_have_been_written() -> (
    None
):
    alone = replace(plain(), rule=None)
    assert receipt(alone) is None
    written = receipt(alone, always=True)
    assert written is not None
    assert {channel: one.when for channel, one in (written.plan or {}).items()} == {"inapp": "now"}


def test_of_a_cancelled_transaction_no_channel_is_used_and_the_app_has_it_until_it_is_recalled() -> None:
    written = receipt(with_facts(plain(), cancelled=True))
    assert written is not None
    assert {(one.when, one.why) for one in (written.plan or {}).values()} == {("never", "cancelled")}
    assert "inapp" not in (written.plan or {})


def test_a_transaction_whose_name_nobody_can_cancel_holds_up_no_channel() -> None:
    assert due(transaction_id="a\0b").transaction is None
    assert due(transaction_id="t1").transaction == ("acme", "t1")


def test_suppressions_of_other_categories_are_not_stored_with_a_plan() -> None:
    many = tuple(Suppression("email", "opted_out", f"category-{n}") for n in range(5000))
    written = receipt(with_profile(plain(), suppressions=(*many, Suppression("email", "opted_out", "orders"))))
    assert written is not None
    assert len(msgspec.json.decode(written.inputs, type=Inputs).profile.suppressions) == 1


@pytest.mark.parametrize(
    "other",
    [
        body(kind="read"),
        body(plan={"inapp": {"when": "never", "why": "expired"}}),
        body(id=7),
        body(expires_at="2026-01-31T12:00:00"),
        b"no record",
        b"",
        b'{"id":"\xff","kind":"notification"}',
    ],
)
def test_what_is_no_notification_or_over_already_is_passed(other: Any) -> None:
    assert list(notifications_in([delivered(other)])) == []


@pytest.mark.parametrize(
    "subject",
    [
        b"log.0.acme",
        b"log.0.acme.alice.x",
        b"log",
        b"log.0.\xff.alice",
        b"log.0.=ZZ.a",
        b"log.0.a=00.a",
        b"log.0.acme.a=00b",
    ],
)
def test_what_lies_under_a_subject_of_nobody_is_passed(subject: bytes) -> None:
    assert [user_of(found) for found in notifications_in([delivered(body(), subject)])] in ([], [None])


def test_a_record_with_an_impossible_user_or_transaction_is_passed_and_holds_up_nobody() -> None:
    [found] = notifications_in([delivered(body(), b"log.0.acme.=ZZ")])
    assert user_of(found) is None
    [found] = notifications_in([delivered(body(transaction_id=""))])
    assert user_of(found) is None


def test_a_record_is_decided_about_as_its_log_has_it() -> None:
    found = due(
        category="orders", channels=["x"], transaction_id="order 17", trace="t", expires_at="2026-03-05T12:00:00Z"
    )
    assert (found.subject, found.stored_at, found.trace) == ("rcpt.0.acme.alice", STORED_AT, "t")
    assert (found.notification.tenant, found.notification.user) == ("acme", "alice")
    assert found.transaction == ("acme", "order 17")
    assert found.notification.channels is None
    asked = due(plan={"email": {"when": "now", "why": "requested"}, "inapp": {"when": "now", "why": "requested"}})
    assert asked.notification.channels == ("email", "inapp")


@pytest.mark.parametrize(
    ("type", "asked", "further"),
    [
        ("order.shipped", None, True),
        ("demo.hello", None, False),
        ("demo.hello", "email", True),
        ("order.shipped", "inapp", False),
        (None, None, False),
    ],
)
def test_a_record_goes_further_if_its_rule_or_its_event_names_a_channel_beside_the_app(
    type: str | None, asked: str | None, further: bool
) -> None:
    plan = {"plan": {asked: {"when": "now", "why": "requested"}}} if asked is not None else {}
    [found] = notifications_in([delivered(body(type=type, **plan))])
    assert goes_further(found, FixedRules()) is further
