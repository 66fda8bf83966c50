"""Events for topics, on a real gateway, broker and database: stored for the members, or refused with the remedy."""

import json
from typing import Any

from engine.postgres import Pool
from ops.dev.servers import NatsServer
from seamark.protocol.limits import RECIPIENTS_MAX
from tests.integration.test_events_api import post, with_keys

EVENT: dict[str, Any] = {"id": "e1", "to": ["topic:news", "zoe"], "type": "sale.autumn", "data": {"off": 20}}


async def join(pool: Pool, topic: str, users: list[str], tenant: str = "acme") -> None:
    columns = ["tenant", "topic", "user_id"]
    await pool.copy_records_to_table("topic_members", records=[(tenant, topic, u) for u in users], columns=columns)


async def test_an_event_for_a_topic_is_stored_once_for_those_who_are_its_members(
    nats_server: NatsServer, postgres: str, pool: Pool
) -> None:
    await join(pool, "news", ["bob", "anna", "zoe"])
    await join(pool, "news", ["mallory"], tenant="other")
    async with with_keys(nats_server, postgres) as gateway:
        status, first = await post(gateway, EVENT)
        assert (status, first["duplicate"]) == (202, False)
        await join(pool, "news", ["late"])
        assert (await post(gateway, EVENT))[1]["duplicate"] is True
        stored = await gateway.broker.leader_next("EVENTS", "ev.>", 1)
        assert stored is not None
        event = json.loads(stored.payload)
    assert (event["to"], event["data"]) == (["zoe", "anna", "bob"], {"off": 20})


async def test_members_whom_no_event_may_name_keep_the_others_from_nothing(
    nats_server: NatsServer, postgres: str, pool: Pool
) -> None:
    await join(pool, "news", ["bob", "segment:x", "topic:y"])  # earlier versions let them be
    await join(pool, "large", ["segment:x", *(f"u{number}" for number in range(RECIPIENTS_MAX + 1))])
    await join(pool, "none", ["segment:x"])
    async with with_keys(nats_server, postgres) as gateway:
        status, answer = await post(gateway, EVENT)
        assert status == 202, answer
        stored = await gateway.broker.leader_next("EVENTS", "ev.>", 1)
        assert stored is not None
        assert json.loads(stored.payload)["to"] == ["zoe", "bob"]
        for topic, said in (("large", "start a campaign"), ("none", "nobody is a member")):
            status, problem = await post(gateway, EVENT | {"to": [f"topic:{topic}"]})
            assert (status, said in problem["detail"]) == (400, True), problem


async def test_a_topic_that_one_event_cannot_be_for_is_refused_with_the_remedy_and_nothing_is_stored(
    nats_server: NatsServer, postgres: str, pool: Pool
) -> None:
    await join(pool, "large", [f"u{number}" for number in range(RECIPIENTS_MAX + 1)])
    async with with_keys(nats_server, postgres) as gateway:
        for to, said in (
            (["topic:large"], "start a campaign"),
            (["topic:none"], "nobody is a member"),
            (["topic:a\0"], "NUL"),
            ([f"topic:t{number}" for number in range(11)], "11 topics"),
            (["segment:pro"], "start a campaign"),
        ):
            status, problem = await post(gateway, EVENT | {"to": to})
            assert (status, problem["field"]) == (400, "to"), problem
            assert said in problem["detail"]
        status, answer = await post(gateway, {"events": [EVENT]}, path="/v1/events/bulk")
        assert "POST /v1/events" in answer["results"][0]["error"]["detail"]
        assert (await gateway.broker.stream("EVENTS")).last_seq == 0
