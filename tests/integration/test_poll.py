"""Polling, and reads marked by request, on a real nats-server."""

import asyncio
from typing import Any

import pytest

from engine.traces import names
from engine.traces import spans as all_spans
from gateway.join.port import State
from ops.dev.servers import NatsServer
from tests.support.gateways import TestGateway, gateway_on
from tests.support.logs import eventually
from tests.support.spans import PARENT, Collected
from tests.support.tokens import bearer


async def poll(gateway: TestGateway, cursor: str | None = "start", **query: Any) -> dict[str, Any]:
    params = {"device": "watch", **{name: str(value) for name, value in query.items()}}
    if cursor is not None:
        params["cursor"] = cursor
    async with gateway.http.get(f"{gateway.url}/v1/records", params=params, headers=bearer()) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def test_polls_page_through_the_log_and_say_when_it_is_exhausted(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        seqs = await gateway.append(count=7)
        got, cursor, answers = [], "start", []
        while True:
            answer = await poll(gateway, cursor, limit=3)
            got += [frame["seq"] for frame in answer["records"]]
            cursor = answer["cursor"]
            answers.append(answer["live"])
            if answer["live"]:
                break
        assert got == seqs
        assert answers[0] is False
        assert len(answers) <= 4
        nothing = {"after": cursor, "cursor": cursor, "live": True, "reset": None, "records": []}
        assert await poll(gateway, cursor) == nothing
        assert not len(gateway.context.sessions)


async def test_a_poll_waits_for_the_next_record_as_long_as_it_was_told(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        cursor = (await poll(gateway))["cursor"]
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert (await poll(gateway, cursor, wait=0.5))["records"] == []
        assert 0.4 < loop.time() - began < 19
        waiting = asyncio.create_task(poll(gateway, cursor, wait=20), name="poll")
        await eventually(lambda: len(gateway.context.sessions) == 1)
        await gateway.append()
        assert len((await waiting)["records"]) == 1


async def test_the_first_record_of_a_poll_follows_upon_the_cursor_that_was_asked_with(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        other = next(user for user in map(str, range(100)) if gateway.partition(user) == gateway.partition())
        first = (await gateway.append())[0]
        cursor = (await poll(gateway))["cursor"]
        await gateway.append(other, count=20)  # the position verified moves on, and an old cursor is told so by `live`
        waiting = asyncio.create_task(poll(gateway, cursor, wait=20), name="poll")
        await eventually(lambda: len(gateway.context.sessions) == 1)
        [log] = gateway.context.partition("default", "alice").logs.values()
        await eventually(lambda: log.listeners[0].feed.last > first)
        seqs = await gateway.append()
        answer = await waiting
        record = answer["records"][0]
        assert (record["seq"], f"{cursor.split('.')[0]}.{record['prev']}") == (seqs[0], cursor)


async def test_a_poll_that_has_heard_of_more_than_it_brings_does_not_say_live(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append()
        cursor = (await poll(gateway))["cursor"]
        waiting = asyncio.create_task(poll(gateway, cursor, wait=20), name="poll")
        await eventually(lambda: len(gateway.context.sessions) == 1)
        [log] = gateway.context.partition("default", "alice").logs.values()
        await eventually(lambda: log._confirmed and log.listeners[0].feed.state is State.LIVE)
        listeners, log.listeners = log.listeners, []
        seqs = await gateway.append(count=300)  # their live copies are lost
        log.listeners = listeners
        seqs += await gateway.append()
        answer = await waiting
        assert [frame["seq"] for frame in answer["records"]] == seqs[: len(answer["records"])]
        assert answer["live"] is (len(answer["records"]) == len(seqs))
        rest = await poll(gateway, answer["cursor"])
        assert [frame["seq"] for frame in answer["records"] + rest["records"]] == seqs
        assert rest["live"] is True


async def test_a_client_that_gives_a_poll_up_leaves_no_session_behind(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        cursor = (await poll(gateway))["cursor"]
        polls = [asyncio.create_task(poll(gateway, cursor, wait=20), name="poll") for _ in range(3)]
        await eventually(lambda: len(gateway.context.sessions) == 4)
        for given_up in polls:
            given_up.cancel()
        await eventually(lambda: len(gateway.context.sessions) == 1)


async def test_a_poll_brings_a_bounded_number_of_bytes_and_leaves_the_rest_for_the_next(
    nats_server: NatsServer,
) -> None:
    body = b'{"id":"r","kind":"notification","data":"%b"}' % (b"x" * 250_000)
    async with gateway_on(nats_server) as gateway:
        seqs = await gateway.append(count=12, body=body)
        got, cursor, answers = [], "start", []
        while not answers or not answers[-1]["live"]:
            answers.append(await poll(gateway, cursor))
            got += [frame["seq"] for frame in answers[-1]["records"]]
            cursor = answers[-1]["cursor"]
        assert got == seqs
        assert max(len(answer["records"]) for answer in answers) <= 5
        assert len(answers) <= 4


async def test_a_poll_without_a_cursor_gets_the_reset_and_where_to_go_on(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=2)
        answer = await poll(gateway, None)
        assert (answer["reset"]["reason"], answer["reset"]["inbox"], len(answer["records"])) == ("new", [], 2)
        assert answer["records"][0]["prev"] == int(answer["reset"]["cursor"].split(".")[1])
        seqs = await gateway.append(count=2)
        assert [frame["seq"] for frame in (await poll(gateway, answer["cursor"]))["records"]] == seqs


async def test_a_device_that_polls_acknowledges_what_an_answer_brought(nats_server: NatsServer) -> None:
    async def ack(**body: Any) -> int:
        body = {"device": "watch", **body}
        async with gateway.http.post(f"{gateway.url}/v1/ack", json=body, headers=bearer()) as response:
            return response.status

    async def acknowledged() -> list[list[Any]]:
        receipts = await gateway.receipts()
        return [[one[name] for name in names] for one in receipts if one["state"] == "acknowledged"]

    names = ("subject", "user", "channel", "device", "after", "up_to")
    async with gateway_on(nats_server) as gateway:
        seqs = await gateway.append(count=5)
        first = await poll(gateway, limit=3)
        second = await poll(gateway, first["cursor"])
        for answer in (first, second):
            assert await ack(after=answer["after"], cursor=answer["cursor"], id="newer clients may say more") == 202
        where = [f"rcpt.{gateway.partition()}.default.alice", "alice", "inapp", "watch"]

        async def both() -> bool:
            return len(await acknowledged()) == 2

        await eventually(both)
        assert await acknowledged() == [[*where, 0, seqs[2]], [*where, seqs[2], seqs[4]]]
        epoch = first["cursor"].partition(".")[0]
        assert await ack(after=second["cursor"], cursor=second["cursor"]) == 202
        for body, status in (
            ({"after": f"{epoch}.3", "cursor": f"{epoch}.1"}, 400),
            ({"after": f"{epoch}.3", "cursor": f"{epoch}.99"}, 409),
            ({"after": "zzzzzzzz.1", "cursor": f"{epoch}.3"}, 409),
            ({"after": "x", "cursor": f"{epoch}.3"}, 400),
            ({"cursor": f"{epoch}.3"}, 400),
            ({"after": f"{epoch}.1", "cursor": f"{epoch}.3", "device": ""}, 400),
        ):
            assert await ack(**body) == status, body
        assert len(await acknowledged()) == 2


async def test_what_a_device_says_by_requests_belongs_to_the_trace_of_what_polls_have_brought(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def post(path: str, **body: Any) -> None:
        async with gateway.http.post(f"{gateway.url}{path}", json=body, headers=bearer()) as response:
            assert response.status == 202, await response.text()

    def spans(hop: names.Hop) -> list[Any]:
        return [span for span in collected.found if span.name == hop.title]

    collected = Collected(one_in=10**9)
    monkeypatch.setattr(all_spans, "_active", collected.spans)
    async with gateway_on(nats_server) as gateway:
        await gateway.append(count=3, headers={"traceparent": PARENT})
        await gateway.append(body=b'{"id":"quiet","kind":"notification"}')
        first = await poll(gateway, limit=2)
        second = await poll(gateway, first["cursor"])
        delivered = [span.context.span_id for span in spans(names.DELIVER)]
        assert len(delivered) == 3
        await post("/v1/ack", device="tablet", after=first["after"], cursor=second["cursor"])
        assert spans(names.ACK) == [], "that device was sent nothing"
        for answer in (first, first, second):
            await post("/v1/ack", device="watch", after=answer["after"], cursor=answer["cursor"])
        assert [span.parent.span_id for span in spans(names.ACK)] == delivered
        assert {span.context.trace_id for span in spans(names.ACK)} == {int(PARENT[3:35], 16)}
        await eventually(lambda: len(spans(names.STORE_RECEIPT)) >= 3)
        assert {span.parent.span_id for span in spans(names.STORE_RECEIPT)} == set(delivered[1:]), (
            "the newest of a range"
        )
        await post("/v1/inbox/read", device="watch", ids=["quiet"])
        assert spans(names.READ) == []
        await post("/v1/inbox/read", device="watch", ids=["r1"])
        [read] = spans(names.READ)
        assert read.parent.span_id == delivered[1]
        [frame] = (await poll(gateway, second["cursor"]))["records"][-1:]
        assert frame["record"]["trace"].split("-")[2] == f"{read.context.span_id:016x}"


async def test_reads_marked_by_request_reach_every_device(nats_server: NatsServer) -> None:
    async with gateway_on(nats_server) as gateway, gateway.device() as device:
        await device.until("live")
        await gateway.append(count=2)
        cursor = (await device.records(2))[-1]["cursor"]
        for body, expected in (
            ({"ids": ["r0"]}, {"ids": ["r0"]}),
            ({"up_to": cursor}, {"up_to": 2}),
            ({"all": True}, {"up_to": 4}),
        ):
            async with gateway.http.post(
                f"{gateway.url}/v1/inbox/read", json={"device": "tab", **body}, headers=bearer()
            ) as response:
                assert response.status == 202, await response.text()
            record = (await device.records(1))[0]["record"]
            assert record["device"] == "tab"
            assert expected.items() <= record.items()
        for body, status in (
            ({}, 400), ({"ids": []}, 400), ({"up_to": "x"}, 400), ({"up_to": "zzzzzzzz.1"}, 409), ({"oops": 1}, 400),
        ):  # fmt: skip
            async with gateway.http.post(
                f"{gateway.url}/v1/inbox/read", json={"device": "tab", **body}, headers=bearer()
            ) as response:
                assert response.status == status
