"""`Payment received`, then `payment refunded` with the same ordering key, while dispatchers die: reversed on no device."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from chaos.faults import Fault, kill_one, torment
from chaos.ledger import Line
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.chaos import SECONDS, TIMEOUT, Chaos
from tests.support.devices import devices
from tests.support.logs import FAST, connected
from tests.support.roles import DispatcherProcess, dispatcher_processes, gateway_role

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(TIMEOUT)]

PAIRS = 10_000 if SECONDS else 500
AT_A_TIME = 24
USERS = [f"user{number}" for number in range(20)]


def reversed_pairs(lines: Sequence[Line]) -> tuple[int, list[str]]:
    """How many pairs devices were given, and those of them that are reversed, or not two; ids are `<pair>:1` and `<pair>:2`."""
    given: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        if line.op == "deliver" and line.facts["event"] and "/app/" in line.facts["session"]:
            pair, _, number = line.facts["event"].rpartition(":")
            given.setdefault((line.process, pair), []).append(int(number))
    return len(given), [f"{user}: {pair} {numbers}" for (user, pair), numbers in given.items() if numbers != [1, 2]]


def start_somehow(process: DispatcherProcess, rng: random.Random) -> None:
    """Every third one dies by itself between the partitions of an event, or before or after it has written some."""
    point = rng.choice(["before-append", "between-foreign-and-home", "after-commit-before-answer"])
    process.spawn(fail_point=f"{point}:{rng.randint(1, 40)}" if rng.random() < 0.3 else "")


@pytest.mark.chaos(takes_seconds=20)
async def test_a_refund_never_comes_before_its_payment_on_any_device(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=FAST)
        with (
            dispatcher_processes(tmp_path, nats_server.url, valkey.url) as processes,
            gateway_role(tmp_path, nats_server.url) as gateway,
        ):
            for process in [*processes, gateway]:
                process.start()
            async with devices(chaos.ledger, USERS, gateway.url) as found:
                load, payments, wanted = chaos.load(broker, prefix="pay"), iter(range(PAIRS)), 0

                async def pay() -> None:
                    nonlocal wanted
                    for number in payments:
                        to = chaos.rng.sample(USERS, chaos.rng.randint(1, 4))
                        wanted += len(to)
                        for _ in ("received", "refunded"):
                            await load.publish(f"payment-{number}", to)

                paying = asyncio.gather(*(pay() for _ in range(AT_A_TIME)))
                faults = [Fault("kill", 1, kill_one(processes, start_somehow))]
                drawn = await torment(chaos.rng, faults, count=5, until=paying.done, pause_seconds=(0.3, 1.5))
                await paying
                for process in processes:
                    if not process.alive:
                        process.spawn()
                await chaos.judge_devices(broker, found)
    pairs, wrong = reversed_pairs(chaos.ledger.lines)
    print(f"{drawn}, {load.acknowledged} events acknowledged, {pairs} pairs on devices")
    assert load.acknowledged == 2 * PAIRS
    assert (pairs, wrong) == (wanted, [])


def test_a_reversed_pair_would_be_noticed() -> None:
    def given(*events: str) -> list[Line]:
        return [
            Line(0.0, "alice", number, "deliver", "ok", {"session": "alice/app/1", "event": event})
            for number, event in enumerate(events)
        ]

    assert reversed_pairs(given("p:1", "q:1", "p:2", "q:2")) == (2, [])
    assert reversed_pairs(given("p:2", "p:1"))[1] == ["alice: p [2, 1]"]
    assert reversed_pairs(given("p:1", "p:1", "p:2"))[1] == ["alice: p [1, 1, 2]"]
    assert reversed_pairs(given("p:1"))[1] == ["alice: p [1]"]
