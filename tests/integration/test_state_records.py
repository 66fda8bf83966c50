"""Read and archive records of users: how much of them a log takes, and that a burst of them is one record."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from engine.topology import server as topology
from gateway.access.allowances import Allowance, Allowances, tenant_allowance, user_allowance
from gateway.limits import STATE_PAUSE_SECONDS, STATE_RECORD_BYTES_MAX
from ops.dev.servers import NatsServer, Valkey
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually, redis_at
from tests.support.tokens import bearer

IDS = [f"{number:05d}-{'x' * 120}" for number in range(500)]
"""500 ids of 126 characters: the largest read there can be, 64 KiB."""


async def mark(
    gateway: TestGateway, user: str = "alice", path: str = "read", **body: Any
) -> tuple[int, dict[str, Any]]:
    """Answer of `POST /v1/inbox/read` (or archive)."""
    async with gateway.http.post(
        f"{gateway.url}/v1/inbox/{path}", json={"device": "tab", **body}, headers=bearer(user=user)
    ) as response:
        answer: dict[str, Any] = await response.json(content_type=None)
        return response.status, {**answer, "retry_after": response.headers.get("Retry-After")}


async def records(gateway: TestGateway, user: str = "alice") -> list[dict[str, Any]]:
    """What a user's log holds."""
    page = await gateway.broker.next_by_subject(gateway.stream(user), gateway.subject(user), 1, timeout_seconds=20)
    return [json.loads(record.payload) for record in page.records]


@asynccontextmanager
async def small_allowances(monkeypatch: pytest.MonkeyPatch, bytes_at_once: int) -> AsyncIterator[None]:
    monkeypatch.setattr("gateway.access.allowances.STATE_BURST_BYTES", bytes_at_once)
    monkeypatch.setattr("gateway.access.allowances.STATE_BYTES_PER_DAY", bytes_at_once)
    yield


@pytest.fixture
def heard_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Redis counts is waited for, however busy the machine is: for tests in which gateways must count together."""
    monkeypatch.setattr("gateway.access.shared_buckets.REDIS_SECONDS", 20.0)


def records_max(seconds: float) -> int:
    """How many records one device can have had stored in this time: between two of them is a pause."""
    return 1 + int(seconds / STATE_PAUSE_SECONDS)


@pytest.mark.usefixtures("heard_redis")
async def test_a_user_cannot_fill_the_log_through_any_number_of_gateways_and_carriers(
    nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 200_000  # three of the largest records
    async with (
        small_allowances(monkeypatch, limit),
        gateway_on(nats_server, redis_url=valkey.url) as first,
        gateway_on(nats_server, redis_url=valkey.url, topology_ready=True) as second,
        second.device(name="phone") as phone,
    ):
        await phone.until("live")
        statuses = []
        for number in range(6):
            gateway = (first, second)[number % 2]
            status, answer = await mark(gateway, ids=IDS, path=("read", "archive")[number // 2 % 2])
            statuses.append(status)
        assert statuses == [202, 202, 202, 429, 429, 429]
        assert answer["type"] == "urn:seamark:problem:too_many_reads"
        assert "up_to" in answer["detail"]
        assert int(answer["retry_after"]) > 60
        await phone.say("read", ids=IDS[:300])
        assert (await phone.until("error"))["code"] == "too_many_reads"
        stored = sum(len(json.dumps(record)) for record in await records(first))
        assert stored < limit + 20_000
        assert (await mark(first, user="bob", ids=["r0"]))[0] == 202


@pytest.mark.usefixtures("heard_redis")
async def test_the_users_of_one_tenant_cannot_fill_a_log_together(nats_server: NatsServer, valkey: Valkey) -> None:
    async with redis_at(valkey.url) as redis:
        share = Allowance(1_000, 0.001)
        gateways = [Allowances(redis, user_allowance(), [share]) for _ in range(2)]
        refusals = [await gateways[number % 2].take("acme", f"user{number}", 0, 100) for number in range(14)]
        assert [refusal is None for refusal in refusals] == [True] * 10 + [False] * 4
        assert {refusal.whose for refusal in refusals[10:] if refusal} == {"tenant"}
        assert await gateways[0].take("other", "user0", 0, 100) is None
        # Nobody was charged for what was refused: the first user has its own allowance still.
        assert await gateways[0].take("acme", "user0", 0, 1) is not None


async def test_while_redis_is_away_each_gateway_holds_the_bound_by_itself(valkey: Valkey) -> None:
    async with Redis.from_url(valkey.url, socket_connect_timeout=0.2) as redis:
        allowances = Allowances(redis, Allowance(1_000, 0.001), [Allowance(1e6, 1)])
        assert await allowances.take("acme", "alice", 0, 400) is None
        valkey.kill()
        async with asyncio.timeout(20):
            assert await allowances.take("acme", "alice", 0, 400) is None
            refusal = await allowances.take("acme", "alice", 0, 400)
        assert refusal is not None
        assert refusal.whose == "user"
        assert refusal.wait_seconds == pytest.approx(200 / 0.001, rel=0.01)


async def test_requests_that_come_while_redis_is_silent_are_granted_no_more_together_than_one_by_one(
    valkey: Valkey,
) -> None:
    async with Redis.from_url(valkey.url, socket_timeout=None) as redis:
        allowances = Allowances(redis, Allowance(1_000, 0.001), [Allowance(1_500, 0.001)])
        assert await allowances.take("acme", "alice", 0, 100) is None
        valkey.suspend()
        try:
            many = await asyncio.gather(*(allowances.take("acme", "alice", 0, 100) for _ in range(50)))
            others = await asyncio.gather(*(allowances.take("acme", f"u{n}", 0, 100) for n in range(50)))
        finally:
            valkey.resume()
    assert [refusal.whose for refusal in many if refusal is not None] == ["user"] * 41
    assert [refusal.whose for refusal in others if refusal is not None] == ["tenant"] * 45


@pytest.mark.usefixtures("heard_redis")
async def test_what_redis_refuses_is_not_counted_by_the_process_either(valkey: Valkey) -> None:
    async with Redis.from_url(valkey.url, socket_timeout=None) as redis:
        one, two = (Allowances(redis, Allowance(1_000, 0.001), [Allowance(1e6, 1)]) for _ in range(2))
        assert await one.take("acme", "alice", 0, 900) is None
        assert (await two.take("acme", "alice", 0, 900)) is not None
        await redis.flushall()
        assert await two.take("acme", "alice", 0, 900) is None


@pytest.mark.usefixtures("heard_redis")
async def test_after_a_silence_of_redis_gateways_count_together_again(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.access.shared_buckets.PAUSE_SECONDS", 0.0)
    async with Redis.from_url(valkey.url, socket_timeout=None) as redis:
        one, two = (Allowances(redis, Allowance(1_000, 0.001), [Allowance(1e6, 1)]) for _ in range(2))
        assert await one.take("acme", "alice", 0, 300) is None
        valkey.suspend()
        try:
            with monkeypatch.context() as patch:
                patch.setattr("gateway.access.shared_buckets.REDIS_SECONDS", 0.1)
                for _ in range(3):
                    assert await one.take("acme", "bob", 0, 10) is None
        finally:
            valkey.resume()
        assert await one.take("acme", "alice", 0, 100) is None
        refusal = await two.take("acme", "alice", 0, 601)
        assert refusal is not None
        assert refusal.whose == "user"
        assert await two.take("acme", "alice", 0, 599) is None


async def test_a_silent_redis_holds_a_read_up_for_a_moment_only(
    nats_server: NatsServer, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.access.shared_buckets.PAUSE_SECONDS", 0.0)  # each of these reads asks Redis
    async with gateway_on(nats_server, redis_url=valkey.url) as gateway:
        assert (await mark(gateway, ids=["r0"]))[0] == 202
        valkey.suspend()
        try:
            took = []
            for number in range(4):
                began = time.monotonic()
                async with asyncio.timeout(20):
                    assert (await mark(gateway, user=f"u{number}", ids=["r1"]))[0] == 202
                took.append(time.monotonic() - began)
            assert min(took) < 3, "the machine may be slow for one of them, not for all"
        finally:
            valkey.resume()


async def test_no_share_of_a_log_is_smaller_than_a_record_nor_larger_than_said(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        log = await gateway.broker.stream(gateway.stream())
        max_bytes, age_seconds = log.config["max_bytes"], log.config["max_age"] / 1e9
        share = tenant_allowance(log, 25)
        assert share.burst_bytes + share.bytes_per_second * age_seconds <= max_bytes * 0.25 * 1.001
        log.config.update(max_bytes=10_000)
        assert tenant_allowance(log, 25).burst_bytes == STATE_RECORD_BYTES_MAX
        log.config.update(max_bytes=-1, max_age=0)
        assert tenant_allowance(log, 25).bytes_per_second > 0


async def test_what_a_device_marks_within_a_moment_is_one_record(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        seqs = await gateway.append(count=40)
        sent = await device.records(40)
        began = time.monotonic()
        for number in range(40):
            await device.say("read", ids=[f"r{number}"])
        found: set[str] = set()

        async def all_stored() -> bool:
            for record in await records(gateway):
                found.update(record.get("ids", []) if record["kind"] == "read" else [])
            return len(found) == 40

        await eventually(all_stored)
        marks = [record for record in await records(gateway) if record["kind"] == "read"]
        assert len(marks) <= records_max(time.monotonic() - began)
        assert all(record["device"] == "phone" for record in marks)
        for frame in (sent[10], sent[30], sent[20]):
            await device.say("read", up_to=frame["cursor"])

        async def reached() -> bool:
            return max(record.get("up_to") or 0 for record in await records(gateway)) == seqs[30]

        await eventually(reached)


async def test_requests_that_went_into_one_record_are_all_told_its_id(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        began = time.monotonic()
        answers = await asyncio.gather(*(mark(gateway, ids=[f"r{number}"]) for number in range(20)))
        assert {status for status, _ in answers} == {202}
        stored = {record["id"]: record for record in await records(gateway)}
        assert len(stored) <= records_max(time.monotonic() - began)
        assert {answer["id"] for _, answer in answers} == set(stored)
        assert {id for record in stored.values() for id in record["ids"]} == {f"r{number}" for number in range(20)}
        # A read is no archive, and a position no id: each has a record of its own.
        await asyncio.gather(
            mark(gateway, ids=["r0"]), mark(gateway, path="archive", ids=["r0"]), mark(gateway, all=True)
        )
        kinds = [(record["kind"], "up_to" in record) for record in await records(gateway)][len(stored) :]
        assert sorted(kinds) == [("archive", False), ("read", False), ("read", True)]


@pytest.mark.parametrize("id", ["", "a b", "é", "x" * 129, "a\nb", "\0"])
async def test_a_read_with_an_invalid_id_is_refused_and_not_stored(nats_server: NatsServer, id: str) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        status, answer = await mark(gateway, ids=["r0", id])
        assert (status, answer["field"]) == (400, "ids")
        assert "128" in answer["detail"]
        await device.say("read", ids=[id])
        assert (await device.closed())[0] == 4400
        assert await records(gateway) == []


async def test_a_device_whose_reads_wait_for_the_broker_is_told_so_and_the_others_are_stored_later(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.session.state_records.STATE_REQUESTS_WAITING", 5)
    monkeypatch.setattr("gateway.session.state_records.STATE_BUDGET_SECONDS", 60.0)  # none is given up meanwhile
    async with gateway_on(nats_server) as gateway:

        def ask(number: int) -> asyncio.Task[tuple[int, dict[str, Any]]]:
            return asyncio.create_task(mark(gateway, ids=[f"r{number}"]), name=f"mark-{number}")

        nats_server.suspend()
        try:
            asked = [ask(0)]
            lines = gateway.context.state_records._lines
            await eventually(lambda: lines and not any(line.requests for line in lines.values()))  # it is under way
            asked += [ask(number) for number in range(1, 9)]
            await eventually(lambda: sum(task.done() for task in asked) == 3)
            assert [task.result()[0] for task in asked if task.done()] == [429] * 3
        finally:
            nats_server.resume()
        statuses = [(await task)[0] for task in asked]
        assert sorted(statuses) == [202] * 6 + [429] * 3  # one was under way, and five waited


@pytest.mark.parametrize("carrier", ["http", "ws"])
async def test_a_position_that_waits_to_be_stored_while_its_log_is_made_anew_is_refused_and_marks_nothing_in_the_new_one(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, carrier: str
) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        seqs = await gateway.append(count=5)
        cursor = (await device.records(5))[-1]["cursor"]
        state_records = gateway.context.state_records
        waits, goes_on, take = asyncio.Event(), asyncio.Event(), state_records._allowances.take

        async def slow(*args: Any) -> Any:
            waits.set()
            await goes_on.wait()
            return await take(*args)

        monkeypatch.setattr(state_records._allowances, "take", slow)
        if carrier == "http":
            asked = asyncio.create_task(mark(gateway, up_to=cursor), name="read")
        else:
            await device.say("read", up_to=cursor)
        await waits.wait()
        await gateway.broker.api(f"STREAM.DELETE.{gateway.stream()}", {})
        await topology.ensure(gateway.broker, "dev")
        assert await gateway.append(count=3) == seqs[:3]
        goes_on.set()
        if carrier == "http":
            status, answer = await asked
            assert (status, answer["type"]) == (409, "urn:seamark:problem:stale_cursor")
        else:
            assert (await device.until("error"))["code"] == "stale_cursor"
        assert [record["kind"] for record in await records(gateway)] == ["notification"] * 3
        assert (await mark(gateway, all=True))[0] == 202
        assert [record["kind"] for record in await records(gateway)] == ["notification"] * 3 + ["read"]
