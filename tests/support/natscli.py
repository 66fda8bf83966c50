"""What the documentation has people type into the `nats` command, asked of the broker itself.

That command is in no package registry, so it cannot be part of the tests' environment. Each of its commands is a request to
the broker: the same request is made here, for the same streams and subjects.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Final

from engine.broker.jetstream import Broker
from engine.topology.files import render
from tests.support.logs import all_records, eventually

PARTITIONS: Final = 4
_IN_A_LOG: Final = re.compile(r"mark\.\d+\.[a-z]?\d+|log\.\d+\..+")


async def ask(broker: Broker, words: list[str]) -> None:
    """Do what `nats <words>` does; AssertionError when its answer would be empty, or another than people expect."""
    match words:
        case ["stream", "report"]:
            names = {stream["config"]["name"] for stream in (await broker.api("STREAM.LIST"))["streams"]}
            assert {stream.name for stream in render("dev", PARTITIONS).streams} == names
        case ["stream", "subjects", stream]:
            info = await broker.api(f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
            subjects = info["state"]["subjects"]
            assert subjects
            assert all(_IN_A_LOG.fullmatch(subject) for subject in subjects), subjects
        case ["stream", "get", stream, "--last-for", subject]:
            last = await broker.leader_last(stream, subject)
            assert last is not None, f"{stream} has nothing on {subject}"
            json.loads(last.payload)
        case ["stream", "view", stream]:
            assert (await broker.stream(stream)).last_seq > 0, f"{stream} is empty"
        case ["consumer", "report", stream]:
            names = {consumer["name"] for consumer in (await broker.api(f"CONSUMER.LIST.{stream}"))["consumers"]}
            assert {f"dispatch-{q}" for q in range(PARTITIONS)} == names
        case ["sub", subject]:
            heard = asyncio.Event()
            subscription = broker.subscribe(subject, lambda *_: heard.set())
            async with asyncio.timeout(30):
                await heard.wait()
            subscription.unsubscribe()
        case ["pub", subject, payload]:
            id = json.loads(payload)["id"]
            broker.publish(subject, payload.encode())
            await eventually(lambda: _in_a_log(broker, id))
        case _:
            raise AssertionError(f"nobody has said what `nats {' '.join(words)}` asks the broker: write it down here")


async def _in_a_log(broker: Broker, id: str) -> bool:
    return any(record.id == id for record in await all_records(broker, PARTITIONS))
