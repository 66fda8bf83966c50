"""What follows for an address from what became of a message, on a real PostgreSQL: once, whatever is told twice."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from engine.channels.bounces import SOFT_BOUNCES_MAX
from engine.channels.channel import Outcome
from engine.channels.email.callbacks import of_postmark
from engine.channels.email.message import ascii_address
from engine.channels.suppressing import free_number, suppress_for
from engine.directory.changing import Directory
from engine.directory.suppressions import NewSuppression, find_suppressions, lift_suppression, put_suppressions
from engine.directory.users import UserFields, put_user
from engine.postgres import Pool, asking
from engine.profiles.reader import read_profile
from engine.worker.targets import Nowhere, Targets
from tests.support.sending import a_job

ALICE, NUMBER = "alice@example.com", "+4366412345678"
GONE = Outcome(kind="target_invalid", provider="ses", code="5.1.1")
STOP = Outcome(kind="opted_out", provider="twilio", code="STOP")
AWAY = Outcome(kind="target_invalid", provider="ses", code="5.1.2", suppress_seconds=7 * 86400)
COMPLAINT = Outcome(kind="opted_out", provider="ses", code="complaint")
WISH = Outcome(kind="opted_out", provider="ses", code="unsubscribe")
SOFT = Outcome(kind="permanent", provider="ses", code="5.2.2", soft_bounce=True)


async def suppressed(pool: Pool, channel: str = "email", address: str = ALICE) -> list[tuple[str, str]]:
    async with asking(pool, 20) as connection:
        found = await find_suppressions(connection, "acme", {channel: address})  # type: ignore[dict-item]
    return [(one.reason, one.scope) for one in found]


async def told(directory: Directory, outcome: Outcome, report: str, **said: object) -> bool:
    given = {
        "channel": "email",
        "address": ALICE,
        "category": "news",
        "message": report,
        "at": datetime.now(UTC),
        **said,
    }
    return await suppress_for(directory, "acme", outcome=outcome, report=report, seconds=20, **given)  # type: ignore[arg-type]


async def test_a_report_told_twice_does_not_suppress_again_what_an_operator_has_lifted(pool: Pool) -> None:
    directory = Directory(pool)
    async with directory.changing("acme", ["alice"]) as change:
        await put_user(change, "alice", UserFields(email=ALICE))
    before = (await read_profile(pool, "acme", "alice")).version
    assert await told(directory, GONE, "r1")
    profile = await read_profile(pool, "acme", "alice")
    assert profile.version > before
    assert [one.reason for one in profile.suppressions] == ["hard_bounce"]
    async with asking(pool, 20) as connection:
        (found,) = await find_suppressions(connection, "acme", {"email": ALICE})
        await lift_suppression(connection, "acme", found.id)
    assert not any(await asyncio.gather(told(directory, GONE, "r1"), told(directory, GONE, "r1")))
    assert await suppressed(pool) == []
    assert await told(directory, GONE, "r2")
    assert await suppressed(pool) == [("hard_bounce", "all")]


async def test_another_tenant_with_the_same_report_is_another_matter(pool: Pool) -> None:
    directory = Directory(pool)
    for tenant in ("acme", "other"):
        assert await suppress_for(directory, tenant, "email", ALICE, GONE, category="", message="m",
            at=datetime.now(UTC), report="r", seconds=20)  # fmt: skip


async def test_soft_bounces_count_once_for_each_message_and_suppress_when_there_are_too_many(pool: Pool) -> None:
    directory, now = Directory(pool), datetime.now(UTC)
    for number in range(SOFT_BOUNCES_MAX - 1):
        for report in ("attempt", "report"):  # the worker heard it, and then the service says it, too
            said = {"message": f"m{number}", "at": now - timedelta(days=number + 1)}
            assert not await told(directory, SOFT, f"{report}{number}", **said)
    assert await suppressed(pool) == []
    assert await told(directory, SOFT, "last", message="m9", at=now)
    assert await suppressed(pool) == [("soft_bounces", "all")]


async def test_stop_ends_all_texts_start_frees_the_number_and_the_later_one_holds(pool: Pool) -> None:
    directory = Directory(pool)
    text = {"channel": "sms", "address": NUMBER}
    assert await told(directory, STOP, "s1", **text)
    assert await suppressed(pool, "sms", NUMBER) == [("opted_out", "all")]
    earlier, later = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(minutes=1)
    assert not await free_number(directory, "acme", NUMBER, at=earlier, report="late START", seconds=20)
    assert await free_number(directory, "acme", NUMBER, at=later, report="s2", seconds=20)
    assert await suppressed(pool, "sms", NUMBER) == []
    assert not await told(directory, STOP, "s1", **text)  # posted again
    assert await suppressed(pool, "sms", NUMBER) == []


async def test_stop_and_start_that_are_heard_at_the_same_time_come_to_the_one_that_was_sent_last(pool: Pool) -> None:
    directory, now = Directory(pool), datetime.now(UTC)
    for number in range(10):
        stop, start = now - timedelta(seconds=9), now - timedelta(seconds=8 if number % 2 else 10)
        phone = f"{NUMBER[:-1]}{number}"
        await asyncio.gather(
            told(directory, STOP, f"stop{number}", channel="sms", address=phone, at=stop),
            free_number(directory, "acme", phone, at=start, report=f"start{number}", seconds=20),
        )
        assert await suppressed(pool, "sms", phone) == ([] if number % 2 else [("opted_out", "all")])


async def test_start_leaves_what_a_service_has_put_since_it_was_sent(pool: Pool) -> None:
    directory, now = Directory(pool), datetime.now(UTC)
    assert await told(directory, STOP, "s1", channel="sms", address=NUMBER, at=now - timedelta(seconds=9))
    async with asking(pool, 20) as connection:
        await put_suppressions(
            connection, "acme", [NewSuppression(channel="sms", address=NUMBER, reason="opted_out", source="api")]
        )
    assert not await told_start(directory, "s2", now - timedelta(seconds=8))
    assert await suppressed(pool, "sms", NUMBER) == [("opted_out", "all")]
    assert await told_start(directory, "s3", datetime.now(UTC) + timedelta(seconds=1))


async def test_a_stop_that_is_heard_after_a_later_one_does_not_make_that_earlier(pool: Pool) -> None:
    directory, now = Directory(pool), datetime.now(UTC)
    for report, seconds in (("s2", 7), ("s1", 9)):
        await told(directory, STOP, report, channel="sms", address=NUMBER, at=now - timedelta(seconds=seconds))
    assert not await told_start(directory, "s3", now - timedelta(seconds=8))
    assert await suppressed(pool, "sms", NUMBER) == [("opted_out", "all")]


async def told_start(directory: Directory, report: str, at: datetime) -> bool:
    return await free_number(directory, "acme", NUMBER, at=at, report=report, seconds=20)


async def test_start_lifts_a_wish_and_no_dead_number(pool: Pool) -> None:
    directory = Directory(pool)
    assert await told(directory, GONE, "r1", channel="sms", address=NUMBER)
    later = datetime.now(UTC) + timedelta(minutes=1)
    assert not await free_number(directory, "acme", NUMBER, at=later, report="s1", seconds=20)
    assert await suppressed(pool, "sms", NUMBER) == [("invalid_number", "all")]


@pytest.mark.parametrize("end", [None, timedelta(days=30)])
async def test_no_report_shortens_what_is_suppressed_for_longer(pool: Pool, end: timedelta | None) -> None:
    directory, now = Directory(pool), datetime.now(UTC)
    held = NewSuppression(
        channel="email", address=ALICE, reason="legal_hold", source="support", expires_at=end and now + end
    )
    async with asking(pool, 20) as connection:
        await put_suppressions(connection, "acme", [held])
    for number in range(SOFT_BOUNCES_MAX):
        await told(directory, SOFT, f"r{number}", message=f"m{number}", at=now - timedelta(days=4 - number))
    assert await told(directory, AWAY, "r9")
    async with asking(pool, 20) as connection:
        (found,) = await find_suppressions(connection, "acme", {"email": ALICE})
    assert (found.reason, found.source, found.expires_at) == (held.reason, held.source, held.expires_at)


async def test_a_report_replaces_what_ends_sooner_and_has_ended(pool: Pool) -> None:
    directory, now = Directory(pool), datetime.now(UTC)
    assert await told(directory, AWAY, "r1", at=now - timedelta(days=8))
    assert await suppressed(pool) == []
    for number in range(SOFT_BOUNCES_MAX):
        await told(directory, SOFT, f"s{number}", message=f"m{number}", at=now - timedelta(days=4 - number))
    assert await suppressed(pool) == [("soft_bounces", "all")]
    assert await told(directory, AWAY, "r2", at=now + timedelta(minutes=1))
    assert await suppressed(pool) == [("hard_bounce", "all")]
    assert await told(directory, GONE, "r3")
    assert await told(directory, AWAY, "r4"), "it is suppressed"
    async with asking(pool, 20) as connection:
        (found,) = await find_suppressions(connection, "acme", {"email": ALICE})
    assert (found.source, found.expires_at) == ("ses 5.1.1", None)


async def test_a_complaint_and_an_opt_out_replace_what_lasts_as_long_and_are_not_replaced_by_a_bounce(
    pool: Pool,
) -> None:
    directory = Directory(pool)
    for outcome, reason in (
        (GONE, "hard_bounce"),
        (COMPLAINT, "complaint"),
        (GONE, "complaint"),
        (WISH, "opted_out"),
        (COMPLAINT, "opted_out"),
        (GONE, "opted_out"),
    ):
        assert await told(directory, outcome, f"{outcome.code} after {await suppressed(pool)}", category="")
        assert await suppressed(pool) == [(reason, "all")]


async def test_a_service_replaces_what_a_report_says_but_no_wish(pool: Pool) -> None:
    directory = Directory(pool)
    soon = datetime.now(UTC) + timedelta(days=1)
    new = NewSuppression(channel="email", address=ALICE, reason="on_holiday", expires_at=soon)
    for outcome, left in ((GONE, "on_holiday"), (COMPLAINT, "complaint"), (WISH, "opted_out")):
        assert await told(directory, outcome, outcome.code, category="")
        async with asking(pool, 20) as connection:
            await put_suppressions(connection, "acme", [new])
        assert await suppressed(pool) == [(left, "all")]


async def test_what_says_nothing_of_an_address_or_names_none_changes_nothing(pool: Pool) -> None:
    directory = Directory(pool)
    assert not await told(directory, Outcome(kind="permanent", code="5.7.1"), "r1")
    with pytest.raises(ValueError, match="`address`"):
        await told(directory, GONE, "r2", address="nobody")
    assert await suppressed(pool) == []


async def test_a_complaint_of_the_address_that_a_mail_went_to_suppresses_the_user_whose_domain_has_other_letters(
    pool: Pool,
) -> None:
    directory, stored = Directory(pool), "alice@münchen.de"
    async with directory.changing("acme", ["alice"]) as change:
        user = await put_user(change, "alice", UserFields(email=stored))
    assert user.email == stored, "as he wrote it"
    (report,) = of_postmark(
        "postmark", {"RecordType": "SpamComplaint", "MessageID": "m", "ID": 1, "Email": ascii_address(stored)}
    )
    assert report.outcome is not None
    assert await told(directory, report.outcome, "r1", address=report.address)
    profile = await read_profile(pool, "acme", "alice")
    assert (profile.version > user.version, [one.reason for one in profile.suppressions]) == (True, ["complaint"])
    assert await suppressed(pool, address=stored) == await suppressed(pool, address=report.address) != []
    targets = Targets(pool)
    try:
        found = await targets.find(a_job("email", "n1", tenant="acme", user="alice"), "news", datetime.now(UTC))
    finally:
        await targets.close()
    assert found == Nowhere("suppressed:complaint")
