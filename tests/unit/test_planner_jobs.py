"""The jobs that follow from plans, and how they are named and cut into batches."""

import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.broker.jetstream import Outgoing
from engine.channels.channel import Job
from engine.jobs.digests import digest_id
from engine.jobs.messages import decode_job, job_subject, schedule_of
from engine.limits import BATCH_BYTES_MAX, BATCH_MESSAGES_MAX
from engine.plan.decide import plan
from engine.plan.decisions import Decision, Inputs
from engine.plan.hours import Digest
from engine.planner.jobs import Following, batches, jobs_of, messages_of, throttled_of
from tests.support.plans import NOON, plain, with_line, with_notification, with_profile
from tests.unit.test_planner_plans import due


def jobs(inputs: Inputs, **record: object) -> dict[str, tuple[Outgoing, Job]]:
    made = jobs_of(due(**record), inputs, plan(inputs))
    return {job.channel: (one, job) for one in made for job in [decode_job(one.payload)]}


def test_each_channel_that_is_used_has_one_job_and_the_others_have_none() -> None:
    made = jobs(with_profile(plain(), reach=("email", "push")), data={"order": 17}, collapse_key="c", trace="00-x")
    assert set(made) == {"email", "push"}
    message, job = made["email"]
    assert message.subject == job_subject(job) == "job.email.normal.t.alice"
    assert (job.id, job.stage, job.attempt, job.target) == ("n", "first", 0, "")
    assert (job.data, job.collapse_key, job.trace) == ({"order": 17}, "c", "00-x")
    assert (job.first_at, job.category) == (NOON, "orders")


def test_the_priority_says_the_lane() -> None:
    for priority, lane in (("critical", "critical"), ("high", "normal"), ("normal", "normal"), ("low", "bulk")):
        made = jobs(with_notification(plain(), priority=priority))
        assert {job.lane for _, job in made.values()} == {lane}


def test_what_the_rule_says_of_repetitions_goes_with_the_job() -> None:
    rule = plain().rule
    assert rule is not None
    made = jobs(plain(rule=replace(rule, semantics="effectively_once", ttl_seconds=600)))
    assert {job.semantics for _, job in made.values()} == {"effectively_once"}
    assert {job.expires_at for _, job in made.values()} == {NOON + timedelta(seconds=599)}


def test_what_waits_is_a_schedule_that_says_what_wakes_then() -> None:
    message, job = jobs(with_line(plain(), "push", unless_seen_seconds=60))["push"]
    wakes_at = plain().facts.stored_at + timedelta(seconds=60)
    assert (job.stage, job.first_at) == ("escalation", wakes_at)
    assert message.headers == (
        b"Nats-Schedule:@at %b\r\nNats-Schedule-Target:job.push.normal.t.alice\r\n"
        % wakes_at.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode()
    )
    assert message.subject.startswith("jobsched.push.t.alice.")
    assert message.subject.count(".") == 4


def test_all_records_of_a_digest_make_the_same_schedule() -> None:
    inputs = with_line(plain(), "email", digest=Digest())
    one, job = jobs(inputs, id="e1", data={"a": 1})["email"]
    other, _ = jobs(with_notification(inputs, id="m"), id="e2", data={"b": 2}, trace="00-y")["email"]
    assert one == other
    assert job.id == digest_id(job.digest)
    assert job.digest.startswith("orders/")
    assert job.data == {}


names = st.text(st.characters(min_codepoint=1, max_codepoint=127), min_size=1, max_size=20).filter(
    lambda name: "topic:" not in name
)
moments = st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(id=names, tenant=names, user=names, attempt=st.integers(0, 20), due=moments)
def test_the_name_of_a_schedule_is_its_job_its_attempt_its_stage_and_its_time(
    id: str, tenant: str, user: str, attempt: int, due: datetime
) -> None:
    job = Job(id=id, tenant=tenant, user=user, type="a", channel="push", attempt=attempt, first_at=due)
    name = schedule_of(job, due).subject
    assert len(name.split(".")) == 5, "it fits the subjects of JOBS whatever the names are"
    assert schedule_of(replace(job, again=True), due).subject == name
    for other in (
        replace(job, attempt=attempt + 1),
        replace(job, stage="retry"),
        replace(job, id=id + "x"),
        replace(job, target="x"),
    ):
        assert schedule_of(other, due).subject != name
    assert schedule_of(job, due + timedelta(milliseconds=2)).subject != name


@given(parts=st.lists(st.text(alphabet="a/%b", min_size=1, max_size=4), min_size=6, max_size=6))
def test_no_two_jobs_share_a_key(parts: list[str]) -> None:
    one, other = (
        Job(tenant=tenant, id=id, user=user, type="a", channel="push", first_at=NOON)
        for tenant, id, user in (parts[:3], parts[3:])
    )
    assert (one.key == other.key) == (parts[:3] == parts[3:])


def test_a_job_is_read_as_it_was_written() -> None:
    _, job = jobs(plain(), data={"deep": [1, {"x": "\u00e9"}]})["sms"]
    assert decode_job(msgspec.json.encode(job)) == job


def test_a_tenant_that_has_too_many_jobs_gets_no_more_but_what_joins_a_digest() -> None:
    inputs = plain(throttled=True)
    decisions = plan(inputs)
    assert {one for channel, one in decisions.items() if channel != "inapp"} == {Decision("never", "throttled")}
    assert decisions["inapp"].when == "now", "what the app shows is in the log already"
    assert jobs(inputs) == {}
    would_be = throttled_of(due(), inputs, decisions)
    assert {job.channel for job in would_be} == set(jobs(replace(inputs, throttled=False)))
    critical = with_notification(inputs, priority="critical")
    assert jobs(critical) == {}, "that it has a larger share was reckoned in before (`Above`)"
    gathered = with_line(inputs, "email", digest=Digest("daily"))
    assert plan(gathered)["email"].when.startswith("digest:")
    assert "email" not in {job.channel for job in throttled_of(due(), gathered, plan(gathered))}


# --- batches ---------------------------------------------------------------------------------------------------------


def following(seq: int, *subjects: str, size: int = 10, headers: bytes = b"") -> Following:
    return Following(
        seq, tuple(Outgoing(subject, json.dumps(seq).encode().ljust(size), headers) for subject in subjects)
    )


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 40))
def test_batches_hold_every_record_whole_and_in_order(counts: list[int], largest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.planner.jobs.BATCH_MESSAGES_MAX", max(largest, 5))
        records = [following(seq, *(f"job.{n}" for n in range(count))) for seq, count in enumerate(counts, 1) if count]
        made = list(batches(records))
        assert [record for batch in made for record in batch] == records
        for batch in made:
            assert 0 < len(messages_of(batch)) < max(largest, 5), "there is room for the mark"


def test_a_batch_is_bounded_in_bytes_and_messages() -> None:
    large = [following(seq, "job.x", size=BATCH_BYTES_MAX // 3) for seq in range(1, 8)]
    assert [len(batch) for batch in batches(large)] == [2, 2, 2, 1]
    many = [following(seq, "job.x") for seq in range(1, 2001)]
    assert max(len(messages_of(batch)) for batch in batches(many)) == BATCH_MESSAGES_MAX - 1


def test_a_schedule_stands_once_in_a_batch_and_jobs_as_often_as_they_are() -> None:
    twice = [following(1, "jobsched.d", headers=b"x"), following(2, "jobsched.d", headers=b"x")]
    assert len(messages_of(twice)) == 1
    assert len(messages_of([following(1, "job.x"), following(2, "job.x")])) == 2
