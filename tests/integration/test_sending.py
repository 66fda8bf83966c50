"""A worker with everything behind it: jobs leave as pushes, mails, texts and webhooks, or do not, for a reason that is stored."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from engine.cancels import cancel
from engine.channels.channel import Job
from engine.controls.changing import Asked
from engine.controls.document import Kill
from engine.controls.store import ControlStore
from engine.directory.changes import changing
from engine.directory.changing import Directory
from engine.directory.push_tokens import remove_token, tokens_of
from engine.directory.suppressions import NewSuppression, put_suppressions
from engine.directory.templates import TemplateKey, put_template
from engine.directory.types import put_type
from engine.directory.users import UserFields, put_user
from engine.directory.webhooks import NewEndpoint, create_endpoint, find_endpoint, page_of_endpoints
from engine.jobs.messages import decode_job
from engine.jobs.queue import JobsQueue
from engine.jobs.retry import POLICIES, RetryPolicy
from engine.plan.rules import Cap, ChannelRule, TypeRule
from engine.postgres import Pool, asking
from engine.profiles.preferences import patch_preferences
from engine.settings import Settings
from engine.topology import server as topology
from engine.traces import names, spans
from engine.traces.hopspans import HopSpans
from engine.worker import holding
from engine.worker.targets import Nowhere, Targets
from ops.dev.providers.acceptlog import Accepted
from ops.dev.providers.faults import Answers
from ops.dev.providers.smtp import Scripted
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.receipts import Receipt
from seamark.protocol.subjects import log_subject
from tests.support.logs import FAST, connected, eventually
from tests.support.planning import record
from tests.support.roles import RoleProcess
from tests.support.sending import (
    DEVICE,
    EMAIL,
    PHONE,
    RECEIVER,
    SECRET,
    TENANT,
    USER,
    Simulated,
    a_job,
    add,
    known,
    receipts_of,
    role_processes,
    sending,
    settings_of,
    simulated,
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def providers(tmp_path: Path) -> AsyncIterator[Simulated]:
    async with simulated(tmp_path / "providers") as found:
        yield found


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await topology.ensure(connection, "dev", 1, overrides=FAST)
        yield connection


@pytest.fixture
async def settings(
    broker: Broker, nats_server: NatsServer, valkey: Valkey, postgres: str, pool: Pool, providers: Simulated
) -> Settings:
    await known(pool, USER)
    return settings_of(nats_server.url, valkey.url, postgres, providers.file)


async def test_a_job_of_each_channel_arrives_once_and_its_receipt_names_who_took_it(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    async with sending(settings, pool):
        await add(broker, *(a_job(channel, "n1") for channel in ("push", "email", "sms", "webhook")))
        await eventually(sent(broker, "n1", *providers.logs))
        found = await receipts_of(broker, "n1")
    assert [one.to for one in providers.accepted("push")] == [DEVICE]
    [mail] = providers.accepted("email")
    assert (mail.to, mail.shown["subject"]) == (EMAIL, "Shipped")
    assert "https://notify.example.com/u/" in mail.shown["headers"]["List-Unsubscribe"]
    [text] = providers.accepted("sms")
    assert (text.to, text.shown["text"]) == (PHONE, "Shipped\nIt is on its way")
    [hook] = providers.accepted("webhook")
    assert hook.shown["data"]["text"] == "It is on its way"
    last = {one.channel: one for one in found if one.state == "sent"}
    assert {channel: one.provider for channel, one in last.items()} == {
        "push": "apple", "email": "relay", "sms": "first", "webhook": "webhook"
    }  # fmt: skip
    assert last["sms"].provider_id == text.id
    assert last["sms"].segments == 1
    assert last["push"].provider_id
    assert [one.state for one in found if not one.device and one.channel in {"push", "webhook"}] == ["split", "split"]


def sent(broker: Broker, id: str, *channels: str) -> Callable[[], Any]:
    """The receipts of a notification by channel, once it was sent by all of these."""

    async def look() -> dict[str, list[Receipt]] | None:
        found: dict[str, list[Receipt]] = {}
        for one in await receipts_of(broker, id):
            found.setdefault(one.channel, []).append(one)
        done = all(name in found and found[name][-1].state == "sent" for name in channels)
        return found if done else None

    return look


def over(broker: Broker, id: str, *names: str) -> Callable[[], Any]:
    """The last receipt of each channel, or channel and target, of a notification, once it has ended there."""

    async def look() -> dict[str, Receipt] | None:
        found = {f"{one.channel}/{one.device}".rstrip("/"): one for one in await receipts_of(broker, id)}
        return found if all(name in found and found[name].state != "queued" for name in names) else None

    return look


async def test_an_event_that_names_four_channels_leaves_by_each_of_them_once_whichever_process_takes_it(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated, tmp_path: Path
) -> None:
    channels = list(providers.logs)
    plan = {channel: {"when": "now", "why": "requested"} for channel in channels}
    with role_processes(tmp_path, settings, "planner", "worker --processes 2") as (_, workers):
        await eventually(lambda: _at_work(workers, 2))
        said = record("e1", USER, "parcel.shipped", plan=plan, data={"title": "Shipped", "text": "On its way"})
        await broker.append(log_subject(0, TENANT, USER), said)
        found = await eventually(sent(broker, "e1", *channels), every_seconds=0.2)
        await eventually(lambda: _nothing_waits(broker))
        await asyncio.to_thread(workers.stop)
        assert workers.exit_code == 0
    assert {channel: len(log.messages()) for channel, log in providers.logs.items()} == dict.fromkeys(channels, 1)
    assert all(found[channel][-1].provider_id for channel in ("push", "email", "sms"))


async def _at_work(role: RoleProcess, processes: int) -> bool:
    """Whether so many processes of a role have begun."""
    assert role.alive, role.log_tail()
    return len({line["health_port"] for line in role.said("role_starting")}) == processes


async def test_other_endpoints_of_the_tenant_are_told_once_that_one_was_disabled_and_why(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    async with changing(pool, TENANT) as change:
        new = NewEndpoint(url=f"https://{RECEIVER}/watch", types=("endpoint.*",), secret=SECRET)
        watch, _ = await create_endpoint(change, new)
    async with asking(pool, 20) as connection:
        every = await page_of_endpoints(connection, TENANT, "", 10)
    [gone] = [one.id for one in every if one.id != watch.id]
    providers.hooks.faults.script([Answers(status=410)])
    idle = (await broker.stream("JOBS")).messages
    async with sending(settings, pool):
        await add(broker, a_job("webhook", "n1"))
        [hook] = await eventually(lambda: _accepted(providers, "webhook"))
        # What a worker does that died between telling the others and disabling: they are told the same again.
        told = Job(id=hook.shown["id"], tenant=TENANT, user=gone, type="endpoint.disabled", channel="webhook", target=watch.id,
            first_at=datetime.now(UTC), requested=True, again=True)  # fmt: skip
        await add(broker, told)
        await eventually(lambda: _holds(broker, idle))
    assert [one.id for one in providers.accepted("webhook")] == [hook.id]
    assert (hook.to, hook.shown["type"]) == ("/watch", "endpoint.disabled")
    assert hook.shown["data"] == {"endpoint": gone, "reason": "gone", "user": None}
    async with asking(pool, 20) as connection:
        found = await find_endpoint(connection, TENANT, gone)
    assert found is not None
    assert (found.state, found.disabled_because) == ("disabled", "gone")


async def _holds(broker: Broker, jobs: int) -> bool:
    return (await broker.stream("JOBS")).messages == jobs


async def _accepted(providers: Simulated, channel: str) -> list[Accepted] | None:
    return providers.accepted(channel) or None


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come within a moment."""
    for channel in POLICIES:
        monkeypatch.setitem(POLICIES, channel, RetryPolicy((0.1, 0.1, 0.1), (0, 1), 600))


async def test_what_a_provider_cannot_take_now_is_tried_again_and_by_the_next_one_where_there_is_one(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated, at_once: None
) -> None:
    providers.push.production.faults.script([Answers(status=503, code="ServiceUnavailable")])
    providers.hooks.faults.script([Answers(status=503)])
    providers.texts.faults.script([Answers(status=503)])
    async with sending(settings, pool):
        await add(broker, *(a_job(channel, "n1") for channel in ("push", "sms", "webhook")))
        found = await eventually(sent(broker, "n1", "push", "sms", "webhook"))
    # A target is said to be waited for before there is a job to it: the sweep misses one that JOBS loses.
    for channel in ("push", "webhook"):
        said = [(one.state, one.attempt) for one in found[channel] if one.device]
        assert said == [("queued", 1), ("queued", 2), ("sent", 2)]
        assert [one.state for one in found[channel] if not one.device] == ["split"]
    [text] = found["sms"]
    assert (text.provider, text.attempt) == ("spare", 1), "the next provider is asked within the same try"
    assert [len(providers.accepted(channel)) for channel in ("push", "sms", "webhook")] == [1, 0, 1]
    assert len(providers.spare.log.messages()) == 1


async def test_a_domain_that_defers_mails_keeps_its_own_waiting_and_all_others_go_on(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated, at_once: None
) -> None:
    async with Directory(pool).changing(TENANT, [f"busy{number}" for number in range(20)]) as change:
        for number in range(20):
            await put_user(change, f"busy{number}", UserFields(email=f"busy{number}@busy.example"))
    providers.mail.script([Scripted("rcpt", Answers(status=421, text="4.7.0 Try again later"), "busy0@busy.example")])
    async with sending(settings, pool, ["email"]):
        await add(broker, a_job("email", "n0", user="busy0"))
        await eventually(lambda: _put_back(broker, 1))
        await add(broker, *(a_job("email", f"n{number}", user=f"busy{number}") for number in range(1, 20)))
        await add(broker, *(a_job("email", f"m{number}") for number in range(20)))
        for number in range(20):
            await eventually(sent(broker, f"m{number}", "email"))
        await eventually(lambda: _put_back(broker, 20))
    assert {one.to for one in providers.accepted("email")} == {EMAIL}
    waits = [decode_job(one.payload) for one in await whole_stream(broker, "JOBS", "jobsched.>")]
    assert [job.attempt for job in waits if job.id != "n0"] == [0] * 19, "nothing but the first has cost an attempt"


async def test_a_token_that_is_none_is_retired_and_then_a_push_that_waits_for_nothing_else_says_so(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    providers.push.production.gone[DEVICE] = int((time.time() + 60) * 1000)
    async with sending(settings, pool, ["push"]):
        await add(broker, a_job("push", "n1"))
        await eventually(over(broker, "n1", "push/phone"))
        await eventually(lambda: _retired(pool))
        await add(broker, a_job("push", "n2"))
        found = await eventually(over(broker, "n2", "push"))
    assert (found["push"].state, found["push"].reason) == ("suppressed", "no_token")
    assert providers.accepted("push") == []


async def _retired(pool: Pool) -> bool:
    async with pool.acquire() as connection:
        [token] = await tokens_of(connection, TENANT, USER)
    return token.retired_at is not None


async def test_what_holds_by_now_decides_about_jobs_that_wait(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    await add(
        broker,
        a_job("email", "suppressed"),
        a_job("sms", "unwanted"),
        a_job("webhook", "late", expires_at=datetime.now(UTC) - timedelta(seconds=1)),
        a_job("webhook", "called-back", transaction="t1"),
        a_job("push", "gone", user="nobody"),
    )
    # All of it after the jobs were made.
    async with Directory(pool).changing(TENANT, [USER]) as change:
        await put_suppressions(
            change.connection, TENANT, [NewSuppression(channel="email", address=EMAIL, reason="hard_bounce")]
        )
        await patch_preferences(change, USER, {"channels": {"sms": "off"}})
        change.touch(USER)
    await cancel(broker, TENANT, "t1", budget_seconds=10)
    async with sending(settings, pool):
        ends = {}
        for id, channel in (
            ("suppressed", "email"), ("unwanted", "sms"), ("late", "webhook"), ("called-back", "webhook"), ("gone", "push")
        ):  # fmt: skip
            ends[id] = (await eventually(over(broker, id, channel)))[channel]
    assert {id: (one.state, one.reason) for id, one in ends.items()} == {
        "suppressed": ("suppressed", "suppressed:hard_bounce"),
        "unwanted": ("suppressed", "user_off"),
        "late": ("expired", "expired"),
        "called-back": ("cancelled", "cancelled"),
        "gone": ("suppressed", "no_token"),
    }
    assert not any(log.messages() for log in providers.logs.values())


async def test_an_address_is_looked_at_for_what_suppresses_it_when_it_is_read(pool: Pool) -> None:
    await known(pool, USER, endpoint=False)
    targets, now = Targets(pool), datetime.now(UTC)
    for channel, address in (("email", EMAIL), ("sms", PHONE)):
        job = a_job(channel, "n1")
        assert (await targets.find(job, "parcels", now)).of_channel == address
        async with pool.acquire() as connection:
            for reason, scope in (("hard_bounce", "all"), ("opted_out", "parcels")):
                new = NewSuppression(channel=channel, address=address.upper(), reason=reason, scope=scope)
                await put_suppressions(connection, TENANT, [new])
        assert await targets.find(job, "parcels", now) == Nowhere("opted_out")
        assert await targets.find(job, "offers", now) == Nowhere("suppressed:hard_bounce")


async def test_a_kill_switch_holds_what_waits_until_it_is_restored_and_one_that_drops_ends_it(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "HELD_SECONDS", 0.2)
    held = Kill(channel="sms"), Kill(tenant=TENANT, channel="webhook")
    for one in (*held, Kill(provider="relay", mode="drop")):
        await ControlStore(broker).change(Asked(one, "ops", "outage"))
    async with sending(settings, pool):
        await add(broker, a_job("sms", "n1"), a_job("webhook", "n1"), a_job("email", "n1"), a_job("push", "n1"))
        found = await eventually(over(broker, "n1", "push/phone", "email"))
        assert (found["email"].state, found["email"].reason) == ("suppressed", "killed:provider=relay")
        assert not providers.accepted("sms")
        assert not providers.accepted("webhook")
        for one in held:
            await ControlStore(broker).change(Asked(one, "ops", "over", restore=True))
        await eventually(sent(broker, "n1", "sms", "webhook"))
    assert [len(providers.accepted(channel)) for channel in ("sms", "webhook")] == [1, 1]


async def test_without_a_token_the_channel_that_waits_to_see_whether_it_was_seen_waits_no_more(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    rule = TypeRule(
        pattern="parcel.*",
        channels={"push": ChannelRule(), "sms": ChannelRule(), "email": ChannelRule(unless_seen_seconds=600)},
    )
    async with changing(pool, TENANT) as change:
        await put_type(change, rule)
        await put_template(change, TemplateKey("parcel.*", "email", "default"), {"subject": "News", "body": "Shipped"})
    async with Directory(pool).changing(TENANT, [USER]) as of_user:
        assert await remove_token(of_user, USER, "phone")
    due = datetime.now(UTC) + timedelta(seconds=2)
    waits = a_job("email", "n1", stage="escalation", first_at=due, requested=False)
    async with sending(settings, pool):
        await JobsQueue(broker).schedule(waits, due)
        await add(broker, a_job("push", "n1", requested=False))
        await eventually(sent(broker, "n1", "email"))
        # The one that was scheduled fires, too, and finds that there is nothing left to do.
        await eventually(lambda: _nothing_waits(broker))
    assert len(providers.accepted("email")) == 1
    assert providers.accepted("sms") == []


async def _nothing_waits(broker: Broker) -> bool:
    return (await broker.stream("JOBS")).messages == 1  # the mark of the planner


async def test_a_cap_counts_notifications_and_what_is_beyond_it_waits(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    async with changing(pool, TENANT) as change:
        rule = TypeRule(pattern="parcel.*", channels={"sms": ChannelRule(cap=Cap(2, 3600))})
        await put_type(change, rule)
    async with sending(settings, pool, ["sms"]):
        await add(broker, *(a_job("sms", f"n{number}") for number in range(6)))
        await eventually(lambda: len(providers.accepted("sms")) == 2 and _put_back(broker, 4))
        await add(broker, a_job("sms", "urgent", lane="critical"))
        await eventually(sent(broker, "urgent", "sms"))
    assert len(providers.accepted("sms")) == 3


async def _put_back(broker: Broker, count: int) -> bool:
    return len(await whole_stream(broker, "JOBS", "jobsched.>")) == count


async def test_a_mail_is_in_the_users_language_and_its_link_is_left_out_where_it_is_critical(
    broker: Broker, settings: Settings, pool: Pool, providers: Simulated
) -> None:
    async with changing(pool, TENANT) as change:
        for locale, subject in (("default", "Shipped: {{ data.text }}"), ("de", "Versandt: {{ data.text }}")):
            parts = {"subject": subject, "body": "{{ data.text }}"}
            await put_template(change, TemplateKey("parcel.*", "email", locale), parts)
    async with Directory(pool).changing(TENANT, [USER]) as of_user:
        await patch_preferences(of_user, USER, {"locale": "de-AT"})
    async with sending(settings, pool, ["email"]):
        await add(broker, a_job("email", "n1", lane="critical"))
        await eventually(sent(broker, "n1", "email"))
    [mail] = providers.accepted("email")
    assert mail.shown["subject"] == "Versandt: It is on its way"
    assert "List-Unsubscribe" not in mail.shown["headers"]


async def test_a_notification_that_is_followed_has_a_span_of_each_try_which_says_whose_and_how_it_ended(
    broker: Broker,
    settings: Settings,
    pool: Pool,
    providers: Simulated,
    at_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    providers.push.production.faults.script([Answers(status=503, code="ServiceUnavailable")])
    exporter = InMemorySpanExporter()
    hops = HopSpans(Resource({}), SimpleSpanProcessor(exporter).on_end)
    monkeypatch.setattr(spans, "_active", spans.Spans(hops, one_in=100, follow_seconds=300))
    async with sending(settings, pool, ["push"]):
        await add(broker, a_job("push", "n1", trace=PARENT))
        await eventually(sent(broker, "n1", "push"))
    first, second = (span for span in exporter.get_finished_spans() if span.name == names.ATTEMPT.title)
    assert {f"{span.parent.span_id:x}" for span in (first, second)} == {"b7ad6b7169203331"}
    said = [
        tuple(span.attributes[name] for name in (names.CHANNEL, names.PROVIDER, names.OUTCOME, names.ATTEMPT_NUMBER))
        for span in (first, second)
    ]
    assert said == [("push", "apple", "transient", 1), ("push", "apple", "ok", 2)]
    assert first.attributes[names.ERROR] == "transient"
    assert not any(DEVICE in str(value) for span in (first, second) for value in span.attributes.values())
