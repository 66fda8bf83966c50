"""A service that publishes personal events at a steady rate: `python -m bench.publisher '<settings as JSON>'`."""

import asyncio
import sys
import time

import msgspec
import uvloop

from bench.load import event
from bench.processes import say
from engine.broker.jetstream import NatsSettings, connect

BATCHES_IN_FLIGHT = 4
"""A service that waits for each batch would measure the round trip; more would hide that the broker does not keep up."""


class Settings(msgspec.Struct):
    """Events per second in so many batches, to users in turn, from `first` on, for so long. Ids start at `id_from`.

    `follow_one_in`: of so many events one is followed by traces; 0: none is.
    """

    url: str
    rate: int
    users: int
    seconds: float
    first: int = 0
    id_from: int = 0
    batches_per_second: int = 50
    critical: bool = False
    follow_one_in: int = 0


async def _main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    broker = await connect(NatsSettings(settings.url, name="publisher"))
    slots = asyncio.Semaphore(BATCHES_IN_FLIGHT)
    started, number = time.time(), settings.id_from
    pace, one_in = settings.batches_per_second, settings.follow_one_in
    ticks = max(1, round(pace * settings.seconds))

    async def publish(first: int, last: int, due: float) -> None:
        async with slots:
            await broker.commit(
                [
                    event(
                        k,
                        settings.first + k % settings.users,
                        due,
                        critical=settings.critical,
                        followed=one_in > 0 and k % one_in == 0,
                    )
                    for k in range(first, last)
                ],
                timeout_seconds=30,
            )

    async with asyncio.TaskGroup() as tasks:
        for tick in range(ticks):
            due = started + tick / pace
            await asyncio.sleep(max(0.0, due - time.time()))
            # The rate need not be a multiple of the ticks.
            until = settings.id_from + round(settings.rate * (tick + 1) / pace)
            if until > number:
                tasks.create_task(publish(number, until, due), name="publish")
                number = until
    say("published", events=number - settings.id_from, seconds=time.time() - started)
    await broker.close()


if __name__ == "__main__":
    uvloop.run(_main())
