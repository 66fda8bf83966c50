"""One notification is followed through every process: what an OTLP receiver gets from real roles and a real application."""

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.broker.jetstream import Broker
from engine.directory.changes import changing
from engine.directory.changing import Directory
from engine.directory.templates import TemplateKey, put_template
from engine.postgres import Pool
from engine.topology import server as topology
from engine.traces.names import ATTRIBUTES
from ops.dev.providers.faults import Answers
from ops.dev.servers import NatsServer, Valkey
from ops.dev.spans import Span
from tests.support.logs import FAST, all_records, connected, eventually
from tests.support.planning import PlannerProcess
from tests.support.projections import ProjectorProcess
from tests.support.roles import METRICS_SECONDS, DispatcherProcess, GatewayRole, RoleProcess
from tests.support.sending import TENANT, UNSUBSCRIBE_SECRET, Simulated, StoresRole, reached, settings_of, simulated
from tests.support.spine import API_KEY, _add_api_key
from tests.support.tokens import token
from tests.support.traces import Traces, app, collected, logs, only

EVENT = "events.{tenant}.{key}.{type}"
LOG = "log.{partition}.{tenant}.{user}"
RECEIPT = "rcpt.{partition}.{tenant}.{user}"
JOB = "job.{channel}.{lane}.{tenant}.{user}"

PHONE, DEVICE = "+4915112345678", "ca" * 32
CANARIES = (
    "alice-canary", "canary@example.com", PHONE.removeprefix("+"), DEVICE, "secret-body-canary", "event-id-canary",
    "template-canary",
)  # fmt: skip

POSTED_TO = "https://notify.example.com/v1/providers/twilio/callbacks"
REPORTS = f"""
[callbacks.twilio]
kind = "twilio"
url = "{POSTED_TO}"
token_files = ["twilio.secret"]
tenants = ["{TENANT}"]
"""


@dataclass
class Stack:
    """All roles at work, each a process that exports its spans."""

    traces: Traces
    broker: Broker
    nats_url: str
    gateway: GatewayRole
    roles: list[RoleProcess]
    folder: Path


@pytest.fixture
async def providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Simulated]:
    """Simulated providers. The gateway of a stack that is made after them takes their reports, and knows the links in mails."""
    async with simulated(tmp_path / "providers") as found:
        with found.file.open("a") as file:
            file.write(REPORTS)
        for name, value in {
            "SEAMARK_PROVIDERS": str(found.file),
            "SEAMARK_PUBLIC_URL": "https://notify.example.com",
            "SEAMARK_UNSUBSCRIBE_SECRETS": UNSUBSCRIBE_SECRET,
        }.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
async def stack(
    nats_server: NatsServer,
    valkey: Valkey,
    postgres: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Stack]:
    await _add_api_key(postgres)
    async with collected() as traces, connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        for name, value in {
            "SEAMARK_TRACES_ENDPOINT": traces.url,
            "SEAMARK_REDIS_URL": valkey.url,
            "SEAMARK_POSTGRES_URL": postgres,
            "SEAMARK_PROFILE": "dev",
            "SEAMARK_TRACE_ONE_IN": "1000000000",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }.items():
            monkeypatch.setenv(name, value)
        gateway = GatewayRole("gateway", tmp_path, nats_server.url)
        roles: list[RoleProcess] = [
            DispatcherProcess("dispatcher", tmp_path, nats_server.url, valkey.url),
            ProjectorProcess("projector", tmp_path, nats_server.url, valkey.url),
            PlannerProcess("planner", tmp_path, nats_server.url, valkey.url, postgres),
            gateway,
        ]
        try:
            for role in roles:
                role.spawn()
            for role in roles:
                await asyncio.to_thread(role._child.wait_until, lambda role=role: role.ready)
            yield Stack(traces, broker, nats_server.url, gateway, roles, tmp_path)
        finally:
            for role in roles:
                role.kill()


def follower(
    stack: Stack, records: int, cursor: str | None = "start", user: str = "alice-canary", **more: Any
) -> dict[str, Any]:
    follow = {"url": stack.gateway.url, "token": token(user), "device": "phone", "records": records, "cursor": cursor}
    return {"traces": stack.traces.url, "service": "app", "follow": {**follow, "read": False, **more}}


def publisher(stack: Stack, *events: dict[str, Any], inside: bool = True, **more: Any) -> dict[str, Any]:
    way = {"nats_url": stack.nats_url} if inside else {"gateway_url": stack.gateway.url, "api_key": API_KEY}
    return {"traces": stack.traces.url, "service": "shop", "publish": {"way": way, "events": list(events)}, **more}


def order(**more: Any) -> dict[str, Any]:
    return {"to": ["alice-canary"], "type": "order.shipped", **more}


@pytest.mark.timeout(240)
async def test_one_trace_leads_from_the_publisher_to_the_acknowledgement_and_on_to_the_read_mark(stack: Stack) -> None:
    event = order(
        id="event-id-canary", data={"text": "secret-body-canary", "to": ["canary@example.com", "+4915112345678"]}
    )
    async with app(**follower(stack, 1, read=True)) as device:
        await device.line()
        async with app(**publisher(stack, event, inside=False)) as shop:
            trace_id = (await shop.line())["trace_id"]
        assert (await device.line())["id"] == "event-id-canary"
    found = await stack.traces.until(
        trace_id,
        ["order", f"publish {EVENT}", "POST /v1/events", f"accept {EVENT}", f"dispatch {EVENT}", f"append {LOG}",
         f"dispatch round {EVENT}", f"deliver {LOG}", f"ack {LOG}", f"read {LOG}", f"process {LOG}", f"plan {LOG}",
         f"receipt {RECEIPT}", f"fold {LOG}", f"fold {RECEIPT}"],
    )  # fmt: skip

    def come(name: str) -> set[tuple[str, str, str]]:
        """Who has sent spans of this name, and what they belong to."""
        group = "messaging.consumer.group.name"
        found = [span for span in stack.traces.spans(trace_id) if span.name == name]
        return {(span.service, span.attributes.get(group, "").partition("-")[0], span.parent_id) for span in found}

    # Each process sends its spans when it likes. The record and the read mark are planned, and folded twice; two store receipts.
    await eventually(lambda: len({service for service, _, _ in come(f"receipt {RECEIPT}")}) == 2, seconds=30)
    await eventually(lambda: len(come(f"plan {LOG}")) == 2 and len(come(f"fold {LOG}")) == 4, seconds=30)
    found = stack.traces.spans(trace_id)
    inside = [span for span in found if span.trace_id == trace_id]

    def one(name: str, service: str, **attributes: str) -> Span:
        return only(inside, lambda span: span.name == name and span.service == service
                    and attributes.items() <= span.attributes.items())  # fmt: skip

    order_, published = one("order", "shop"), one(f"publish {EVENT}", "shop")
    request, accepted = one("POST /v1/events", "seamark-gateway"), one(f"accept {EVENT}", "seamark-gateway")
    dispatched, appended = one(f"dispatch {EVENT}", "seamark-dispatcher"), one(f"append {LOG}", "seamark-dispatcher")
    delivered = next(span for span in inside if span.name == f"deliver {LOG}")
    acked = next(span for span in inside if span.name == f"ack {LOG}")
    read = one(f"read {LOG}", "seamark-gateway")
    parents = [
        (order_, ""), (published, order_.span_id), (request, published.span_id), (accepted, request.span_id),
        (dispatched, accepted.span_id), (appended, dispatched.span_id), (delivered, accepted.span_id),
        (acked, delivered.span_id), (read, delivered.span_id),
    ]  # fmt: skip
    assert [(span.name, span.parent_id) for span, _ in parents] == [(span.name, parent) for span, parent in parents]
    assert {span.parent_id for span in inside if span.name == f"plan {LOG}"} == {accepted.span_id, read.span_id}
    folds = {
        (span.attributes["messaging.consumer.group.name"].partition("-")[0], span.parent_id)
        for span in inside
        if span.name == f"fold {LOG}"
    }
    assert folds >= {("unread", accepted.span_id), ("inbox", accepted.span_id)}
    receipts = {span.parent_id for span in inside if span.name == f"receipt {RECEIPT}"}
    assert accepted.span_id in receipts, "the planner's"
    assert receipts & {span.span_id for span in inside if span.name == f"deliver {LOG}"}, "the gateway's"
    assert {span.kind for span in (published, accepted, appended, read)} == {"producer"}
    assert (request.kind, acked.kind, dispatched.kind, delivered.kind) == ("server", "client", "consumer", "consumer")
    assert (appended.attributes["messaging.batch.message_count"], dispatched.attributes["seamark.outcome"]) == (
        1,
        "appended",
    )
    # The round is a trace of its own; both sides name each other.
    batch = only(found, lambda span: span.name == f"dispatch round {EVENT}")
    assert (batch.trace_id == trace_id, batch.parent_id) == (False, "")
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(trace_id, accepted.span_id)]
    assert [(link.trace_id, link.span_id) for link in dispatched.links] == [(batch.trace_id, batch.span_id)]
    # Traces, logs and metrics name the process in one way.
    [starting] = stack.gateway.said("role_starting")
    assert {request.instance, accepted.instance, delivered.instance} == {starting["instance"]}
    assert request.service == starting["service"]
    said = {
        "service_name": request.service,
        "service_instance_id": request.instance,
        "service_version": starting["version"],
    }
    assert stack.gateway.metric("target_info", **said) == 1
    check_nothing_private(stack)


@pytest.mark.timeout(240)
async def test_one_trace_leads_through_a_push_that_is_tried_twice_and_no_channel_tells_anything_private(
    providers: Simulated, stack: Stack, pool: Pool, valkey: Valkey, postgres: str
) -> None:
    async with Directory(pool).changing(TENANT, ["alice-canary"]) as of_user:
        await reached(of_user, "alice-canary", device=DEVICE, phone=PHONE)
    async with changing(pool, TENANT) as change:
        parts = {"subject": "template-canary {{ data.title }}", "body": "template-canary {{ data.text }}"}
        await put_template(change, TemplateKey("order.*", "email", "default"), parts)
    providers.push.production.faults.script([
        Answers(status=503, code="ServiceUnavailable", headers={"Retry-After": "0"})
    ])  # fmt: skip
    worker = StoresRole(
        "worker", "worker", stack.folder, settings_of(stack.nats_url, valkey.url, postgres, providers.file)
    )
    stack.roles.append(worker)
    worker.spawn()
    event = order(
        id="event-id-canary",
        channels=["push", "email"],
        data={"title": "secret-body-canary", "text": "secret-body-canary"},
    )
    async with app(**publisher(stack, event, inside=False)) as shop:
        trace_id = (await shop.line())["trace_id"]

    def of(name: str, service: str = "seamark-worker") -> list[Span]:
        return [one for one in stack.traces.spans(trace_id) if (one.name, one.service) == (name, service)]

    def tries(channel: str) -> list[Span]:
        found = [one for one in of(f"attempt {JOB}") if one.attributes["seamark.channel"] == channel]
        return sorted(found, key=lambda one: one.start)

    await stack.traces.until(
        trace_id,
        [f"publish {EVENT}", "POST /v1/events", f"accept {EVENT}", f"dispatch {EVENT}", f"append {LOG}", f"plan {LOG}",
         f"job {JOB}"],
    )  # fmt: skip
    # Of the push that it was split, that it waits, that it was sent; of the mail that it was sent.
    await eventually(
        lambda: len(tries("push")) == 2 and tries("email") and len(of(f"receipt {RECEIPT}")) >= 4, seconds=30
    )
    [published], [accepted] = of(f"publish {EVENT}", "shop"), of(f"accept {EVENT}", "seamark-gateway")
    [dispatched], [appended] = of(f"dispatch {EVENT}", "seamark-dispatcher"), of(f"append {LOG}", "seamark-dispatcher")
    [planned], [handed_out] = of(f"plan {LOG}", "seamark-planner"), of(f"job {JOB}", "seamark-planner")
    (first, second), [mailed] = tries("push"), tries("email")
    receipts = of(f"receipt {RECEIPT}")
    [request] = of("POST /v1/events", "seamark-gateway")
    assert request.parent_id == published.span_id
    assert (accepted.parent_id, dispatched.parent_id) == (request.span_id, accepted.span_id)
    assert appended.parent_id == dispatched.span_id
    # All that is done with the record is about what made it, so nothing has to be written anew into each job.
    followed = [planned, handed_out, first, second, mailed, *receipts, *of(f"receipt {RECEIPT}", "seamark-planner")]
    assert {one.parent_id for one in followed} == {accepted.span_id}
    assert [link for one in followed for link in one.links] == [], "what is fresh is no link"
    assert {(one.kind, one.failed) for one in (first, second, mailed)} == {("client", True), ("client", False)}
    assert (handed_out.kind, handed_out.attributes["messaging.batch.message_count"]) == ("producer", 2)
    names = "seamark.provider", "seamark.outcome", "seamark.attempt"
    assert [[one.attributes[name] for name in names] for one in (first, second, mailed)] == [
        ["apple", "transient", 1], ["apple", "ok", 2], ["relay", "ok", 1]
    ]  # fmt: skip
    assert (
        planned.start <= handed_out.start <= first.start < first.end <= second.start < max(one.end for one in receipts)
    )

    [mail] = providers.accepted("email")
    assert mail.shown["subject"] == "template-canary secret-body-canary"
    link = re.search(r"(/u/[^>]+)>", mail.shown["headers"]["List-Unsubscribe"])
    assert link is not None
    context = f"00-{'7' * 32}-{'1' * 16}-01"
    async with aiohttp.ClientSession(stack.gateway.url, headers={"traceparent": context}) as http:
        async with http.get(link[1]) as answer:
            assert answer.status == 200
        async with http.post(link[1], data={"List-Unsubscribe": "One-Click"}) as answer:
            assert answer.status == 200
        form = {"Body": "STOP", "From": PHONE, "MessageSid": "SM1", "SmsStatus": "received", "To": "+15005550006"}
        text = POSTED_TO + "".join(name + form[name] for name in sorted(form))
        signature = hmac.new(providers.texts.secret.encode(), text.encode(), hashlib.sha1).digest()
        headers = {"X-Twilio-Signature": base64.b64encode(signature).decode()}
        async with http.post("/v1/providers/twilio/callbacks", data=form, headers=headers) as answer:
            assert answer.status == 200
    await stack.traces.until("7" * 32, ["GET /u/{token}", "POST /u/{token}", "POST /v1/providers/{name}/callbacks"])
    check_nothing_private(stack, link[1].removeprefix("/u/"), providers.texts.secret, UNSUBSCRIBE_SECRET)


@pytest.mark.timeout(240)
async def test_who_begins_decides_who_is_followed_and_what_is_old_is_linked(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces, broker = stack.traces, stack.broker
    users = [f"user-{number}" for number in range(1000)]
    unsampled = publisher(stack, order(id="unsampled"), sampled=False)
    async with app(**unsampled) as silent, app(**publisher(stack, order(id="all", to=users), order(id="old"))) as shop:
        not_followed = (await silent.line())["trace_id"]
        of_many, of_old = [(await shop.line())["trace_id"] for _ in range(2)]
    # A plain message without a context: nobody has decided, and it is critical.
    await broker.append(
        "events.default.alice-canary.order.shipped", b'{"id":"plain","to":["alice-canary"],"priority":"critical"}'
    )
    await broker.append(
        "events.default.alice-canary.order.shipped", b'{"id":"nobody","to":["secret-body-canary"],"tenant":1}'
    )

    found = await traces.until(of_many, [f"dispatch {EVENT}", f"append {LOG}", f"plan {LOG}", f"fold {LOG}"])
    dispatched = only(found, lambda span: span.name == f"dispatch {EVENT}")
    appends = [span for span in found if span.name == f"append {LOG}"]
    assert {span.parent_id for span in appends} == {dispatched.span_id}
    assert sum(span.attributes["messaging.batch.message_count"] for span in appends) == len(users)
    entries = {entry.record["user"]: entry for entry in await all_records(broker, 4) if entry.record["id"] == "all"}
    assert len(entries) == len(users)
    followed = {user for user, entry in entries.items() if int(entry.record["trace"][-2:], 16) & 1}
    assert len(followed) == 16
    assert {entry.record["trace"].split("-")[1] for entry in entries.values()} == {of_many}
    for entry in entries.values():
        assert f"traceparent: {entry.record['trace']}\r\n".encode() in entry.stored.headers

    [plain] = [entry for entry in await all_records(broker, 4) if entry.record["id"] == "plain"]
    _, first, began, _ = plain.record["trace"].split("-")
    found = await traces.until(first, [f"dispatch {EVENT}", f"append {LOG}"])
    dispatched = only(found, lambda span: span.name == f"dispatch {EVENT}")
    assert (dispatched.span_id, dispatched.parent_id, dispatched.attributes["seamark.priority"]) == (
        began,
        "",
        "critical",
    )

    def dead() -> list[Span]:
        return [span for span in traces.all() if span.attributes.get("error.type") == "schema"]

    await eventually(dead, seconds=20)
    [letter] = dead()
    assert (letter.name, letter.failed, letter.attributes["seamark.outcome"]) == (f"dispatch {EVENT}", True, "dead")

    await traces.until(of_old, [f"append {LOG}"])
    [old] = [entry for entry in await all_records(broker, 4) if entry.record["id"] == "old"]
    monkeypatch.setenv("SEAMARK_TRACE_FOLLOW_SECONDS", "1")
    late = GatewayRole("late", stack.folder, stack.nats_url)
    try:
        late.spawn()
        await asyncio.to_thread(late._child.wait_until, lambda: late.ready)
        stored_at = datetime.fromisoformat(old.stored.time).timestamp()
        await eventually(lambda: time.time() - stored_at > 1.5, seconds=20)
        stack.gateway = late
        async with app(**follower(stack, 3)) as device:  # what is not followed comes with it
            for _ in range(4):
                await device.line()

        def delivered() -> list[Span]:
            return [span for span in traces.spans(of_old) if span.name == f"deliver {LOG}"]

        await eventually(delivered, seconds=20)
        [delivery] = delivered()
        resumed = await traces.until(delivery.trace_id, [f"resume {LOG}"])
        resume = only(resumed, lambda span: span.name == f"resume {LOG}")
        assert delivery.trace_id != of_old
        assert (delivery.parent_id, resume.parent_id) == (resume.span_id, "")
        assert [link.trace_id for link in delivery.links] == [of_old]
        assert resume.attributes["seamark.outcome"] == "resumed"
        assert resume.start <= delivery.start <= delivery.end <= resume.end
    finally:
        late.kill()
    assert traces.spans(not_followed) == []
    check_nothing_private(stack)


def check_nothing_private(stack: Stack, *more: str) -> None:
    """Spans, logs and metrics hold no user, address, text or token; spans say no more than the list allows."""
    ours = [span for span in stack.traces.all() if span.service.startswith("seamark-")]
    assert {name for span in ours for name in span.attributes} <= ATTRIBUTES
    metrics = [role._get("/metrics", METRICS_SECONDS) for role in stack.roles]
    assert None not in metrics
    assert stack.traces.bodies != []
    said = repr(stack.traces.bodies) + repr(stack.traces.all()) + logs(stack.folder) + repr(metrics)
    secrets = (*CANARIES, token("alice-canary")[:40], API_KEY, *more)
    assert [canary for canary in secrets if canary in said] == []
